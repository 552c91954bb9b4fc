"""Read a construct's field as its annotation says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from trainc.dsl.reading.constants import Unreadable, describe, plain_value, unquoted
from trainc.dsl.reading.expressions import ANY_NAME, Names
from trainc.dsl.reading.field_types import FieldType, node_of
from trainc.dsl.syntax.ast import Ident, Items, Node, Num, Prefix, Str
from trainc.dsl.text.nearest import suggest
from trainc.dsl.text.vocabulary import BOOLEANS
from trainc.dsl.values.value import Value


def field_type(info: FieldInfo) -> FieldType | None:
    """Return the language's type of a field, or None where it is a plain Python type."""
    return next(iter(_types(info.annotation, info.metadata)), None)


def scheduled_fields(fields: Mapping[str, FieldInfo]) -> list[str]:
    """Return those of a construct's fields that are schedules, of one number."""
    types = {name: field_type(info) for name, info in fields.items()}
    return [name for name, own in types.items() if own is not None and own.scheduled]


def untyped_value(annotation: Any, metadata: Iterable[Any] = ()) -> type[Value] | None:
    """Return a value class that an annotation uses without the FieldType that reads it, or None."""
    if any(isinstance(m, FieldType) for m in metadata):
        return None
    if isinstance(annotation, type) and issubclass(annotation, Value):
        return annotation
    base, *rest = get_args(annotation) if get_origin(annotation) is Annotated else (None,)
    parts = ((base, rest),) if base else ((part, ()) for part in get_args(annotation))
    return next((found for part in parts if (found := untyped_value(*part))), None)


def _types(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> list[FieldType]:
    marked = [m for m in metadata if isinstance(m, FieldType)]
    if marked:
        return marked
    if get_origin(annotation) is Annotated:
        base, *rest = get_args(annotation)
        return _types(base, rest)
    return [found for part in get_args(annotation) for found in _types(part)]


def read_field(info: FieldInfo, value: Node | str, names: Names = ANY_NAME) -> Any:
    """Return the value of a node or a text for a field; raise Unreadable or ValueError."""
    node = node_of(value) if isinstance(value, str) else value
    return _read(info.annotation, info.metadata, node, names)


def _read(annotation: Any, metadata: Any, node: Node, names: Names) -> Any:
    ours = next((m for m in metadata if isinstance(m, FieldType)), None)
    if ours:
        return ours.read(node, names)
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _read(args[0], args[1:], node, names)
    if origin in (Union, UnionType):
        if NoneType in args and isinstance(node, Ident) and node.id in ("none", "None"):
            if node.id == "None":
                raise unquoted(node)
            return None
        typed = [arg for arg in args if _types(arg)]
        simple = isinstance(node, Num | Prefix | Str | Ident) and len(typed) + (
            NoneType in args
        ) < len(args)
        if simple or not typed:
            return _plain(args, node, names)
        return _read(typed[0], (), node, names)
    if origin in (list, tuple) and isinstance(node, Items) and _types(annotation):
        return [_read(args[0], (), item, names) for item in node.items]
    return _plain((annotation,), node, names)


def _plain(allowed: tuple[Any, ...], node: Node, names: Names) -> Any:
    """Return a plain value; raise Unreadable where pydantic would silently convert it to another type."""
    kinds = set(allowed) - {NoneType}
    words = {word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)}
    if str in kinds and isinstance(node, Ident) and node.id not in (*BOOLEANS, *words):
        raise unquoted(node)
    if bool in kinds and isinstance(node, Ident) and node.id in ("True", "False"):
        raise unquoted(node)
    value = plain_value(node, words=True)
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
