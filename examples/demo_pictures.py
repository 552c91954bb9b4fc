"""The demo's pictures: runs with and without methods in one frame."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, linear_regression
from typing import TYPE_CHECKING, Protocol

from trainc.compiler.constructs.observe.weights._laws import LAWS
from trainc.runtime.report.plots import COLORS, STYLE, smooth
from trainc.runtime.storage.jsonl import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WITH, WITHOUT = "with", "without"


class Drawable(Protocol):
    """What is drawn of a run: its records."""

    @property
    def records(self) -> list[Record]:
        """Return what was measured, step by step."""


Pair = Mapping[str, Drawable]


def draw(found: Pair, out: Path) -> Path:
    """Draw the runs of the first half and return the file; needs matplotlib."""
    panels = [panel for panel in PANELS if has(found[WITH].records, panel.needs)]
    with picture(out / "pretrain.png", len(panels)) as places:
        for axes, panel in zip(places, panels, strict=True):
            panel.fill(axes, found)
            axes.set_title(panel.title)
            axes.set_xlabel("thousand tokens")
            axes.margins(x=0.01)
            if axes.get_legend() is None:
                axes.legend()
    return out / "pretrain.png"


def draw_adaptation(found: Mapping[str, Sequence[Drawable]], out: Path) -> Path:
    """Draw the runs of the second half, of every seed, and return the file; needs matplotlib."""
    file = out / "digits_adapt.png"
    with picture(file, 2) as (left, right):
        ends = {
            what: [100 * values(run.records, "eval_accuracy")[-1] for run in runs]
            for what, runs in found.items()
        }
        for plain, ours in zip(ends[WITHOUT], ends[WITH], strict=True):
            left.plot([0, 1], [plain, ours], "o-", color="#999999", linewidth=1, markersize=4)
        means = [fmean(ends[WITHOUT]), fmean(ends[WITH])]
        left.plot([0, 1], means, "o-", color=COLORS[0], linewidth=2.2, label="mean over seeds")
        left.set_xticks([0, 1], ["without methods", "with methods"])
        left.set_xlim(-0.3, 1.3)
        left.set_ylabel("accuracy on held-out images, %")
        left.set_title("Each seed, without and with")
        left.legend()
        for (what, runs), color in zip(found.items(), COLORS, strict=False):
            for run in runs:
                steps = values([r for r in run.records if "eval_loss" in r], "step")
                label = f"{what} methods" if run is runs[0] else None
                loss = values(run.records, "eval_loss")
                right.plot(steps, loss, "o-", color=color, alpha=0.7, markersize=3, label=label)
        right.set_title("Evaluation loss, each seed")
        right.set_xlabel("step")
        right.set_ylabel("cross entropy, nats")
        right.legend()
    return file


@contextmanager
def picture(file: Path, count: int) -> Iterator[list["Axes"]]:
    """Give panels, two in a row, and write them to a file at the end."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(STYLE):  # type: ignore[arg-type, unused-ignore]
        rows = -(-count // 2)
        size = (5.6 * min(2, count), 3.4 * rows)
        figure = Figure(figsize=size, layout="constrained", dpi=150)
        FigureCanvasAgg(figure)
        yield [figure.add_subplot(rows, 2, index + 1) for index in range(count)]
        figure.savefig(file, format="png", facecolor="white")


@dataclass(frozen=True, slots=True)
class Panel:
    """A part of a picture; drawn where the run with methods measured `needs`."""

    title: str
    needs: str
    fill: Callable[["Axes", Pair], None]


def over_tokens(records: Sequence[Record], name: str) -> tuple[list[float], list[float]]:
    """Return thousands of tokens and the values of one quantity."""
    at = {record["step"]: record["tokens"] / 1000 for record in records if "tokens" in record}
    found = [(at[record["step"]], record[name]) for record in records if name in record]
    return [x for x, _ in found], [y for _, y in found]


def draw_losses(axes: "Axes", found: Pair) -> None:
    """Draw training losses, smoothed, and evaluation losses of the runs."""
    for (what, one), color in zip(found.items(), COLORS, strict=False):
        records = one.records
        x, y = over_tokens(records, "data_loss" if has(records, "data_loss") else "loss")
        axes.plot(x, smooth(y, len(y) // 25), color=color, alpha=0.5, linewidth=1)
        x, y = over_tokens(records, "eval_loss")
        label = f"{what} methods"
        axes.plot(x, y, "o-", color=color, markersize=4, linewidth=1.6, label=label)
    axes.plot([], [], color="#999999", linewidth=1, label="training, running mean")
    axes.plot([], [], "o-", color="#555555", markersize=4, label="evaluation")
    # The fall of the first steps would flatten all that follows.
    late = [value for one in found.values() for value in over_tokens(one.records, "eval_loss")[1]]
    axes.set_ylim(top=max(axes.get_ylim()[0] + 1e-3, max(late) + 0.75 * (max(late) - min(late))))
    axes.set_ylabel("cross entropy, nats per byte")


def draw_scale(axes: "Axes", found: Pair) -> None:
    """Draw the noise scale with its standard error, and the batch."""
    records = [record for record in found[WITH].records if "gns" in record]
    x, scale = over_tokens(records, "gns")
    errors = [record["gns.error"] for record in records]
    batch = [record["batch"] for record in records]
    low = [max(s - e, 0.1) for s, e in zip(scale, errors, strict=True)]
    high = [s + e for s, e in zip(scale, errors, strict=True)]
    axes.fill_between(x, low, high, color=COLORS[0], alpha=0.15, linewidth=0)
    axes.plot(x, scale, color=COLORS[0], linewidth=1.4, label="noise scale ± standard error")
    axes.step(x, batch, where="post", color=COLORS[1], linewidth=1.8, label="batch")
    axes.set_yscale("log")
    axes.set_ylim(bottom=max(0.1, min(scale) / 2))
    axes.set_ylabel("samples")


def draw_factors(axes: "Axes", found: Pair) -> None:
    """Draw each layer's factor of the learning rate: a colour per kind, darker towards the head."""
    records = [r for r in found[WITH].records if "temp_balance.lr_factor" in r.get("series", {})]
    layers: list[str] = list(records[0]["series"]["temp_balance.lr_factor"])
    kinds = list(dict.fromkeys(layer.split(".", 2)[2] for layer in layers))
    x = [record["tokens"] / 1000 for record in records]
    end = max(r["tokens"] for r in found[WITH].records if "tokens" in r) / 1000
    for index, layer in enumerate(layers):
        kind = kinds.index(layer.split(".", 2)[2])
        y = [record["series"]["temp_balance.lr_factor"][layer] for record in records]
        label = kinds[kind] if index >= len(layers) - len(kinds) else None
        strength = 0.35 + 0.65 * (index + 1) / len(layers)
        color = COLORS[kind % len(COLORS)]
        axes.step([*x, end], [*y, y[-1]], where="post", color=color, alpha=strength, label=label)
    # Room for the legend above the lines.
    axes.set_ylim(top=axes.get_ylim()[1] * 1.12)
    axes.legend(loc="upper center", ncols=len(kinds))
    axes.set_ylabel("factor (pale: near the input)")


def draw_norm(axes: "Axes", found: Pair) -> None:
    """Draw the norm of the selected weights and the curve that fits it best, a + b f(steps)."""
    records = [record for record in found[WITH].records if "norm_growth.norm" in record]
    x, y = over_tokens(found[WITH].records, "norm_growth.norm")
    axes.plot(x, y, color=COLORS[0], linewidth=1.8, label="L2 norm, with methods")
    fits = {law: records[-1].get(f"norm_growth.fit.{law}", 0.0) for law in LAWS}
    best = max(fits, key=lambda law: fits[law])
    if fits[best] > 0:
        slope, shift = linear_regression([LAWS[best](r["step"]) for r in records], y)
        fitted = [shift + slope * LAWS[best](r["step"]) for r in records]
        label = f"best fit: {best}, r² {fits[best]:.3f}"
        axes.plot(x, fitted, "--", color="#777777", linewidth=1, label=label)
    axes.set_ylabel("L2 norm")


def values(records: Sequence[Record], name: str) -> list[float]:
    """Return the values of a figure, of the records that have it."""
    return [record[name] for record in records if name in record]


def has(records: Sequence[Record], name: str) -> bool:
    """Say whether any step measured a quantity."""
    return any(name in record for record in records)


PANELS = (
    Panel("Loss", "loss", draw_losses),
    Panel("Noise scale and batch", "gns", draw_scale),
    Panel("Factor of the learning rate, by layer", "temp_balance.spread", draw_factors),
    Panel("Norm of the observed weights", "norm_growth.fit", draw_norm),
)
