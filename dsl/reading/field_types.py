"""Types of construct fields: how each is read from a node, text, JSON or a value."""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from trainc.dsl.syntax.ast import Ident, Items, Node, Num, Prefix, Str
from trainc.dsl.text.source import Source
from trainc.dsl.values import value_json as v

Reader = Callable[..., Any]


class FieldType:
    """A type of the language as a pydantic annotation."""

    def __init__(self, title: str, read: str, coerce: Callable[[Any], Any]) -> None:
        self.title = title
        self.coerce = coerce
        self._read = read

    def read(self, node: Node, *names: Any) -> Any:
        """Return what a node means as this type, or raise Unreadable."""
        from trainc.dsl.reading import constants as read
        from trainc.dsl.reading import expressions, selectors

        if self._read in ("schedule", "condition", "expression", "batch"):
            return getattr(expressions, self._read)(node, *names)
        home = selectors if self._read in ("selector", "scoped_numbers") else read
        return getattr(home, self._read)(node)

    def accept(self, raw: Any) -> Any:
        """Return a value of this type from a value, its JSON form, or text in the language."""
        if isinstance(raw, str):
            raw = self._from_text(raw)
        elif isinstance(raw, list):
            raw = v.from_json(raw) if raw and isinstance(raw[0], str) else [*map(_item, raw)]
        return self.coerce(raw)

    def _from_text(self, text: str) -> Any:
        from trainc.dsl.reading.constants import Unreadable
        from trainc.dsl.syntax.parser import parse_expression

        if self is IMPORT_PATH and '"' not in text:
            return self.read(Str(text))
        node, found = parse_expression(Source("<text>", text))
        if node is None:
            detail = found[0].labels[0].text if found and found[0].labels else ""
            raise ValueError(
                f"`{text}`: {found[0].message if found else 'empty'}; {detail}".rstrip("; ")
            )
        try:
            return self.read(node)
        except Unreadable as error:
            raise ValueError(f"`{text}`: {error.message or error.text}") from None

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self.accept, serialization=core_schema.plain_serializer_function_ser_schema(v.to_json)
        )


def _item(raw: Any) -> Any:
    return v.from_json(raw) if isinstance(raw, list) else raw


def _wrong_unit(text: str) -> PydanticCustomError:
    return PydanticCustomError("wrong_unit", "{text}", {"text": text})


def _duration(raw: Any) -> v.Duration:
    if isinstance(raw, v.Quantity):
        raw = raw.duration
    if isinstance(raw, v.Duration):
        if raw.amount < 0:
            raise ValueError("a duration is not negative")
        return raw
    if isinstance(raw, int | float):
        raise _wrong_unit("expected a duration such as `200 steps`, found a bare number")
    raise ValueError("expected a duration such as `200 steps`")


def _range(raw: Any) -> v.Range:
    if isinstance(raw, tuple) and len(raw) == 2:
        return v.Range(*raw)
    if isinstance(raw, v.Range):
        return raw
    raise ValueError("expected a range such as `0.5..1.5`")


def _import_path(raw: Any) -> v.ImportPath:
    if isinstance(raw, v.ImportPath):
        return raw
    raise ValueError('expected "module:name"')


def _number(raw: Any) -> float:
    if isinstance(raw, v.Duration) and raw.unit == "run":
        return raw.amount
    if isinstance(raw, bool) or not isinstance(raw, int | float):
        raise ValueError("expected a number")
    return v.tidy(raw)


def _fraction(raw: Any) -> float:
    value = _number(raw)
    if not 0 <= value <= 1:
        raise ValueError("expected a fraction between 0 and 1, or a percentage")
    return float(value)


def _expression(raw: Any) -> v.Expr:
    if isinstance(raw, v.Duration):
        return v.Quantity(raw)
    if isinstance(raw, int | float) and not isinstance(raw, bool):
        return v.Number(raw)
    if isinstance(raw, v.Expr):
        return raw
    raise ValueError("expected a number or an expression")


def _schedule(raw: Any) -> v.Expr:
    value = _expression(raw)
    if isinstance(value, v.Quantity):
        return v.Number(_number(value.duration))
    return value


def _batch(raw: Any) -> v.Duration | v.Call:
    from trainc.dsl.values.functions import POLICIES

    if isinstance(raw, v.Call):
        if raw.function not in POLICIES:
            raise ValueError(f"there is no batch policy `{raw.function}`")
        return raw
    return _duration(raw)


def _selector(raw: Any) -> v.Selector:
    if isinstance(raw, v.Selector):
        return raw
    raise ValueError('expected a selector such as "blocks.*" or `type(Linear)`')


def _scoped_numbers(raw: Any) -> tuple[v.Scoped, ...]:
    items = raw if isinstance(raw, list | tuple) else (raw,)
    return tuple(x if isinstance(x, v.Scoped) else v.Scoped(_number(x)) for x in items)


DURATION = FieldType("duration", "duration", _duration)
SAMPLES = FieldType("duration", "samples", _duration)
RANGE = FieldType("range", "interval", _range)
IMPORT_PATH = FieldType("import path", "import_path", _import_path)
FRACTION = FieldType("fraction", "number", _fraction)
EXPRESSION = FieldType("expression", "expression", _expression)
CONDITION = FieldType("condition", "condition", _expression)
SCHEDULE = FieldType("schedule", "schedule", _schedule)
BATCH = FieldType("samples, or a batch policy", "batch", _batch)
SELECTOR = FieldType("selector", "selector", _selector)
SCOPED_NUMBERS = FieldType("number, or number `on` selector", "scoped_numbers", _scoped_numbers)

Fraction = Annotated[float, FRACTION]
Schedule = Annotated[v.Expr, SCHEDULE]
Samples = Annotated[v.Duration, SAMPLES]
Batch = Annotated[v.Duration | v.Call, BATCH]
Selector = Annotated[v.Selector, SELECTOR]
ScopedNumbers = Annotated[tuple[v.Scoped, ...], SCOPED_NUMBERS]

_CLASSES: dict[Any, FieldType] = {
    v.Duration: DURATION,
    v.Range: RANGE,
    v.ImportPath: IMPORT_PATH,
}


def schema_of(cls: type[v.Value]) -> CoreSchema:
    """Return the pydantic schema of a value class that is used as a field's annotation."""
    if cls not in _CLASSES:
        raise TypeError(f"`{cls.__name__}` is no field type; see trainc.dsl.reading.construct")
    return _CLASSES[cls].__get_pydantic_core_schema__(cls, None)


def field_type(info: FieldInfo) -> FieldType | None:
    """Return the language's type of a field, or None where it is a plain Python type."""
    return next(iter(_types(info.annotation, info.metadata)), None)


def _types(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> list[FieldType]:
    marked = [m for m in metadata if isinstance(m, FieldType)]
    if marked:
        return marked
    if annotation in _CLASSES:
        return [_CLASSES[annotation]]
    if get_origin(annotation) is Annotated:
        base, *rest = get_args(annotation)
        return _types(base, rest)
    return [found for part in get_args(annotation) for found in _types(part)]


def read_field(info: FieldInfo, value: Node | str, names: Any = None) -> Any:
    """Return what a node or text means as a value of a field; raise Unreadable or ValueError."""
    if isinstance(value, str):
        from trainc.dsl.syntax.parser import parse_expression

        node, found = parse_expression(Source("<text>", value))
        if node is None:
            raise ValueError(found[0].message)
        value = node
    from trainc.dsl.reading.expressions import ANYTHING

    return _read(info.annotation, info.metadata, value, names or ANYTHING)


def _read(annotation: Any, metadata: Any, node: Node, names: Any) -> Any:
    kind = next(
        (m for m in metadata if isinstance(m, FieldType)), _CLASSES.get(_hashable(annotation))
    )
    if kind:
        return kind.read(node, names)
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _read(args[0], args[1:], node, names)
    if origin in (Union, UnionType):
        if NoneType in args and isinstance(node, Ident) and node.id == "none":
            return None
        ours = [arg for arg in args if _types(arg)]
        simple = isinstance(node, Num | Prefix | Str | Ident) and len(ours) + (
            NoneType in args
        ) < len(args)
        return _plain(args, node, names) if simple or not ours else _read(ours[0], (), node, names)
    if origin in (list, tuple) and isinstance(node, Items) and _types(annotation):
        return [_read(args[0], (), item, names) for item in node.items]
    return _plain((annotation,), node, names)


def _plain(allowed: tuple[Any, ...], node: Node, names: Any) -> Any:
    """Return a plain value, refusing what pydantic would turn into another type."""
    from trainc.dsl.reading.constants import Unreadable, describe, plain
    from trainc.dsl.text.nearest import suggest

    value = plain(node)
    kinds = set(allowed) - {NoneType}
    wrong = (
        (isinstance(value, str) and kinds <= {int, float, bool})
        or (isinstance(value, bool) and kinds <= {int, float})
        or (not isinstance(value, bool | str) and kinds == {bool})
    )
    if wrong:
        wanted = "`true` or `false`" if kinds == {bool} else "a number"
        help = suggest(node.id, getattr(names, "lets", ())) if isinstance(node, Ident) else None
        raise Unreadable(node, f"expected {wanted}, found {describe(node)}", help=help)
    return value


def _hashable(annotation: Any) -> Any:
    return annotation if isinstance(annotation, type) else None
