"""What a checkpoint keeps of the plan that made it, and how another plan differs from it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from trainc.compiler.catalog import catalog
from trainc.compiler.plan.plan import FORMAT, Plan, Row
from trainc.dsl.text.vocabulary import VERBS
from trainc.dsl.values.value_json import expr_from_json, from_json, selector_from_json
from trainc.runtime.schedule.time_span import TimeSpan
from trainc.runtime.storage.differences import Difference, samples_differ, tokens_differ
from trainc.runtime.storage.form import StateProblem

# Fields that decide what is looked at and kept, and no number of the training beyond its rounding on a device.
_SAFE = {
    "run": {"eval", "eval_batches", "checkpoint", "keep", "device", "log"},
    "data": {"workers"},
}
_HASHED = ("format", "model", "signature", "clauses", "rules", "units")
_TIMES = {"start": "from", "stop": "until", "every": "every"}


def identity_of(plan: Plan) -> Row:
    """Return what is compared when a checkpoint of this plan's program is loaded, as plain JSON data."""
    content = {
        "format": plan.format,
        "plan": plan.hash,
        "fingerprint": plan.fingerprint,
        "model": plan.model["type"],
        "signature": plan.model["signature"],
        "clauses": plan.clauses,
        "rules": plan.spec["rules"],
        "units": plan.settings["units"],
    }
    plain: Row = json.loads(json.dumps(content))
    return plain


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Return every difference between two identities; none where the plans do the same.

    Plans of equal clauses may still differ in what runs them, such as kernels of another device.
    """
    if before["plan"] == now["plan"]:
        for name in (name for name in _HASHED if before[name] != now[name]):
            expected = "what the plan of the same hash has"
            raise StateProblem(f"made_by/{name}", expected, "another one")
        return []
    if before["format"] != FORMAT:
        text = (
            f"the plan in the checkpoint has format {before['format']}, but this version of trainc reads format"
            f" {FORMAT}: resume with the version of trainc that wrote it, or start a new run in another folder"
        )
        return [Difference(text, "impossible")]
    if before["model"] != now["model"]:
        found = [Difference(f"the model was a {before['model']} and is a {now['model']}")]
    else:
        found = []
    return [
        *found,
        *_parameters(before["signature"], now["signature"]),
        *_clauses(before["clauses"], now["clauses"]),
        *_rules(before["rules"], now["rules"]),
        *_units(before["units"], now["units"]),
    ]


def batch_is_stale(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return why the batch of a state is out of date, "" where the spec has another one; None where it is not."""
    old, new = (
        [c["fields"].get("batch") for c in identity["clauses"] if c["kind"] == "data"]
        for identity in (before, now)
    )
    if old != new:
        return ""
    acts = ([act for rule in one["rules"] for act in rule["actions"]] for one in (before, now))
    was, is_now = (any(act[:2] == ["assign", "batch"] for act in found) for found in acts)
    return "no rule sets it" if was and not is_now else None


def _parameters(before: list[Any], now: list[Any]) -> Iterator[Difference]:
    """Yield the parameters that the model no longer has, did not have, or has in another form."""
    old, new = ({name: (tuple(shape), dtype) for name, shape, dtype in s} for s in (before, now))
    for name in [*old, *(n for n in new if n not in old)]:
        if old.get(name) != new.get(name):
            was, is_now = (_form(form.get(name)) for form in (old, new))
            text = f"the model's parameter `{name}` was {was} and is {is_now}"
            yield Difference(text, "impossible")


def _form(form: tuple[tuple[int, ...], str] | None) -> str:
    return "not there" if form is None else f"{form[1]}{list(form[0])}"


def _clauses(before: list[Any], now: list[Any]) -> Iterator[Difference]:
    old, new = ({c["label"]: c for c in clauses if not _joins(c)} for clauses in (before, now))
    yield from _joining(*([c for c in clauses if _joins(c)] for clauses in (before, now)))
    for label in sorted(old.keys() | new.keys()):
        if label not in new:
            yield Difference(f"`{label}` was removed")
        elif label not in old:
            yield Difference(f"`{label}` was added")
        elif _title(old[label]) != _title(new[label]):
            yield Difference(f"`{label}` was `{_title(old[label])}` and is `{_title(new[label])}`")
        else:
            yield from _fields(label, old[label], new[label])


def _joins(clause: Mapping[str, Any]) -> bool:
    """Say whether a clause only says how processes train together, which changes no number beyond its rounding."""
    known = catalog().get((clause["kind"], clause["construct"]))
    return known is not None and known.joins not in ("no", "apart")


def _joining(before: list[Any], now: list[Any]) -> Iterator[Difference]:
    if before != now:
        was, is_now = (
            ", ".join(f"`{_title(c)}`" for c in one) or "not said" for one in (before, now)
        )
        text = f"how processes train together was {was} and is {is_now}"
        if was == is_now:
            text = f"the fields of {was} were changed"
        yield Difference(f"{text}: numbers differ by rounding", "safe")


def _title(clause: Mapping[str, Any]) -> str:
    return f"{clause['kind']} {clause['construct']}"


def _fields(label: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Difference]:
    known = catalog().get((before["kind"], before["construct"]))
    safe = _SAFE.get(before["kind"], set()) | set(() if known is None else known.harmless)
    for name in sorted(before["fields"].keys() | now["fields"].keys()):
        a, b = before["fields"].get(name), now["fields"].get(name)
        if a != b:
            text = f"`{label}.{name}` was {_written(a)} and is {_written(b)}"
            yield Difference(text, "safe" if name in safe else "needs --accept")
    if before["targets"] != now["targets"]:
        gone = [n for n in before["targets"] if n not in set(now["targets"])]
        new = [n for n in now["targets"] if n not in set(before["targets"])]
        changes = [
            f"{word} {_names(names)}" for word, names in (("without", gone), ("with", new)) if names
        ]
        yield Difference(f"`on` of `{label}` was changed: {', '.join(changes) or 'another order'}")
    for name, word in _TIMES.items():
        if before[name] != now[name]:
            text = f"`{word}` of `{label}` was {_span(before[name])} and is {_span(now[name])}"
            yield Difference(text)
    if before["dropped"] != now["dropped"]:
        was, is_now = (
            f"left out ({c['dropped']})" if c["dropped"] else "used" for c in (before, now)
        )
        yield Difference(f"`{label}` was {was} and is {is_now}")


def _names(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"`{name}`" for name in names[:3]) + more


def _rules(before: list[Any], now: list[Any]) -> Iterator[Difference]:
    """Yield the rules that are not in both; the state of a rule goes by its number."""
    old, new = [_rule(rule) for rule in before], [_rule(rule) for rule in now]
    yield from (Difference(f"the rule `{text}` was removed") for text in old if text not in new)
    yield from (Difference(f"the rule `{text}` was added") for text in new if text not in old)
    if old != new and sorted(old) == sorted(new):
        yield Difference("the `when` rules have another order")


def _rule(rule: Mapping[str, Any]) -> str:
    """Return a rule as a spec has it."""
    words = [f"when {expr_from_json(rule['condition'])}"]
    words += [f"{word} {_written(rule[word])}" for word in ("for", "cooldown") if rule.get(word)]
    acts = [_act(*action) for action in rule["actions"]]
    return " ".join([*words, "{", "; ".join(acts), "}"])


def _act(tag: str, target: str, value: Any) -> str:
    if tag == "assign":
        return f"{target} = {expr_from_json(value)}"
    if value is None:
        return target
    if isinstance(value, list):
        return f"{target} {selector_from_json(value)}"
    return f"{target} {json.dumps(value) if VERBS.get(target) == 'text' else value}"


def _units(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Difference]:
    yield from samples_differ(before["samples_per_epoch"], now["samples_per_epoch"])
    yield from tokens_differ(before["tokens_per_sample"], now["tokens_per_sample"])


def _span(data: Any) -> str:
    return "not given" if data is None else str(TimeSpan.from_json(data))


def _written(field: Any) -> str:
    """Return a field of a plan in the notation of a spec."""
    if isinstance(field, list):
        try:
            return str(from_json(field))
        except (ValueError, TypeError, LookupError):
            return "[" + ", ".join(map(_written, field)) + "]"
    if field is None:
        return "not given"
    if isinstance(field, float):
        return f"{field:.12g}"
    return str(field).lower() if isinstance(field, bool) else str(field)
