"""Sums of exponentials over a row, read once, which every thread keeps for itself; for the Triton kernels of losses.

One view's sums are (top, scaled, beside, own, rest, along). top is the largest entry when they were measured, scaled
what it is in powers of 2, and beside the gap, first view less second, at its place. With weights exp(x - top) the rest
is the sum of all but that entry's own, and along the sum of weights times gap - base, where base is the first view's
beside, the same for both views: log p - log q counted from one entry. Counted from there, and with the entry's 1 apart,
neither loses anything where one class is all but certain. own is 1, and 0 until an entry is met.

A weight is one multiplication with an addition, exp2(x log2(e) - scaled). The rounding of scaled is in all of them
alike, and is taken out at the end. Where scaled overflows it is -inf: then weights are measured from top itself.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
import triton
import triton.language as tl

# In float32, as a device multiplies by it.
_LOG2E = tl.constexpr(1.4426950216293335)
_LN2 = tl.constexpr(0.6931471805599453)
# What sums are measured from until an entry is met.
_LOWEST = tl.constexpr(-3.4028234663852886e38)
# A power of 2 that is 0, and the largest entry whose product with log2(e) is surely finite.
_NOTHING = tl.constexpr(-256.0)
_HIGHEST_SCALED = tl.constexpr(2e38)
# Entries that come to twice the top's weight are added to sums measured from it: only beyond are they measured anew.
# Then no class is all but certain, and nothing is lost.
_SLACK = tl.constexpr(1.0)


@triton.jit
def no_sums(V: tl.constexpr):
    """The sums of no entries, of V lanes."""
    none, each = tl.full((), 0.0, tl.float32), tl.zeros((V,), tl.float32)
    lowest = tl.full((), _LOWEST, tl.float32)
    return lowest, tl.full((), float("-inf"), tl.float32), none, none, each, each


@triton.jit
def powers(x, view):
    """The powers of 2 that the weights of entries are; inf or nan where scaled has overflowed."""
    return tl.fma(x, _LOG2E, -view[1])


@triton.jit
def adds_up(power):
    """Whether weights of these powers (V, W) can be added to sums as they are measured: none is much above 1."""
    # A warp finds the largest whole number in one instruction. A nan goes into the sums either way.
    most = tl.max(tl.max(power, 1).to(tl.int32, bitcast=True))
    return most.to(tl.float32, bitcast=True) <= _SLACK


@triton.jit
def added(view, power, gap, KL: tl.constexpr):
    """The sums after a block whose weights add up, gap being counted from base."""
    top, scaled, beside, own, rest, along = view
    weight = tl.exp2(power)
    rest += tl.sum(weight, 1)
    if KL:
        along += tl.sum(weight * gap, 1)
    return top, scaled, beside, own, rest, along


@triton.jit
def _powers_at_any_top(x, top, scaled):
    apart = x - top
    # Nothing is left of a weight long before a power overflows.
    apart = tl.where(apart < _NOTHING, _NOTHING, apart)
    return tl.where(scaled > float("-inf"), powers(x, (top, scaled)), apart * _LOG2E)


@triton.jit
def measured_anew(view, base, x, gap, place, valid, KL: tl.constexpr, FIRST: tl.constexpr):
    """The sums after any block.

    `base` is the first view's beside (before, after), of the second view both known; FIRST is for the view whose own it
    is. An entry of -inf makes along inf or nan, and nothing else.
    """
    top, scaled, beside, own, rest, along = view
    highest = tl.max(tl.where(valid, x, float("-inf")))
    higher = highest > top
    last: tl.constexpr = 2147483647
    chosen = tl.where(higher, tl.min(tl.where(valid & (x == highest), place, last)), last)
    first = tl.arange(0, rest.shape[0]) == 0
    new_top = tl.where(higher, highest, top)
    new_scaled = tl.where(tl.abs(new_top) < _HIGHEST_SCALED, new_top, float("-inf")) * _LOG2E
    both_scaled = (scaled > float("-inf")) & (new_scaled > float("-inf"))
    apart = tl.where(both_scaled, scaled, 0.0) - tl.where(both_scaled, new_scaled, 0.0)
    apart = tl.where(both_scaled, apart, tl.maximum(top - new_top, _NOTHING) * _LOG2E)
    shrunk = tl.exp2(tl.maximum(apart, _NOTHING))
    was = tl.exp2(_powers_at_any_top(top, new_top, new_scaled))
    was = tl.where(first, tl.where(higher, was * own, 0.0), 0.0)
    weight = tl.exp2(_powers_at_any_top(x, new_top, new_scaled))
    weight = tl.where(valid & (place != chosen), weight, 0.0)
    if KL:
        found = tl.sum(tl.where(place == chosen, gap, 0.0))
        new_beside = tl.where(higher, found, beside)
        new_base = new_beside if FIRST else base[1]
        along = shrunk * (along + rest * (base[0] - new_base)) + was * (beside - new_base)
        along += tl.sum(tl.where(valid, weight * (gap - new_base), 0.0), 1)
        beside = new_beside
    # Beside an entry of inf nothing has a weight, and no sum of them is a number.
    rest = shrunk * rest + was + tl.sum(weight, 1) + tl.where(first, new_top - new_top, 0.0)
    return new_top, new_scaled, beside, tl.where(higher, 1.0, own), rest, along


@triton.jit
def settled(view):
    """rest and along of all lanes, the rounding of scaled taken out of them."""
    top, scaled, _, _, rest, along = view
    power = tl.where(scaled > float("-inf"), powers(top, view), 0.0)
    small = power * _LN2
    # An approximate exp2 of next to nothing would be off by more than that.
    unit = tl.where(tl.abs(small) < 0.001, 1.0 - small * (1.0 - 0.5 * small), tl.exp2(-power))
    return tl.sum(rest, 0) * unit, tl.sum(along, 0) * unit


@triton.jit
def log_sum(own, rest):
    """log(own + rest) for an own of 1 or 0, also where 1 + rest is 1."""
    above = own + rest
    rounded = tl.where(above == 1.0, 1.0, above - 1.0)
    kept = tl.where(above == 1.0, rest, tl.log(above) * (rest / rounded))
    return tl.where(own == 0.0, tl.log(tl.where(own == 0.0, rest, 1.0)), kept)
