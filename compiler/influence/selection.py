"""Which parameters and which examples a measurement is of, as a command line names them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from trainc.compiler.influence.recorded_run import RecordedRun
from trainc.compiler.influence.streamed import StreamedSamples
from trainc.compiler.model.inventory import Inventory
from trainc.compiler.model.select import expectations, select
from trainc.compiler.structure.roles import HEAD
from trainc.dsl.reading.field_types import SELECTOR
from trainc.dsl.values.selectors import Selector
from trainc.runtime.data.order import Data, Split

_ITEM = re.compile(r"(\d+)(?:\.\.(\d+))?")
_GLOB = re.compile(r"[\w.*?-]+")
TRAIN, EVALUATION = "train", "evaluation"


class Examples(NamedTuple):
    """Samples of a part of the data, by number: `part` is `train` or `evaluation`."""

    part: str
    split: Split
    ids: list[int]


def examples_of(text: str, data: Data) -> Examples:
    """Return the samples that a text such as `0..7`, `3,12,40..42` or `train:5` names; `..` includes both ends.

    Without `train:` they are held-out ones. Those of a stream are numbered as it gives them from its beginning. Raises
    ValueError where there are none of that number.
    """
    part, colon, numbers = text.rpartition(":")
    part = part.strip() if colon else EVALUATION
    if part not in (TRAIN, EVALUATION):
        raise ValueError(
            f"`{text}` names no samples: before `:` write `{EVALUATION}` or `{TRAIN}`, as in `{TRAIN}:0..7`"
        )
    split = data.train if part == TRAIN else data.evaluation
    if split is None:
        raise ValueError(
            f"`{text}`: the data has no samples to evaluate on. Write `{TRAIN}:` before"
        )
    known = split_of(split)
    found = _numbers(numbers, text)
    last = max(found)
    has = known.has(last) if isinstance(known, StreamedSamples) else last < len(known)
    if not has:
        raise ValueError(
            f"`{text}`: there is no sample {last}: the {part} data has samples 0 to {len(known) - 1}"
        )
    return Examples(part, known, found)


def training_samples(text: str | None, data: Data) -> list[int]:
    """Return the training samples that are compared: those that a text names, or all."""
    if text is None:
        if isinstance(data.train, StreamedSamples):
            raise ValueError(
                "the training samples are a stream, of which there may be any number: say which of them are compared,"
                " such as `--among 0..999`"
            )
        return examples_of(f"{TRAIN}:0..{max(len(split_of(data.train)) - 1, 0)}", data).ids
    found = examples_of(text if ":" in text else f"{TRAIN}:{text}", data)
    if found.part != TRAIN:
        raise ValueError(
            f"`{text}`: influence is that of training samples: leave `{found.part}:` out"
        )
    return found.ids


def split_of(part: object) -> Split:
    """Return a part of the data that can be read by number."""
    assert hasattr(part, "batch")
    return part  # type: ignore[return-value]


def _numbers(text: str, whole: str) -> list[int]:
    found: list[int] = []
    for item in text.split(","):
        if not (match := _ITEM.fullmatch(item.strip())):
            raise ValueError(
                f"`{whole}` names no samples: expected numbers and ranges, such as `0..7` or `3,12,40..42`"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(
                f"`{whole}`: `{item.strip()}` is empty, because it ends before it begins"
            )
        found += range(first, last + 1)
    return list(dict.fromkeys(found))


def parameters_of(
    run: RecordedRun, selector: str | None, last_layer: bool
) -> tuple[tuple[str, ...], Inventory]:
    """Return the names of the trained parameters whose gradients are compared, and the model's inventory.

    These are those of the layers with the role `head`, those that a selector matches, also as parameters of a module,
    or all. Raises ValueError where none of them was trained.
    """
    from trainc.compiler.model.inventory import build_inventory

    inventory = build_inventory(run.program.module)
    trained = set(run.load(max(run.checkpoints)))
    if last_layer:
        chosen = [p.name for p in inventory.parameters if HEAD in p.roles]
        if not chosen:
            raise ValueError(
                "the model has no layer with the role `head`, so it is not known which is the last: name it with"
                f' `--layers`, such as `--layers "{_end(inventory)}"`'
            )
        what = f"the last layer ({', '.join(f'`{name}`' for name in chosen)})"
    elif selector is None:
        chosen, what = [p.name for p in inventory.parameters], "the model"
    else:
        chosen, what = _matched(selector, inventory), f"`{selector}`"
        if not chosen:
            raise ValueError(
                f"`{selector}` matches no layer and no parameter of this {inventory.model}: its last parameters are"
                f" {', '.join(f'`{p.name}`' for p in inventory.parameters[-2:])}"
            )
    names = tuple(name for name in chosen if name in trained)
    if not names:
        some = [p.name for p in inventory.parameters if p.name in trained][-2:]
        raise ValueError(
            f"{what} was not trained in this run, so no step moved it by a gradient. Name layers that trained, such as"
            f' `--layers "{some[-1] if some else "**"}"`'
        )
    return names, inventory


def _matched(text: str, inventory: Inventory) -> list[str]:
    """Return the parameters that a selector matches, and those that the modules hold which it matches."""
    found = _selector(text)
    names: Sequence[str] = select(found, inventory, "parameters")
    modules = select(found, inventory, "modules")
    held = {n for m in modules for n in inventory.module[m].parameters}
    for expect, count in expectations(found, inventory, "parameters"):
        if expect.count != count:
            raise ValueError(
                f"`{text}`: the selector matches {count} parameters, not {expect.count}"
            )
    return [p.name for p in inventory.parameters if p.name in {*names, *held}]


def _selector(text: str) -> Selector:
    """Return the selector of a text, which may be a glob without quotes."""
    try:
        return SELECTOR.accept(text)  # type: ignore[no-any-return]
    except ValueError:
        if not _GLOB.fullmatch(text):
            raise
        return SELECTOR.accept(f'"{text}"')  # type: ignore[no-any-return]


def _end(inventory: Inventory) -> str:
    return inventory.parameters[-1].name.rpartition(".")[0] or inventory.parameters[-1].name
