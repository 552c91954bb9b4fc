"""Frozen values with named fields.

What frozen dataclasses are, without code that is generated when they are imported: the front end has some
sixty such classes, and as dataclasses they would make every `trainc check` a sixth longer (20 ms of 120).
"""

from __future__ import annotations

from typing import Any, ClassVar, Self, dataclass_transform

_REQUIRED: Any = object()


class Uncompared:
    """The default of a field that `uncompared` declares."""

    def __init__(self, default: Any) -> None:
        self.default = default


def uncompared(*, default: Any, kw_only: bool = True) -> Any:
    """Declare a field that is given by name and left out of equality, hash and repr, such as a span."""
    return Uncompared(default)


@dataclass_transform(frozen_default=True, field_specifiers=(uncompared,))
class Record:
    """A frozen value: equal, hashed and printed by its fields, which are its annotations."""

    _fields: ClassVar[tuple[str, ...]] = ()
    _uncompared: ClassVar[dict[str, Any]] = {}
    _defaults: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls) -> None:
        fields, uncompared, defaults = list(cls._fields), dict(cls._uncompared), dict(cls._defaults)
        for name, annotation in vars(cls).get("__annotations__", {}).items():
            if str(annotation).startswith("ClassVar"):
                continue
            default = vars(cls).get(name, _REQUIRED)
            if isinstance(default, Uncompared):
                uncompared[name] = default.default
                delattr(cls, name)
                continue
            fields.append(name)
            if default is not _REQUIRED:
                defaults[name] = default
        cls._fields, cls._uncompared, cls._defaults = tuple(fields), uncompared, defaults
        type.__setattr__(cls, "__match_args__", cls._fields)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = {
            **self._defaults,
            **self._uncompared,
            **dict(zip(self._fields, args, strict=False)),
        }
        if kwargs:
            given.update(kwargs)
        if len(given) != len(self._fields) + len(self._uncompared) or len(args) > len(self._fields):
            raise TypeError(f"{type(self).__name__} takes {', '.join(self._fields)}")
        self.__dict__.update(given)
        self.__post_init__()

    def __post_init__(self) -> None:
        """Check or normalise the fields."""

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen")

    def _key(self) -> tuple[Any, ...]:
        return tuple(self.__dict__[name] for name in self._fields)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self._key() == other._key()

    def __hash__(self) -> int:
        return hash((type(self), self._key()))

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={self.__dict__[name]!r}" for name in self._fields)
        return f"{type(self).__name__}({shown})"

    def _set(self, name: str, value: Any) -> None:
        """Set a field while the value is being made."""
        self.__dict__[name] = value

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed."""
        return type(self)(
            **{**{n: self.__dict__[n] for n in (*self._fields, *self._uncompared)}, **changes}
        )
