"""The batch of a spec: an amount, or the policy that sets it before every step.

Read here from the call that a spec holds, checked, and turned into the action that runs. Importing
this loads neither torch nor the runtime, since `trainc check` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from trainc.dsl.reading.field_types import samples_or_call
from trainc.dsl.text.vocabulary import COUNTERS, PLACES
from trainc.dsl.values import value_json as v
from trainc.dsl.values.functions import Function

if TYPE_CHECKING:
    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.step.batch_policy import BatchPolicy

POLICIES: dict[str, Function] = {
    "ramp": Function(
        {"begin": "samples", "to": "samples", "over": "duration", "from": "duration"},
        1,
        3,
    ),
    "follow": Function(
        {
            "signal": "amount",
            "max": "samples",
            "min": "samples",
            "factor": "plain",
            "step": "samples",
            "every": "duration",
            "from": "duration",
            "grow_only": "switch",
        },
        1,
        2,
    ),
    "signal_noise": Function(
        {
            "signal": "amount",
            "max": "samples",
            "min": "samples",
            "theta": "plain",
            "every": "duration",
            "from": "duration",
        },
        1,
        2,
    ),
    "seesaw": Function({"max": "samples", "min": "samples"}, 0, 1),
}
"""The policies that `batch` of `data` can be instead of an amount."""

_HINT = (
    f"for a batch that changes write {', '.join(f'`{p}(...)`' for p in POLICIES)} or a `when` rule"
)
BatchSize = Annotated[v.Duration | v.Call, samples_or_call("batch policy", POLICIES, _HINT)]

THETA = 0.6
"""The published values of `theta`, `every` and `from` of `signal_noise`."""
LOOK, BEGIN = v.Duration(100, "steps"), v.Duration(0.15, "run")

# Names that an expression may have although nothing is measured.
_NOT_MEASURED = {*COUNTERS, *PLACES, "progress", "batch", "micro_batch", "step"}
Arguments = Mapping[str, v.Expr]


@dataclass(frozen=True, slots=True)
class Policy:
    """The arguments of a batch policy; all sizes in samples.

    The batch begins with `start` and ends with, or is at most, `end`. A ramp and a seesaw have no
    `signal`, and `pace` is the length of a ramp; otherwise `pace` is `every`. `strength` is `factor`
    or `theta`.
    """

    call: v.Call
    micro: int
    start: int
    end: int
    grain: int
    strength: float
    signal: v.Expr | None
    begun: v.Duration | None
    pace: v.Duration | None
    grow_only: bool

    @property
    def name(self) -> str:
        return self.call.function

    @property
    def scales_rates(self) -> bool:
        """Whether it scales learning rates with the batch."""
        return self.name == "seesaw"


def parse_batch_policy(call: v.Call, micro: v.Duration | None) -> Policy:
    """Return the arguments of a policy's call; raises ValueError that names the wrong argument."""
    given = _named(call)
    if call.function == "ramp":
        return _ramp(call, given, micro)
    low, high = _samples(given, "min"), _samples(given, "max")
    if not low and micro is None:
        raise ValueError(
            f"`{call.function}` needs `min`, the size of the first batch, or the field `micro`"
        )
    unit = int(micro.amount) if micro else low
    start, grain = low or unit, _samples(given, "step") or unit
    if high < start:
        raise ValueError(f"`max = {high} samples` is below the first batch of {start} samples")
    for name, size in (("min", start), ("max", high), ("step", grain)):
        if size % unit:
            near = f"write `{name} = {_near(size, unit)} samples`"
            raise ValueError(
                f"`{name} = {size} samples` is not a multiple of the micro-batch of {unit} samples: "
                f"{near}, or choose a `micro` that divides it"
            )
    if call.function == "seesaw":
        if high == start:
            raise ValueError(
                f"this batch stays at {start} samples: write `batch = {start} samples`"
            )
        return Policy(call, unit, start, high, unit, 1.0, None, None, None, False)
    return _signalled(call, given, (unit, start, high, grain))


def _signalled(call: v.Call, given: Arguments, sizes: tuple[int, int, int, int]) -> Policy:
    """Return a policy that reads a signal; the sizes are a micro-batch, the first and the largest batch, and a move."""
    unit, start, high, grain = sizes
    follows = call.function == "follow"
    signal, word = given["signal"], "factor" if follows else "theta"
    if not any(isinstance(x, v.Name) and x.id not in _NOT_MEASURED for x in v.walk(signal)):
        raise ValueError(
            f"the first argument of `{call.function}` must use a measured signal, such as `gns`"
        )
    if used := [x.id for x in v.walk(signal) if isinstance(x, v.Name) and x.id in PLACES]:
        raise ValueError(f"`{used[0]}` cannot be used here, because all layers have the same batch")
    begun, pace = _duration(given, "from"), _duration(given, "every")
    if not follows:
        begun, pace = begun or BEGIN, pace or LOOK
    if pace is not None and pace.amount <= 0:
        raise ValueError("`every` must be longer than 0: write `every = 100 steps`")
    strength = _number(given, word, 1.0 if follows else THETA)
    grow_only = not follows or given.get("grow_only", v.Name("false")) == v.Name("true")
    return Policy(call, unit, start, high, grain, strength, signal, begun, pace, grow_only)


def _ramp(call: v.Call, given: Arguments, micro: v.Duration | None) -> Policy:
    """Return a ramp; its ends need not be whole micro-batches, because sizes are rounded up."""
    start, end = _samples(given, "begin"), _samples(given, "to")
    over, begun = _duration(given, "over"), _duration(given, "from")
    assert over is not None
    if start == end:
        raise ValueError(f"this ramp stays at {start} samples: write `batch = {start} samples`")
    if over.amount <= 0:
        raise ValueError("`over` of `ramp` must be longer than 0: write `over = 50%`")
    unit = int(micro.amount) if micro else min(start, end)
    return Policy(call, unit, start, end, unit, 1.0, None, begun, over, False)


def _near(size: int, unit: int) -> int:
    return max(unit, size // unit * unit)


def check_whole_micro_batches(batch: v.Duration, micro: v.Duration) -> None:
    """Raise ValueError, with the sizes that work, for an amount that is not a whole number of micro-batches."""
    size, unit = int(batch.amount), int(micro.amount)
    if not size % unit:
        return
    if size < unit:
        raise ValueError(
            f"this is less than a micro-batch of {unit} samples: write `batch = {unit} samples` or"
            f" `micro = {size} samples`"
        )
    near = " or ".join(
        f"`batch = {n} samples`" for n in (size - size % unit, size - size % unit + unit)
    )
    divisor = next(n for n in range(unit, 0, -1) if size % n == 0)
    raise ValueError(
        f"this is not a multiple of the micro-batch of {unit} samples: write {near}, or a `micro` that"
        f" divides {size}, such as `micro = {divisor} samples`"
    )


def _named(call: v.Call) -> dict[str, v.Expr]:
    """Return the arguments of a call by name."""
    function = POLICIES[call.function]
    given = dict(zip(function.arguments, call.args, strict=False)) | dict(call.kwargs)
    order = list(function.arguments)
    unknown = [name for name in given if name not in order]
    missing = [name for name in order[: function.required] if name not in given]
    if unknown or len(call.args) > function.positional:
        wrong = (
            f"has no argument `{unknown[0]}`"
            if unknown
            else f"takes only {function.positional} argument without a name"
        )
        raise ValueError(f"`{call.function}` {wrong}: the arguments are {', '.join(order)}")
    if missing:
        raise ValueError(f"`{call.function}` needs `{missing[0]}`")
    return given


def _samples(given: Arguments, name: str) -> int:
    """Return an amount of samples, 0 where it is not given."""
    value = given.get(name)
    if value is None:
        return 0
    size = value.duration if isinstance(value, v.Quantity) else None
    if size is None or size.unit != "samples" or size.amount < 1 or size.amount % 1:
        raise ValueError(f"`{name}` must be a whole number of samples: write `{name} = 16 samples`")
    return int(size.amount)


def _duration(given: Arguments, name: str) -> v.Duration | None:
    value = given.get(name)
    if value is None:
        return None
    if not isinstance(value, v.Quantity):
        raise ValueError(f"`{name}` must be a duration: write `{name} = 1M tokens`")
    if value.duration.unit == "seconds":
        raise ValueError(
            f"`{name}` cannot be in seconds, because two runs would then have different batches:"
            " write steps, samples, tokens or a percentage"
        )
    return value.duration


def _number(given: Arguments, name: str, default: float) -> float:
    value = given.get(name, v.Number(default))
    if not isinstance(value, v.Number) or value.value <= 0:
        raise ValueError(f"`{name}` must be a number above 0")
    return float(value.value)


def action(policy: Policy, to: Lowering) -> BatchPolicy:
    """Return the action of a policy; raises ValueError where the units of time do not allow it."""
    from trainc.runtime.step.batch_policy import Bounds, Follow, Ramp, Seesaw, SignalNoise

    text = str(policy.call)
    bounds = Bounds(policy.start, policy.end, policy.micro)
    if policy.name == "seesaw":
        names = [entry.name for entry in to.inventory.trainable]
        return Seesaw(to.label, text, to.base_rate(), bounds, to.lr_factor("batch", names))
    window = to.window(policy.begun, None, policy.pace)
    if policy.signal is None:
        assert window.every is not None
        ends = (policy.start, policy.end)
        return Ramp(to.label, text, ends, policy.micro, window.every, window.start)
    signal = to.amount(policy.signal, "samples")
    if policy.name == "signal_noise":
        return SignalNoise(to.label, text, signal, bounds, policy.strength, window)
    made = Follow(
        to.label, text, signal, bounds, policy.grain, policy.strength, window.every,
        grow_only=policy.grow_only,
    )  # fmt: skip
    made.gate = to.window(policy.begun, None, None) if policy.begun else None
    return made
