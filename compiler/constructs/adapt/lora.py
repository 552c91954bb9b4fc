"""LoRA: a trained update of low rank beside each selected layer, which stays frozen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from trainc.compiler.constructs.adapt._fused import PARTS, count, rows_of_parts, spread
from trainc.compiler.constructs.adapt._layers import LINEAR, output_count, sizes, weight_name
from trainc.compiler.constructs.adapt._low_rank import UPDATE, LowRank, product
from trainc.dsl.reading.construct import Problem

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.model.inventory import Inventory, ModuleEntry
    from trainc.compiler.structure.weights import UsedWeight


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
    `rank` numbers for each id, starts at zero. With `parts`, the layer is a fused projection of queries, keys and
    values; each named part has its own A and B, and the others have none. Which outputs they are, the layer's name and
    the numbers of heads beside it tell, as for grouped heads, or where each head has its own (`query_key_value`); of
    another name, they are equal thirds in this order.
    PACE's LoRAadd is `rank = 10, alpha = 10, init = xavier, bias = update`.

    Initial values depend on the run's seed and the parameter's name alone. A model that has the adapters already
    keeps their values. `program.merge()` adds `scale * B A` to W and removes the adapters;
    a subclass whose `forward` gives something else than its base's on random numbers keeps them, with an error.
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

    def smallest_part(self, entry: ModuleEntry, inventory: Inventory) -> int:
        """Return the fewest outputs of a layer that have an A and B of their own."""
        outputs = sizes(entry, inventory)[0]
        if self.parts is None:
            return outputs
        rows = rows_of_parts(inventory.weight_of.get(weight_name(entry)), outputs)
        return min(count(rows[part]) for part in self.parts)

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report layers that cannot have an adapter, or no parts."""
        found = [
            Problem(
                "layer-without-adapter",
                f"`{entry.name}` {why}",
                field="parts",
                help="select projections that are fused of queries, keys and values, or remove `parts`",
            )
            for entry in bound.modules
            if (why := self._without_parts(entry, bound.inventory))
        ]
        yield from found or super().validate_targets(bound)

    def _without_parts(self, entry: ModuleEntry, inventory: Inventory) -> str:
        """Return why a layer has not the parts that are to be adapted, in words that begin with a verb."""
        name = weight_name(entry)
        if self.parts is None or name not in inventory.parameter:
            return ""
        if set(LINEAR).isdisjoint(entry.types):
            return "is no linear layer, and so no fused projection"
        try:
            rows = rows_of_parts(inventory.weight_of.get(name), sizes(entry, inventory)[0])
        except ValueError as error:
            return str(error)
        missing = [part for part in self.parts if part not in rows]
        return f"has {' and '.join(rows)} alone, and no {missing[0]}" if missing else ""

    def make_adapter(
        self, layer: Any, weight: UsedWeight | None
    ) -> dict[str, nn.Module | nn.Parameter]:
        """Return the modules of one adapter, by name."""
        from torch import nn

        if self.parts is None:
            return super().make_adapter(layer, weight)
        outputs = output_count(layer)
        rows = rows_of_parts(weight, outputs)
        held: dict[str, nn.Module | nn.Parameter] = {}
        for part in self.parts:
            pair: Any = nn.ModuleDict(self.make_pair(layer, count(rows[part])))
            pair.rows, pair.outputs = rows[part], outputs
            held[part] = pair
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
        found = {part: pair.b(pair.a(x)) * self.factor for part, pair in pairs.items()}
        return found[""] if self.parts is None else spread(found, pairs, -1)

    def update_rows(self, adapter: Any) -> Tensor:
        """Return `factor * B A`, (out, in), with zeros for the parts that have no A and B."""
        pairs = self.pairs(adapter)
        found = {part: product(pair) * self.factor for part, pair in pairs.items()}
        return found[""] if self.parts is None else spread(found, pairs, 0)

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
