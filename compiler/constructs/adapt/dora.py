"""DoRA: an update of low rank in the direction of each selected weight, and a trained length of each of its rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from trainc.compiler.constructs.adapt._layers import (
    along_rows,
    apply_weight,
    by_output,
    from_rows,
    output_count,
    rows_of,
    scaled,
)
from trainc.compiler.constructs.adapt._low_rank import UPDATE, LowRank

if TYPE_CHECKING:
    from torch import Tensor, nn


class Dora(LowRank):
    """Lets each selected layer compute with `m * V / |V|` in place of W, where V = W + scale * B A; W stays frozen.

    |V| is the length of each row of V, what makes one output, and m (out,) is trained: `LAYER.dora.magnitude`. It
    starts as |W|, and B at zero, so that the first output is the model's own, bit for bit. As published (section 4.3),
    |V| has no gradient; a row of which |V| is 0 stays as it is. A is (rank, in) and B (out, rank), the scale
    is `alpha / rank`, or `alpha / sqrt(rank)` with `scale = rslora`; A and B are `LAYER.dora.a.weight` and
    `LAYER.dora.b.weight`, of an embedding `LAYER.dora.embedding.a.weight` and `.b.weight`. Layers are nn.Linear,
    transformers' Conv1D, convolutions and nn.Embedding, whose rows are those of an output over all ids. In training
    `dropout` acts on the whole change of a layer's output, as in peft, and costs a second product with W.

    Every step computes B A and |V|, of the size of W. `program.merge()` writes `m * V / |V|` to W and removes the
    adapters. `program.save_adapters(folder)` writes the folder that peft's `PeftModel.from_pretrained` reads, with
    `use_dora`, and `program.load_adapters(folder)` reads one of peft. Layers with another rank or alpha have a clause
    of their own.
    """

    cite: ClassVar = (
        "Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, ICML 2024, arXiv:2402.09353"
    )
    usage: ClassVar = 'adapt dora on "blocks.**" & type(Linear) { rank = 8, alpha = 16 }'
    effects: ClassVar = (UPDATE,)

    bias: Literal["none", "all", "adapted"] = Field(
        default="none",
        description="biases that train as well: none, all of the model's, or those of the adapted layers",
    )

    def make_parts(self, layer: Any) -> dict[str, nn.Module | nn.Parameter]:
        """Return the modules and parameters of the adapter of a layer, by name."""
        import torch
        from torch import nn

        magnitude = nn.Parameter(torch.empty(output_count(layer)))
        return {**super().make_parts(layer), "magnitude": magnitude}

    def first_values(self, layer: Any) -> Mapping[str, Tensor]:
        """Return the lengths of the weight's rows."""
        import torch

        weight = layer.weight.detach()
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return {"magnitude": rows_of(layer, wide).norm(dim=1)}

    def magnitude(self, adapter: Any) -> Tensor | None:
        """Return the trained lengths of the weight's rows (out,)."""
        found: Tensor = adapter.magnitude
        return found

    def row_factors(self, layer: Any, adapter: Any) -> Tensor:
        """Return m / |V| for each row (out,), through which no gradient reaches V."""
        size = adapter.magnitude
        weight = rows_of(layer, layer.weight.detach()).to(size.dtype)
        length = (weight + self.update_rows(adapter).detach()).norm(dim=1)
        found: Tensor = (size / length.where(length != 0, 1)).where(length != 0, 1)
        return found

    def run_beside(self, adapter: Any, layer: Any, output: Any, *inputs: Tensor) -> Tensor:
        """Return `(m / |V| - 1) * W x + m / |V| * factor * B A x`."""
        x = self.input_of(adapter, inputs[0])
        (pair,) = self.pairs(adapter).values()
        factors = by_output(layer, self.row_factors(layer, adapter))
        if self.dropout and adapter.training:
            own = apply_weight(layer, x, layer.weight.to(x.dtype))
        else:
            bias = getattr(layer, "bias", None)
            own = output.to(factors.dtype)
            own = own if bias is None else own - by_output(layer, bias)
        change = scaled(layer, pair.b(pair.a(x)))
        found: Tensor = (factors - 1) * own + factors * self.factor * change
        return found

    def output_factor(self, layer: Any, adapter: Any) -> Tensor | None:
        """Return m / |V| where the layer's own output is used again, as it is without dropout."""
        if self.dropout and adapter.training:
            return None
        return along_rows(layer, self.row_factors(layer, adapter))

    def weight_change(self, layer: Any, adapter: Any) -> Tensor:
        """Return `m * V / |V| - W`, in the shape of the layer's weight."""
        rows = rows_of(layer, layer.weight) + self.update_rows(adapter)
        factors = self.row_factors(layer, adapter)[:, None]
        change: Tensor = from_rows(layer, factors * rows) - layer.weight
        return change

    def reference(
        self, x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, magnitude: Tensor
    ) -> Tensor:
        """Return the output of an adapted layer by definition; x (rows, in), weight (out, in), A and B, m (out,)."""
        import torch

        found = []
        for o in range(len(weight)):
            v = [
                weight[o, i] + self.factor * sum(b[o, r] * a[r, i] for r in range(self.rank))
                for i in range(weight.shape[1])
            ]
            row = torch.stack(v)
            length = sum(one * one for one in v) ** 0.5
            found.append(bias[o] + magnitude[o] / length * (x * row).sum(1))
        return torch.stack(found, 1)
