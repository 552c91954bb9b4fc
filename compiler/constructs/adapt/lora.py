"""LoRA: a trained update of low rank beside each selected layer, which stays frozen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from trainc.compiler.constructs.adapt._peft import PARTS, PeftFormat, is_bias
from trainc.compiler.model.adapter_rule import Adapted, AdapterRule
from trainc.dsl.reading.construct import Construct, Effect, Problem, RuleExplanation, Selector

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.adapting import Adapting
    from trainc.compiler.model.inventory import Inventory, ModuleEntry


class Lora(Construct, AdapterRule):
    """Trains `scale * B A x` beside each selected linear layer `W x`, and freezes everything else.

    A is (rank, in), B is (out, rank), and the scale is `alpha / rank`, or `alpha / sqrt(rank)` with `scale = rslora`.
    B starts at zero, so that the first output is the model's own, bit for bit. The layer keeps its class, its
    parameters and their names; A and B are `LAYER.lora.a.weight` and `LAYER.lora.b.weight`. Other clauses select them
    by name: `optimizer adamw on "**.lora.**" { ... }`. Layers are nn.Linear, and transformers' Conv1D. With `parts`,
    the layer is a fused projection whose outputs are queries, keys and values of equal size, in this order; each named
    part has its own A and B, and the others have none.

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
    targets: ClassVar = "modules"
    identity: ClassVar = {"alpha": "0"}
    changes_weight: ClassVar = True
    effects: ClassVar = (
        Effect("forward", "add updates of low rank", ("params", "inputs"), ("forward",)),
    )

    rules: ClassVar = {
        "layer-without-adapter": RuleExplanation(
            "A selected layer cannot have an adapter of this kind.",
            "An adapter of low rank runs beside a linear layer. A layer of another kind, or one that is never called,"
            " would get an adapter that does nothing.",
            "Select linear layers only, or exclude the layer from `on`.",
        ),
    }

    rank: int = Field(default=8, ge=1, description="rows of A, the rank of the update")
    alpha: float = Field(
        ge=0, description="strength of the update; 0: no adapter, and nothing is frozen"
    )
    scale: Literal["standard", "rslora"] = Field(
        default="standard",
        description="what `alpha` is divided by: the rank, or its square root (`rslora`)",
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="probability that an input of A is dropped in training"
    )
    init: Literal["kaiming", "gaussian"] = Field(
        default="kaiming",
        description="how A starts: uniform in +-1/sqrt(in), or normal with deviation 1/rank",
    )
    parts: tuple[Literal["q", "k", "v"], ...] | None = Field(
        default=None,
        description="parts of a fused query-key-value projection that are adapted, such as `[q, v]`. Default: all"
        " outputs by one adapter",
    )
    bias: Literal["none", "all", "adapted"] = Field(
        default="none",
        description="biases that train as well: none, all of the model's, or those of the adapted layers",
    )
    train: Selector | None = Field(
        default=None,
        description="parameters that train as well, such as those of a new head",
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

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report layers that cannot have an adapter."""
        for entry in bound.modules:
            sizes = _sizes(entry, bound.inventory)
            if "NonDynamicallyQuantizableLinear" in entry.types:
                yield Problem(
                    "layer-without-adapter",
                    f"`{entry.name}` cannot have an adapter: it is the output projection of an nn.MultiheadAttention,"
                    " which uses the weight directly and never calls the layer",
                    help="exclude it: `- type(NonDynamicallyQuantizableLinear)`",
                )
            elif sizes is None:
                yield Problem(
                    "layer-without-adapter",
                    f"`{entry.name}` cannot have an adapter: it is no nn.Linear and no Conv1D of transformers with a"
                    " plain weight of floating-point numbers",
                    help="select linear layers only, such as `& type(Linear, Conv1D)`",
                )
            elif self.parts is not None and sizes[1] % len(PARTS):
                yield Problem(
                    "layer-without-adapter",
                    f"`{entry.name}` has {sizes[1]} outputs, which are not queries, keys and values of equal size",
                    field="parts",
                    help="select fused query-key-value projections only, or remove `parts`",
                )

        if self.bias == "adapted" and not any(
            is_bias(n) for e in bound.modules for n in e.parameters
        ):
            yield Problem(
                "no-effect",
                "`bias = adapted` trains nothing, because no selected layer has a bias",
                field="bias",
                help="remove `bias`",
                severity="warning",
            )

    def adapt(self, to: Adapting) -> None:
        """Add the adapters, and freeze the rest."""
        layers = to.modules()
        for entry in layers:
            inputs, outputs = _sizes(entry, to.base) or (0, 0)
            to.add(entry.name, partial(self.make_parts, inputs, outputs))
        trained = set() if self.train is None else {*to.select(self.train, "parameters")}
        if self.bias == "all":
            trained |= {p.name for p in to.base.parameters if is_bias(p.name)}
        elif self.bias == "adapted":
            trained |= {name for entry in layers for name in entry.parameters if is_bias(name)}
        to.train_only(trained)

    def make_parts(self, inputs: int, outputs: int) -> dict[str, nn.Module]:
        """Return the modules of one adapter, by name."""
        from torch import nn

        def pair(outputs: int) -> dict[str, nn.Module]:
            return {
                "a": nn.Linear(inputs, self.rank, bias=False),
                "b": nn.Linear(self.rank, outputs, bias=False),
            }

        made: dict[str, nn.Module] = {"dropout": nn.Dropout(self.dropout)} if self.dropout else {}
        if self.parts is None:
            return made | pair(outputs)
        return made | {p: nn.ModuleDict(pair(outputs // len(PARTS))) for p in self.parts}

    def initialize(self, name: str, tensor: Tensor, generator: Generator) -> None:
        """Set B to zero, and draw A."""
        from torch import nn

        if name.endswith("b.weight"):
            nn.init.zeros_(tensor)
        elif self.init == "gaussian":
            nn.init.normal_(tensor, std=1 / self.rank, generator=generator)
        else:
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)

    @property
    def factor(self) -> float:
        """Return what B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.scale == "rslora" else self.rank)

    def run_adapter(self, adapter: Any, *inputs: Tensor) -> Tensor:
        """Return `factor * B A x`, with zeros for the parts that have no A and B."""
        pairs = self.pairs(adapter)
        x = inputs[0].to(next(iter(pairs.values())).a.weight.dtype)
        if self.dropout:
            x = adapter.dropout(x)
        return self._joined({p: pair.b(pair.a(x)) * self.factor for p, pair in pairs.items()}, -1)

    def pairs(self, adapter: Any) -> dict[str, Any]:
        """Return what holds A and B as `a` and `b` by part; an adapter for all outputs has the empty name."""
        if self.parts is None:
            return {"": adapter}
        return {part: getattr(adapter, part) for part in self.parts}

    def merge(self, layer: Any, adapter: nn.Module) -> None:
        """Add `factor * B A` to the weight; raises ValueError for a layer that does not compute `W x + bias`."""
        from torch import nn

        own = getattr(type(layer), "unbound", type(layer))
        if isinstance(layer, nn.Linear) and own.forward is not nn.Linear.forward:
            raise ValueError(
                f"the `forward` of {own.__name__} is not that of nn.Linear, and would change the update, too. Keep the"
                " adapter, and write it by `program.save_adapters`"
            )
        layer.weight.copy_(layer.weight + self.weight_change(layer, adapter))

    def weight_change(self, layer: Any, adapter: nn.Module) -> Tensor:
        """Return `factor * B A`, in the shape of the layer's weight."""
        from torch import nn

        pairs = self.pairs(adapter)
        updates = {p: pair.b.weight @ pair.a.weight * self.factor for p, pair in pairs.items()}
        update = self._joined(updates, 0)
        return update if isinstance(layer, nn.Linear) else update.T

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

    def write(self, adapted: Adapted, folder: Path) -> None:
        """Write peft's files; raises ValueError for what they cannot hold."""
        PeftFormat(self, adapted).write(folder)

    def read(self, adapted: Adapted, folder: Path) -> None:
        """Load peft's files; raises ValueError where they do not fit, and changes nothing then."""
        PeftFormat(self, adapted).read(folder)


def _sizes(entry: ModuleEntry, inventory: Inventory) -> tuple[int, int] | None:
    """Return the inputs and outputs of a linear layer; None for another module."""
    name = f"{entry.name}.weight".removeprefix(".")
    if name not in entry.parameters or entry.ndim != 2:
        return None
    weight = inventory.parameter[name]
    if not weight.dtype.startswith(("float", "bfloat")):
        return None  # such as one that is quantized
    first, second = weight.shape
    if "Linear" in entry.types:
        return second, first
    return (first, second) if "Conv1D" in entry.types else None
