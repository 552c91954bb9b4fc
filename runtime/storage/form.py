"""Forms: what each entry of a state may be. A state is checked whole, before anything of it is loaded.

torch is imported inside functions, since constructs say their forms.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class StateProblem(ValueError):
    """An entry of a state is not what it has to be; the message has its path, and what was expected."""

    def __init__(self, path: str, expected: object, found: str) -> None:
        self.path = path
        super().__init__(f"the state's entry `{path or '.'}` is {found}: expected {expected}")


class Form(ABC):
    """What an entry may be; its text says so after `expected`.

    With `partial` a state may be of other clauses on the same model: entries may be missing or added, and tensors may
    have other shapes, which the load itself compares.
    """

    def check(self, value: Any, path: str, partial: bool = False) -> None:
        """Raise StateProblem where a value at a path is not of this form."""
        if not self.fits(value, partial):
            raise StateProblem(path, self, shown(value))

    @abstractmethod
    def fits(self, value: Any, partial: bool) -> bool:
        """Say whether a value, by itself, is of this form."""


@dataclass(frozen=True)
class Number(Form):
    """A number from `low` to `high`; without `finite` it may be infinite or NaN."""

    low: float = -math.inf
    high: float = math.inf
    finite: bool = True

    def fits(self, value: Any, partial: bool) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return self.low <= value <= self.high if not self.finite or math.isfinite(value) else False

    def __str__(self) -> str:
        return ("a finite number" if self.finite else "a number") + _range(self.low, self.high)


@dataclass(frozen=True)
class AnyNumber(Form):
    """A number of any kind, NaN and infinity included."""

    def fits(self, value: Any, partial: bool) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    def __str__(self) -> str:
        return "a number"


@dataclass(frozen=True)
class Count(Form):
    """An integer from `low` to `high`."""

    low: int = 0
    high: float = 1 << 62

    def fits(self, value: Any, partial: bool) -> bool:
        return type(value) is int and self.low <= value <= self.high

    def __str__(self) -> str:
        return "an integer" + _range(self.low, self.high if self.high < 1 << 62 else math.inf)


@dataclass(frozen=True)
class Flag(Form):
    """True or false."""

    def fits(self, value: Any, partial: bool) -> bool:
        return isinstance(value, bool)

    def __str__(self) -> str:
        return "true or false"


@dataclass(frozen=True)
class Text(Form):
    """A text, one of `among` where some are given."""

    among: Sequence[str] = ()

    def fits(self, value: Any, partial: bool) -> bool:
        return isinstance(value, str) and (partial or not self.among or value in self.among)

    def __str__(self) -> str:
        return " or ".join(f"`{one}`" for one in self.among) or "a text"


@dataclass(frozen=True)
class Plain(Form):
    """JSON data of any form."""

    def fits(self, value: Any, partial: bool) -> bool:
        if isinstance(value, Mapping):
            return all(type(k) is str and self.fits(v, partial) for k, v in value.items())
        if isinstance(value, list | tuple):
            return all(self.fits(inner, partial) for inner in value)
        return value is None or isinstance(value, bool | int | float | str)

    def __str__(self) -> str:
        return "JSON data"


@dataclass(frozen=True)
class Anything(Form):
    """What is not compared here: the code that loads it does."""

    def fits(self, value: Any, partial: bool) -> bool:
        return True

    def __str__(self) -> str:
        return "anything"


@dataclass(frozen=True)
class Optional(Form):
    """What may be None."""

    form: Form

    def check(self, value: Any, path: str, partial: bool = False) -> None:
        if isinstance(value, list | tuple | Mapping):
            self.form.check(value, path, partial)
        else:
            super().check(value, path, partial)

    def fits(self, value: Any, partial: bool) -> bool:
        return value is None or self.form.fits(value, partial)

    def __str__(self) -> str:
        return f"{self.form}, or None"


@dataclass(frozen=True)
class Values(Form):
    """A tensor of a shape and a dtype; an axis of None has any length. Where `finite`, every entry has to be.

    Integers are from `low` to `high`.
    """

    shape: Sequence[int | None]
    dtype: str
    finite: bool = False
    low: int | None = None
    high: int | None = None

    @classmethod
    def like(cls, tensor: Tensor, finite: bool = False, dtype: torch.dtype | None = None) -> Values:
        """Return the form of a tensor, or of one that has another dtype."""
        return cls(tuple(tensor.shape), str(dtype or tensor.dtype).removeprefix("torch."), finite)

    def check(self, value: Any, path: str, partial: bool = False) -> None:
        super().check(value, path, partial)
        if self.finite and not _finite(value):
            raise StateProblem(
                path, "finite entries", f"{shown(value)} with an infinite entry or NaN"
            )
        if self.low is not None and value.numel() and not partial:
            least, most = int(value.min()), int(value.max())
            if least < self.low or (self.high is not None and most > self.high):
                expected = "entries" + _range(
                    self.low, math.inf if self.high is None else self.high
                )
                raise StateProblem(path, expected, f"{shown(value)} with entries {least} to {most}")

    def fits(self, value: Any, partial: bool) -> bool:
        from torch import Tensor

        if not isinstance(value, Tensor):
            return False
        same = len(value.shape) == len(self.shape) and all(
            want in (None, size) for want, size in zip(self.shape, value.shape, strict=True)
        )
        return same and str(value.dtype) == f"torch.{self.dtype}"

    def __str__(self) -> str:
        sizes = ", ".join("any" if size is None else str(size) for size in self.shape)
        return f"a tensor {self.dtype}[{sizes}]"


@dataclass(frozen=True)
class ListOf(Form):
    """A list, or a tuple, of entries of one form; of `length` entries where that is given."""

    form: Form
    length: int | None = None

    def check(self, value: Any, path: str, partial: bool = False) -> None:
        super().check(value, path, partial)
        for i, inner in enumerate(value):
            self.form.check(inner, f"{path}/{i}", partial)

    def fits(self, value: Any, partial: bool) -> bool:
        right = isinstance(value, list | tuple)
        return right and (self.length is None or len(value) == self.length)

    def __str__(self) -> str:
        return "a list" + (f" of {self.length}" if self.length is not None else "")


@dataclass(frozen=True)
class Record(Form):
    """A dict with string keys: all of `entries`, perhaps some of `optional`, and others if they are of form `more`."""

    entries: Mapping[str, Form] = field(default_factory=dict)
    optional: Mapping[str, Form] = field(default_factory=dict)
    more: Form | None = None

    def check(self, value: Any, path: str, partial: bool = False) -> None:
        super().check(value, path, partial)
        if not partial and (missing := [key for key in self.entries if key not in value]):
            raise StateProblem(_join(path, missing[0]), self.entries[missing[0]], "missing")
        for key, inner in value.items():
            form = self.entries.get(key) or self.optional.get(key) or self.more
            if form is not None:
                form.check(inner, _join(path, key), partial)
            elif not partial:
                known = ", ".join(f"`{name}`" for name in [*self.entries, *self.optional][:6])
                raise StateProblem(
                    _join(path, key), f"no such entry, but {known or 'none'}", "there"
                )

    def fits(self, value: Any, partial: bool) -> bool:
        return isinstance(value, Mapping) and all(type(key) is str for key in value)

    def __str__(self) -> str:
        return "a dict with text as keys"


@contextmanager
def reading(path: str, expected: object) -> Iterator[None]:
    """Turn what an unexpected value makes the block raise into a StateProblem; a plain ValueError gets the path."""
    try:
        yield
    except ValueError as error:
        if type(error) is not ValueError:  # it has a meaning of its own
            raise
        raise ValueError(f"the state's entry `{path}` cannot be used: {error}") from error
    except Exception as error:
        raise StateProblem(path, expected, f"damaged ({type(error).__name__}: {error})") from error


def shown(value: Any) -> str:
    """Return a value as a message shows it, in few words."""
    from torch import Tensor

    if isinstance(value, Tensor):
        return f"a tensor {str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dict of {len(value)}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    if value is None or isinstance(value, bool | int | float | str):
        text = repr(value)
        return text if len(text) < 60 else f"{text[:50]}..."
    return f"a {type(value).__name__}"


def _finite(value: Any) -> bool:
    import torch

    if not (value.is_floating_point() or value.is_complex()):
        return True
    own = value.to_local() if hasattr(value, "device_mesh") else value
    return bool(torch.isfinite(own.values() if own.is_sparse else own).all())


def _range(low: float, high: float) -> str:
    if high < math.inf:
        return f" from {low:g} to {high:g}" if low > -math.inf else f", at most {high:g}"
    return f", {low:g} or more" if low > -math.inf else ""


def _join(path: str, key: str) -> str:
    return f"{path}/{key}" if path else key
