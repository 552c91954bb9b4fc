"""The draws of `normals.py` on the CPU, bit for bit, through NumPy's view of torch's memory.

A draw for shared tokens is small: its cost is the number of calls, and a call of NumPy costs half of
torch's. A draw for every token is bound by arithmetic: words stay in 32 bits, and a product's halves
are read in place. Nothing is imported: where torch has no NumPy, `available()` is False and
`normals.py` draws by torch.
"""

import math
import sys
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from trainc.kernels.noise.philox import MASK, MAX_VIEWS, MULTIPLIERS, ROUNDS, TOP, WEYL

# Groups of four normals drawn at once: enough to hide the calls, few enough for a shared cache.
BLOCK = 1 << 15


@cache
def available() -> bool:
    """Whether torch shows its memory as NumPy arrays, and words as their lower half first."""
    try:
        torch.zeros(1).numpy()
    except RuntimeError:
        return False
    return sys.byteorder == "little"


def _products(integers: Tensor) -> Any:
    """The same memory as 64-bit words."""
    return integers.contiguous().numpy().view("uint64")


def _lower(words: Any) -> Any:
    """The lower halves of 64-bit words, in place."""
    return words.view("uint32")[..., ::2]


def _upper(words: Any) -> Any:
    """The upper halves of 64-bit words, in place."""
    return words.view("uint32")[..., 1::2]


@cache
def _multipliers() -> tuple[Any, Any]:
    """Factors of the two words of even and of odd rounds: a round leaves its words swapped."""
    factors = _products(torch.tensor(MULTIPLIERS).view(2, 1, 1))
    return factors, factors[::-1].copy()


@lru_cache(maxsize=16)
def _keys(key: int) -> tuple[tuple[int, ...], Any]:
    """A key's words: of the first two rounds, and of all (ROUNDS, 2, 1, 1), even ones swapped."""
    parts = (key & MASK, key >> 32 & MASK)
    rows = [
        [(part + number * bump) & MASK for part, bump in zip(parts, WEYL, strict=True)]
        for number in range(ROUNDS)
    ]
    swapped = [row if number % 2 else row[::-1] for number, row in enumerate(rows)]
    words = _lower(_products(torch.tensor(swapped)))
    return (*rows[0], *rows[1]), words.reshape(ROUNDS, 2, 1, 1)


@lru_cache(maxsize=16)
def _counters(views: int, examples: int, tokens: int, groups: int) -> tuple[Any, ...]:
    """Examples (R, 1) of the rows, and the first products of rows (R, 1) and of groups (1, G)."""
    view, example, token, group = map(torch.arange, (views, examples, tokens, groups))
    where = view.view(-1, 1, 1) + MAX_VIEWS * token.expand(views, examples, tokens)
    rows = example.view(1, -1, 1).expand(where.shape).reshape(-1, 1)
    return (
        _lower(_products(rows)).copy(),
        _products(where.reshape(-1, 1) * MULTIPLIERS[1]),
        _products(group.view(1, -1) * MULTIPLIERS[0]),
    )


def _words(key: int, site: int, example: Any, by_row: Any, by_group: Any) -> tuple[Any, Any]:
    """The words (w0, w2) and (w1, w3), each (2, R, G)."""
    (k0, k1, l0, l1), keys = _keys(key)
    even, odd = _multipliers()
    # Rows and groups meet in the second round: until then there are R + G words, not R G.
    row = (_upper(by_row) ^ example ^ k0) * even[0]
    column = (_upper(by_group) ^ (site ^ k1)) * even[1]
    on_rows, on_groups = by_row[None].repeat(2, 0), by_group[None].repeat(2, 0)
    on_rows, on_groups = _lower(on_rows), _lower(on_groups)
    on_rows[1], on_groups[0] = _upper(row) ^ l1, _upper(column) ^ l0
    product = (on_rows ^ on_groups) * even
    words = _upper(product) ^ keys[2]
    words[0] ^= _lower(row)
    words[1] ^= _lower(column)
    for number in range(3, ROUNDS):
        added, product = _lower(product)[::-1], words * (odd if number % 2 else even)
        words = _upper(product) ^ added
        words ^= keys[number]
    return words, _lower(product)


def _write_normals(words: tuple[Any, Any], cosine: Tensor, sine: Tensor) -> None:
    """`philox.normal_pair` of stacked words, written to (2, R, G)."""
    # Logarithms, sines and cosines are torch's, whose last bits the noise is made of.
    unit, turn = ((word & TOP).astype("float32") for word in words)
    unit *= 2.0**-32
    unit += 2.0**-24
    radius = torch.from_numpy(unit).log_()
    unit *= -2.0
    radius.sqrt_()
    turn *= 2.0 * math.pi * 2.0**-32
    angle = torch.from_numpy(turn)
    torch.mul(angle.cos(), radius, out=cosine)
    torch.mul(angle.sin_(), radius, out=sine)


def _write_uniforms(words: tuple[Any, Any], even: Tensor, odd: Tensor) -> None:
    """The top 24 bits of stacked words over 2^24, written to (2, R, G)."""
    for word, lane in zip(words, (even, odd), strict=True):
        torch.mul(torch.from_numpy((word & TOP).astype("float32")), 2.0**-32, out=lane)


def normal(
    key: int, site: int, views: int, examples: int, tokens: int, groups: int, first: int
) -> Tensor:
    """(views * examples * tokens, 4 * groups) normals, `first` added to examples."""
    return _drawn(_write_normals, key, site, views, examples, tokens, groups, first)


def uniform(
    key: int, site: int, views: int, examples: int, tokens: int, groups: int, first: int
) -> Tensor:
    """(views * examples * tokens, 4 * groups) uniforms in [0, 1), `first` added to examples."""
    return _drawn(_write_uniforms, key, site, views, examples, tokens, groups, first)


def _drawn(
    write: Callable[..., None],
    key: int,
    site: int,
    views: int,
    examples: int,
    tokens: int,
    groups: int,
    first: int,
) -> Tensor:
    if not groups:
        return torch.empty((views * examples * tokens, 0))
    example, by_row, by_group = _counters(views, examples, tokens, groups)
    if first:
        example = example + (first & MASK)
    noise = torch.empty((example.shape[0], 4 * groups))
    lanes = noise.view(-1, groups, 2, 2).permute(3, 2, 0, 1)
    step = max(1, BLOCK // max(groups, 1))
    for start in range(0, example.shape[0], step):
        part = slice(start, start + step)
        words = _words(key, site, example[part], by_row[part], by_group)
        write(words, *lanes[:, :, part].unbind())
    return noise
