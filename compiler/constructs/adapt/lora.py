"""LoRA: a trained update of low rank beside each selected layer, which stays frozen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from trainc.compiler.constructs.adapt._fused import PARTS
from trainc.compiler.constructs.adapt._layers import LINEAR, output_count
from trainc.compiler.constructs.adapt._low_rank import UPDATE, LowRank, product
from trainc.dsl.reading.construct import Problem

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainc.compiler.bind.bound_clause import Targets


class Lora(LowRank):
    """Trains `scale * B A x` beside each selected layer `W x`, and freezes everything else.

    A is (rank, in), B is (out, rank), and the scale is `alpha / rank`, or `alpha / sqrt(rank)` with `scale = rslora`.
    B starts at zero, so that the first output is the model's own, bit for bit. The layer keeps its class, its
    parameters and their names; A and B are `LAYER.lora.a.weight` and `LAYER.lora.b.weight`. Other clauses select them
    by name: `optimizer adamw on "**.lora.**" { ... }`, and LoRA+ is `lr by_type { factors = 16 on "**.lora.b.*" }`.
    Layers with another rank or alpha have a clause of their own, `adapt lora as wide on "**.mlp.**" { rank = 32 ... }`;
    where nothing else but `on` and `train` differs, peft's files hold them together, as its `rank_pattern`.

    Layers are nn.Linear, transformers' Conv1D, convolutions and nn.Embedding. A of a convolution is one of its form
    with `rank` outputs, and B is 1x1. Those of an embedding are `LAYER.lora.embedding.a` and `.b`, of which A, a row of
    `rank` numbers for each id, starts at zero. With `parts`, the layer is a fused projection whose outputs are queries,
    keys and values of equal size, in this order; each named part has its own A and B, and the others have none.
    PACE's LoRAadd is `rank = 10, alpha = 10, init = xavier, bias = update`.

    Initial values depend on the run's seed and the parameter's name alone. A model that has the adapters already
    keeps their values. `program.merge()` adds `scale * B A` to W and removes the adapters.
    `program.save_adapters(folder)` writes the folder that peft's `PeftModel.from_pretrained` reads, and
    `program.load_adapters(folder)` reads one of peft. A layer whose weight its parent uses directly, such as the
    projections of nn.MultiheadAttention, cannot have an adapter.
    """

    cite: ClassVar = (
        "Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, arXiv:2106.09685; "
        "rslora: Kalajdzievski, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, arXiv:2312.03732"
    )
    usage: ClassVar = 'adapt lora on "blocks.**" & type(Linear) { rank = 8, alpha = 16 }'
    effects: ClassVar = (UPDATE,)

    parts: tuple[Literal["q", "k", "v"], ...] | None = Field(
        default=None,
        description="parts of a fused query-key-value projection that are adapted, such as `[q, v]`. Default: all"
        " outputs by one adapter",
    )

    @field_validator("parts")
    @classmethod
    def _names_each_once(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and not value:
            raise ValueError(
                "expected at least one part: write `parts = [q, v]`, or remove `parts`"
            )
        if value is not None and len(set(value)) < len(value):
            raise ValueError("a part is named twice")
        return value

    @model_validator(mode="after")
    def _has_one_bias(self) -> Lora:
        if self.parts is not None and self.bias == "update":
            raise ValueError(
                "`bias = update` is of an adapter for all outputs: remove `parts`, or train the layer's own by"
                " `bias = adapted`"
            )
        return self

    @property
    def fused_parts(self) -> int:
        """Return how many equal parts of a layer's outputs have an A and B each."""
        return 1 if self.parts is None else len(PARTS)

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report layers that cannot have an adapter, or no parts."""
        yield from super().validate_targets(bound)
        for entry in bound.modules if self.parts is not None else ():
            weight = bound.inventory.parameter.get(f"{entry.name}.weight".removeprefix("."))
            if weight is None:
                continue
            if set(LINEAR).isdisjoint(entry.types):
                message = f"`{entry.name}` is no linear layer, and so no fused projection"
            elif (outputs := weight.shape[0 if "Linear" in entry.types else 1]) % len(PARTS):
                message = f"`{entry.name}` has {outputs} outputs, which are not queries, keys and values of equal size"
            else:
                continue
            yield Problem(
                "layer-without-adapter",
                message,
                field="parts",
                help="select fused query-key-value projections only, or remove `parts`",
            )

    def make_parts(self, layer: Any) -> dict[str, nn.Module | nn.Parameter]:
        """Return the modules of one adapter, by name."""
        from torch import nn

        if self.parts is None:
            return super().make_parts(layer)
        size = output_count(layer) // len(PARTS)
        held: dict[str, nn.Module | nn.Parameter] = {
            part: nn.ModuleDict(self.make_pair(layer, size)) for part in self.parts
        }
        return {"dropout": nn.Dropout(self.dropout), **held} if self.dropout else held

    def pairs(self, adapter: Any) -> dict[str, Any]:
        """Return what holds A and B as `a` and `b` by part; an adapter for all outputs has the empty name."""
        if self.parts is None:
            return super().pairs(adapter)
        return {part: getattr(adapter, part) for part in self.parts}

    def run_adapter(self, adapter: Any, *inputs: Tensor) -> Tensor:
        """Return `factor * B A x`, with zeros for the parts that have no A and B."""
        x = self.input_of(adapter, inputs[0])
        pairs = self.pairs(adapter)
        return self._joined({p: pair.b(pair.a(x)) * self.factor for p, pair in pairs.items()}, -1)

    def update_rows(self, adapter: Any) -> Tensor:
        """Return `factor * B A`, (out, in), with zeros for the parts that have no A and B."""
        pairs = self.pairs(adapter)
        return self._joined({p: product(pair) * self.factor for p, pair in pairs.items()}, 0)

    def _joined(self, values: Mapping[str, Tensor], axis: int) -> Tensor:
        """Return the values of the parts side by side along an axis, zeros for those that are not there."""
        import torch

        if "" in values:
            return values[""]
        zeros = torch.zeros_like(next(iter(values.values())))
        return torch.cat([values.get(part, zeros) for part in PARTS], axis)

    def reference(
        self, x: Tensor, weight: Tensor, bias: Tensor, pairs: Mapping[str, tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Return the output of an adapted layer by definition; x (rows, in), weight (out, in), (A, B) by part.

        The part of an adapter for all outputs has the empty name.
        """
        import torch

        rows = []
        for x_row in x:
            row = []
            for o in range(len(weight)):
                size = len(weight) // (1 if "" in pairs else len(PARTS))
                part = "" if "" in pairs else PARTS[o // size]
                value = bias[o] + sum(weight[o, i] * x_row[i] for i in range(len(x_row)))
                if part in pairs:
                    a, b = pairs[part]
                    for r in range(self.rank):
                        inner = sum(a[r, i] * x_row[i] for i in range(len(x_row)))
                        value = value + self.factor * b[o % size, r] * inner
                row.append(value)
            rows.append(torch.stack(row))
        return torch.stack(rows)
