"""muP: learning rates that hold at every width, relative to a model of a base width."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from trainc.compiler.constructs.lr._width import StartingNorms, condition, fans, is_stack
from trainc.dsl.reading.construct import Construct, Effect, Problem

if TYPE_CHECKING:
    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.model.inventory import ParameterEntry

Part = Literal["input", "hidden", "output", "vector"]


class Mup(Construct):
    """Multiplies each learning rate as maximal update parametrization (muP) does, with `m = width / base_width`.

    | parameter | AdamW | SGD |
    |---|---|---|
    | input: embeddings and the first layer; biases and norms | 1 | m |
    | hidden | 1 / m | 1 |
    | output: the head | 1 / m | 1 / m |

    These are the rows of the paper's Table 3 for rates. They follow from one condition, which is what is computed: an
    update has a spectral norm in proportion to sqrt(fan-out / fan-in). So it holds for any optimizer that says how
    large its updates are: those of Muon keep their rate in hidden layers. The rates found at `base_width` then serve at
    every width, and at the base width every factor is 1. `trainc plan` shows the factor of every parameter.

    Rates alone are not muP. The initial values have to scale, too: hidden and input weights with a variance in
    proportion to 1 / fan-in, as torch's layers begin, and the head with 1 / fan-in^2, or zeros. In the first step the
    spectral norms of hidden and output weights are compared with sqrt(fan-out / fan-in); what is more than 4 times as
    large or small is noted, and the summary has the range. A model may instead multiply its logits by 1 / m and begin
    its head as at the base width: then `output = multiplier`, and the factors of the head are m times these, m^2 times
    for SGD. Whether the code of the model multiplies cannot be seen in its weights: a note says what it has to do.
    Attention of growing heads needs scores over the size of a head, not its root.
    """

    cite: ClassVar = (
        "Yang et al., Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer,"
        " NeurIPS 2021, arXiv:2203.03466"
    )
    usage: ClassVar = "lr mup { base_width = 4 }"
    targets: ClassVar = "parameters"
    default_on: ClassVar = "trainable"
    effects: ClassVar = (
        Effect("rates", "scale rates with the width", reads=("params",), writes=("rate",)),
    )

    base_width: int = Field(gt=0, description="width at which the rates were found")
    width: int | None = Field(
        default=None, gt=0, description="width of this model. Default: the fan-in of its head"
    )
    output: Literal["rate", "multiplier"] = Field(
        default="rate",
        description="what makes the output small: the head's own `rate` and initial values, or a `multiplier` 1 / m of"
        " the logits in the model",
    )

    def part(self, entry: ParameterEntry) -> Part:
        """Return what a parameter is."""
        if entry.ndim < 2:
            return "vector"
        if "head" in entry.roles:
            return "output"
        return "input" if "embedding" in entry.roles or entry.place.level == 0 else "hidden"

    def widths(self, entries: Iterable[ParameterEntry]) -> set[int]:
        """Return the width of the model: `width`, or the fan-in of each head."""
        if self.width is not None:
            return {self.width}
        heads = [entry for entry in entries if self.part(entry) == "output"]
        # The outputs of a table are the inputs of the head that it is tied to.
        return {fans(head)[0 if "embedding" in head.roles else 1] for head in heads}

    def reference(self, part: Part, m: float, updates: str) -> float:
        """Return the factor of a part by the table, for updates that are `adaptive` or follow the `gradient`."""
        table = {
            "adaptive": {"input": 1.0, "vector": 1.0, "hidden": 1 / m, "output": 1 / m},
            "gradient": {"input": m, "vector": m, "hidden": 1.0, "output": 1 / m},
        }
        return table[updates][part]

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Ask for `width` where the head does not say it, and refuse a head that is an embedding as well."""
        found = self.widths(bound.inventory.parameters)
        if len(found) != 1:
            seen = f"its heads have {sorted(found)}" if found else "no head is known"
            yield Problem(
                "bad-value",
                f"the width of the model is not known: {seen}",
                help="write it: `width = 512`",
                field="",
            )
        elif found == {self.base_width}:
            message = f"the model has the base width, {self.base_width}, so every factor is 1"
            yield Problem("no-effect", message, field="base_width", severity="warning")
        tied = next((p for p in bound.parameters if {"head", "embedding"} <= p.roles), None)
        if tied is not None and self.output == "rate":
            yield Problem(
                "bad-value",
                f"`{tied.name}` is embedding and head in one, which cannot have the rates of both",
                help="let the model multiply its logits by base width / width, and write `output = multiplier`",
                field="output" if "output" in self.model_fields_set else "",
            )

    def lower(self, to: Lowering) -> None:
        """Give every kind of parameter its factor, and look at the norms of the first step."""
        to.refuse_times(f"`{to.label}` holds for the whole run", "from", "until", "every")
        (width,) = self.widths(to.inventory.parameters)
        m = width / self.base_width
        units: dict[tuple[Part, float], list[str]] = {}
        weights: dict[str, tuple[float, str]] = {}
        for entry in to.parameters():
            tied = {"head", "embedding"} <= entry.roles
            part: Part = "input" if tied else self.part(entry)
            out, into = fans(entry)
            fixed_out = part == "output" or (part == "vector" and "head" in entry.roles)
            base = (
                out if fixed_out else out / m,
                into if part in ("input", "vector") else into / m,
            )
            factor = condition(to, entry.name, out, into) / condition(to, entry.name, *base)
            if part == "output":
                if self.output == "multiplier":
                    gradient = getattr(to.optimizer_of(entry.name), "follows_gradient", False)
                    factor *= m**2 if gradient else m
                weights[entry.name] = (math.sqrt(out / into) * self._multiplied(m), part)
            elif part == "hidden":
                weights[entry.name] = (math.sqrt(out / into), part)
            units.setdefault((part, round(factor, 12)), []).append(entry.name)
        for (part, factor), names in units.items():
            to.lr_factor(part, names).factor = factor
        if weights:
            remark = f"the model has to multiply its logits by {1 / m:.6g}, which its weights do not show"
            to.action(
                StartingNorms(
                    f"{to.label} norms",
                    weights,
                    remark if self.output == "multiplier" else "",
                    [entry.name for entry in to.parameters() if is_stack(entry)],
                )
            )

    def _multiplied(self, m: float) -> float:
        return m if self.output == "multiplier" else 1.0
