"""What `trainc influence` found, as tables, as JSON and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from trainc.compiler.influence.recorded_run import RecordedRun
from trainc.compiler.influence.selection import Examples, split_of
from trainc.compiler.influence.shown_examples import picture, text_of
from trainc.compiler.influence.tracin import Influence
from trainc.runtime.data.batch import Batch
from trainc.runtime.data.order import read_batch_at
from trainc.runtime.report.number_text import format_loss, format_number

WIDE = 120


@dataclass(frozen=True)
class Report:
    """The influence of training samples on others, or on themselves where there are no others."""

    run: RecordedRun
    names: Sequence[str]
    train: Sequence[int]
    others: Examples | None
    found: Influence
    top: int

    @cached_property
    def console(self) -> Console:
        """The console that tables are printed on."""
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = max(console.width, WIDE)
        return console

    def to_json(self) -> dict[str, Any]:
        """Return all scores, with the samples, checkpoints and parameters they are of; None where one is not finite."""
        found = self.found
        told: dict[str, Any] = {
            "run": str(self.run.folder),
            "parameters": [*self.names],
            "checkpoints": [
                {"step": step, "rates": [*rates]}
                for step, rates in zip(found.steps, found.rates, strict=True)
            ],
            "train": [*self.train],
            "self_influence": _numbers(found.own),
            "train_losses": _numbers(found.train_losses),
        }
        if self.others is not None:
            told["on"] = {
                "part": self.others.part,
                "samples": self.others.ids,
                "losses": _numbers(found.losses),
                "influence": [_numbers(row) for row in found.scores],
                "proponents": [self._ids(self._best(row)) for row in found.scores],
                "opponents": [self._ids(self._best(-row)) for row in found.scores],
            }
        return told

    def show(self) -> None:
        """Print a table for each sample, or one of the largest self-influences."""
        found = self.found
        spans = [f"step {s} at {_span(r)}" for s, r in zip(found.steps, found.rates, strict=True)]
        self._say(f"{self.run.folder}: {len(found.steps)} checkpoints ({', '.join(spans)})")
        if found.skipped:
            many = "s" * (len(found.skipped) > 1)
            steps = ", ".join(map(str, found.skipped))
            self._say(f"left out, as no rate was above 0 in the step before: step{many} {steps}")
        self._say(
            f"gradients of {len(self.names)} parameter{'s' * (len(self.names) > 1)}: {_some(self.names)}"
        )
        if self.others is None:
            self.console.print()
            self._say("training samples with the largest influence on themselves")
            self._table(found.own, self._best(found.own), "number")
            return
        for place, sample in enumerate(self.others.ids):
            self.console.print()
            loss = format_loss(float(found.losses[place]))
            said = self._text(self.others.split, sample)
            self._say(f"{self.others.part} sample {sample}: loss {loss}; {said}")
            row = found.scores[place]
            for title, order in (("proponents", self._best(row)), ("opponents", self._best(-row))):
                if order:
                    self._table(row, order, title)
                else:
                    self._say(f"no {title}")

    def _table(self, scores: Tensor, order: Sequence[int], title: str) -> None:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column(title)
        for head in ("influence", "loss"):
            table.add_column(head, justify="right")
        table.add_column("sample", overflow="fold")
        for place in order:
            sample = self.train[place]
            table.add_row(
                f"train {sample}",
                format_number(float(scores[place])),
                format_loss(float(self.found.train_losses[place])),
                Text(self._text(split_of(self.run.data.train), sample)),
            )
        self.console.print(table)

    def _best(self, scores: Tensor) -> list[int]:
        """Return the places of the largest positive scores, the first of equal ones first."""
        order = torch.sort(scores, descending=True, stable=True).indices.tolist()
        return [place for place in order[: self.top] if scores[place] > 0]

    def _ids(self, places: Sequence[int]) -> list[int]:
        return [self.train[place] for place in places]

    def draw(self, path: Path) -> Path:
        """Draw the samples that are images in rows; raises ValueError where they are none."""
        from trainc.cli.example_grid import DrawnExample, draw_examples

        train = split_of(self.run.data.train)

        def drawn(split: Any, sample: int, title: str, color: str = "none") -> DrawnExample:
            batch = _read(self.run, split, sample)
            target = text_of(batch, None)
            return DrawnExample(_pixels(batch).numpy(), f"{title}\n{target}", color)

        def row(scores: Tensor, order: Sequence[int], color: str) -> list[DrawnExample]:
            return [
                drawn(
                    train,
                    self.train[i],
                    f"train {self.train[i]}: {format_number(float(scores[i]))}",
                    color,
                )
                for i in order
            ]

        if self.others is None:
            own = self.found.own
            caption = "training samples with their influence on themselves"
            return draw_examples([row(own, self._best(own), "none")], path, caption)
        rows = []
        for place, sample in enumerate(self.others.ids):
            scores = self.found.scores[place]
            first = drawn(self.others.split, sample, f"{self.others.part} {sample}")
            best, worst = self._best(scores), self._best(-scores)
            rows.append([first, *row(scores, best, "tab:green"), *row(scores, worst, "tab:red")])
        caption = (
            f"{self.others.part} samples, and training samples with their influence on each: proponents framed green,"
            " opponents red"
        )
        return draw_examples(rows, path, caption)

    def _text(self, split: Any, sample: int) -> str:
        batch = _read(self.run, split, sample)
        return text_of(batch, getattr(self.run.data, "decode", None))

    def _say(self, line: str) -> None:
        self.console.print(Text(line), soft_wrap=True)


def require_images(run: RecordedRun, train: Sequence[int], others: Examples | None) -> None:
    """Raise ValueError unless the first of the samples that would be drawn are images."""
    _pixels(_read(run, split_of(run.data.train), train[0]))
    if others is not None:
        _pixels(_read(run, others.split, others.ids[0]))


def _read(run: RecordedRun, split: Any, sample: int) -> Batch:
    batch = read_batch_at(split, [sample], run.program.settings.seed, 0)
    return run.program.execution.losses.batch(batch)


def _pixels(batch: Batch) -> Tensor:
    """Return the input of one example as a picture; raises ValueError where it is none."""
    pixels = picture(batch[0])
    if pixels is None:
        raise ValueError(
            "--plot draws samples whose inputs are images, (channels, height, width) with 1 or 3 channels: these are"
            " not, so leave --plot out; the tables show them as text"
        )
    return pixels


def _span(rates: tuple[float, float]) -> str:
    low, high = rates
    return f"rate {high:.3g}" if low == high else f"rates {low:.3g} to {high:.3g}"


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:4], *(["..."] if len(names) > 4 else [])])


def _numbers(values: Tensor) -> list[float | None]:
    """Return numbers as JSON has them: None for a loss of no target, and for what overflowed."""
    return [x if math.isfinite(x) else None for x in values.tolist()]
