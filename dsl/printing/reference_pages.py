"""Make the reference pages of constructs and rules, for `trainc explain` and docs/."""

from __future__ import annotations

from collections.abc import Iterable
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from trainc.dsl.reading.construct import KINDS, Catalog, Construct
from trainc.dsl.reading.construct_rules import rules_of
from trainc.dsl.reading.fields import field_type
from trainc.dsl.text.language_rules import RuleExplanation
from trainc.dsl.values.value import value_text

_PLAIN = {
    int: "whole number",
    float: "number",
    bool: "true or false",
    str: "name or string",
    NoneType: "none",
}
_BOUNDS = {"gt": "> {}", "ge": ">= {}", "lt": "< {}", "le": "<= {}"}
_INTRODUCTION = {
    "constructs": "# Constructs\n\nGenerated from compiler/constructs; do not edit.\n",
    "rules": "# Diagnostics\n\nGenerated from the rules in dsl/text and of the constructs; do not edit.\n",
}


def construct_page(cls: type[Construct], level: int = 1) -> str:
    """Return a construct's page as Markdown."""
    parts = [
        f"{'#' * level} {cls.heading()}",
        _docstring(cls),
        f"```train\n{cls.usage.strip()}\n```",
    ]
    parts += [_acts_on(cls), _interval(cls)]
    if rows := list(_fields(cls)):
        parts.append(
            "\n".join(["| field | type | default | meaning |", "| --- | --- | --- | --- |", *rows])
        )
    if cls.open_fields:
        parts.append("Any other field is passed to the callable by name.")
    if cls.signals:
        parts.append("Measures:\n\n" + "\n".join(_signals(cls)))
    if cls.effects:
        parts.append("In each step:\n\n" + "\n".join(map(_effect, cls.effects)))
    if cls.rules:
        own = (f"- `{rule}`: {about.what}" for rule, about in cls.rules.items())
        parts.append("Diagnostics of its own:\n\n" + "\n".join(own))
    if cls.identity:
        values = " or ".join(f"`{field} = {text}`" for field, text in cls.identity.items())
        parts.append(f"No effect and no cost with {values}.")
    if cls.division:
        parts.append(f"Depends on how a step is divided into micro-batches: {cls.division}.")
    if cls.without_gradient:
        parts.append(f"Leaves parameters without a gradient: {cls.without_gradient}.")
    if cls.cite:
        parts.append(f"Source: {cls.cite}.")
    return "\n\n".join(part for part in parts if part) + "\n"


def constructs_page(catalog: Catalog) -> str:
    """Return the reference of all constructs, by kind."""
    parts = [_INTRODUCTION["constructs"]]
    for kind in KINDS:
        found = [catalog[key] for key in catalog if key[0] == kind]
        if found:
            parts.append(f"## {kind}\n")
            parts += [construct_page(cls, level=3) for cls in found]
    return "\n".join(parts)


def rule_page(rule: str, about: RuleExplanation, level: int = 1) -> str:
    """Return a rule's entry as Markdown."""
    return f"{'#' * level} {rule}\n\n{about.what} {about.why}\n\n{about.fix}\n"


def rules_page(catalog: Catalog) -> str:
    """Return the reference of all rules, those of constructs too."""
    pages = (rule_page(rule, about, level=2) for rule, about in rules_of(catalog).items())
    return "\n".join([_INTRODUCTION["rules"], *pages])


def _docstring(cls: type[Construct]) -> str:
    from inspect import cleandoc

    return cleandoc(cls.__doc__ or "")


def _acts_on(cls: type[Construct]) -> str:
    if cls.targets == "none":
        return ""
    default = f"; without `on`: `on {cls.default_on}`" if cls.default_on else ""
    return f"Acts on {cls.targets}{default}."


def _interval(cls: type[Construct]) -> str:
    return f"Acts every {cls.default_every}; `every` changes that." if cls.default_every else ""


def _fields(cls: type[Construct]) -> Iterable[str]:
    for name, info in cls.model_fields.items():
        if name == "arguments" and cls.open_fields:
            continue
        shown = "the string" if name == "path" else f"`{name}`"
        cells = (shown, _type(info), _default(info), info.description or "")
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _type(info: FieldInfo) -> str:
    ours = field_type(info)
    text = ours.title if ours else _spelled(info.annotation)
    parts = (info.annotation, *get_args(info.annotation))
    if ours and ours not in info.metadata and any(get_origin(p) in (list, tuple) for p in parts):
        text = f"list of {text}"
    bounds = [
        shape.format(f"{value:g}")
        for m in info.metadata
        for key, shape in _BOUNDS.items()
        if isinstance(value := getattr(m, key, None), int | float)
    ]
    if ours and NoneType in get_args(info.annotation):
        text += " or none"
    return " ".join([text, ", ".join(bounds)]).strip()


def _spelled(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{arg}`" for arg in args)
    if origin in (Union, UnionType):
        return " or ".join(map(_spelled, args))
    if origin is Annotated:
        return _spelled(args[0])
    if origin in (list, tuple, dict, set):
        inner = " and ".join(dict.fromkeys(_spelled(arg) for arg in args if arg is not Ellipsis))
        return f"list of {inner}" if inner else "list"
    return _PLAIN.get(annotation, getattr(annotation, "__name__", str(annotation)).lower())


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True, validated_data={})
    if value is None or value == ():
        return "none"
    text = value if isinstance(value, str) else value_text(value)
    return f"`{text}`"


def _signals(cls: type[Construct]) -> Iterable[str]:
    for name, signal in cls.declared_signals().items():
        shown = f"`{name}`" if name else "under the name of the clause"
        yield f"- {shown}{f', in {signal.unit}' if signal.unit else ''}: {signal.description}"


def _effect(effect: Any) -> str:
    words = [f"- {effect.phase}: {effect.action}"]
    if effect.reads:
        words.append(f"reads {', '.join(effect.reads)}")
    if effect.writes:
        words.append(f"writes {', '.join(effect.writes)}")
    return "; ".join(words)
