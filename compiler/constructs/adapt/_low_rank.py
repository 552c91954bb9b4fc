"""What adapters of low rank share: their factors A and B, and `factor * B A` as a change of a weight."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from trainc.compiler.constructs.adapt._layers import (
    KINDS,
    RULES,
    excess_rank,
    from_rows,
    is_convolution,
    layer_problem,
    output_count,
    refuse_options,
    refuse_own_forward,
    scaled,
    sizes,
    weight_name,
)
from trainc.compiler.constructs.adapt._peft import PeftFormat, is_bias
from trainc.compiler.model.adapter_rule import Adapted, AdapterRule
from trainc.dsl.reading.construct import Construct, Effect, Problem, Selector

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.adapting import Adapting
    from trainc.compiler.model.inventory import Inventory, ModuleEntry
    from trainc.compiler.structure.weights import UsedWeight

EMBEDDING = "embedding"
"""What holds the factors of an embedding, in which A starts at zero and B at random."""
UPDATE = Effect("forward", "add updates of low rank", ("params", "inputs"), ("forward",))


class LowRank(Construct, AdapterRule):
    """Base of constructs whose adapters are made of `factor * B A`, where A has the rows and B the columns."""

    targets: ClassVar = "modules"
    identity: ClassVar = {"alpha": "0"}
    changes_weight: ClassVar = True
    rules: ClassVar = RULES

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
    init: Literal["kaiming", "gaussian", "xavier"] = Field(
        default="kaiming",
        description="how A starts: uniform in +-1/sqrt(in), normal with deviation 1/rank, or uniform in"
        " +-sqrt(6/(in + rank))",
    )
    bias: Literal["none", "all", "adapted", "update"] = Field(
        default="none",
        description="biases that train as well: none, all of the model's, those of the adapted layers, or one of the"
        " update itself, beside B",
    )
    train: Selector | None = Field(
        default=None,
        description="parameters that train as well, such as those of a new head",
    )

    # what it adapts

    def smallest_part(self, entry: ModuleEntry, inventory: Inventory) -> int:
        """Return the fewest outputs of a layer that have an A and B of their own."""
        return sizes(entry, inventory)[0]

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report layers that cannot have an adapter."""
        for entry in bound.modules:
            if (problem := layer_problem(entry, bound.inventory, KINDS)) is not None:
                yield problem
            elif self.dropout and "Embedding" in entry.types:
                yield Problem(
                    "layer-without-adapter",
                    f"`{entry.name}` is an embedding, whose inputs are ids, of which none can be dropped",
                    field="dropout",
                    help="give embeddings a clause of their own, without `dropout`",
                )
            elif self.bias == "update" and not any(map(is_bias, entry.parameters)):
                yield Problem(
                    "layer-without-adapter",
                    f"`{entry.name}` has no bias, into which that of the update could be merged",
                    field="bias",
                    help="remove `bias`, or select layers that have one",
                )
        yield from excess_rank(bound, self.rank, KINDS, self.smallest_part)
        if "init" in self.model_fields_set and all("Embedding" in e.types for e in bound.modules):
            yield Problem(
                "no-effect",
                "`init` is of A, which is zero at the start of an embedding's adapter; B is drawn, with deviation 1",
                field="init",
                help="remove `init`",
                severity="warning",
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
        """Add the adapters, and freeze the rest; raises ValueError for a layer that is no product with a weight."""
        layers = to.modules()
        for entry in layers:
            layer = to.module(entry.name)
            refuse_options(entry.name, layer)
            weight = to.base.weight_of.get(weight_name(entry))
            to.add(entry.name, partial(self.make_adapter, layer, weight), self.first_values)
        trained = set() if self.train is None else {*to.select(self.train, "parameters")}
        if self.bias == "all":
            trained |= {p.name for p in to.base.parameters if is_bias(p.name)}
        elif self.bias == "adapted":
            trained |= {name for entry in layers for name in entry.parameters if is_bias(name)}
        to.train_only(trained)

    def make_adapter(
        self, layer: Any, weight: UsedWeight | None
    ) -> dict[str, nn.Module | nn.Parameter]:
        """Return the modules and parameters of the adapter of a layer, by name; `weight` tells of the layer's."""
        return self.make_parts(layer)

    def make_parts(self, layer: Any) -> dict[str, nn.Module | nn.Parameter]:
        """Return the modules and parameters of the adapter of a layer, by name."""
        from torch import nn

        pair = self.make_pair(layer, output_count(layer))
        held = {EMBEDDING: nn.ModuleDict(pair)} if isinstance(layer, nn.Embedding) else pair
        return {"dropout": nn.Dropout(self.dropout), **held} if self.dropout else {**held}

    def make_pair(self, layer: Any, outputs: int) -> dict[str, nn.Module]:
        """Return A and B for some of the outputs of a layer: those of a convolution are one of its form and a 1x1."""
        from torch import nn

        own_bias = self.bias == "update"
        if isinstance(layer, nn.Embedding):
            a: nn.Module = nn.Embedding(
                layer.num_embeddings,
                self.rank,
                padding_idx=layer.padding_idx,
                scale_grad_by_freq=layer.scale_grad_by_freq,
            )
        elif is_convolution(layer):
            kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[layer.weight.dim() - 3]
            form = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
            mode = layer.padding_mode
            a = kind(layer.in_channels, self.rank, *form, bias=False, padding_mode=mode)
            return {"a": a, "b": kind(self.rank, outputs, 1, bias=own_bias)}
        else:
            a = nn.Linear(layer.weight.numel() // output_count(layer), self.rank, bias=False)
        return {"a": a, "b": nn.Linear(self.rank, outputs, bias=own_bias)}

    def first_values(self, layer: nn.Module) -> Mapping[str, Tensor]:
        """Return what parameters of an adapter start from that depends on its layer, by name."""
        return {}

    def initialize(self, name: str, tensor: Tensor, generator: Generator) -> None:
        """Set B to zero, and draw A; of an embedding, set A to zero and draw B."""
        from torch import nn

        held, _, letter = name.removesuffix(".weight").rpartition(".")
        if held == EMBEDDING and letter == "b":
            nn.init.normal_(tensor, generator=generator)
        elif held == EMBEDDING or letter != "a":
            nn.init.zeros_(tensor)
        elif self.init == "gaussian":
            nn.init.normal_(tensor, std=1 / self.rank, generator=generator)
        elif self.init == "xavier":
            nn.init.xavier_uniform_(tensor, generator=generator)
        else:
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)

    # what it computes

    @property
    def factor(self) -> float:
        """Return what B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.scale == "rslora" else self.rank)

    def pairs(self, adapter: Any) -> dict[str, Any]:
        """Return what holds A and B as `a` and `b` by part; an adapter for all outputs has the empty name."""
        return {"": getattr(adapter, EMBEDDING, adapter)}

    def magnitude(self, adapter: Any) -> Tensor | None:
        """Return the trained lengths of the weight's rows (out,); None where it has none."""
        return None

    def input_of(self, adapter: Any, x: Tensor) -> Tensor:
        """Return what A is given of an input of the layer: in the adapter's dtype, and with its dropout."""
        if not x.is_floating_point():
            return x
        x = x.to(next(adapter.parameters()).dtype)
        dropped: Tensor = adapter.dropout(x) if self.dropout else x
        return dropped

    def run_beside(self, adapter: Any, layer: Any, output: Any, *inputs: Tensor) -> Tensor:
        """Return what is added to the layer's output, with the scale of an embedding that has one."""
        return scaled(layer, self.run_adapter(adapter, *inputs))

    def update_rows(self, adapter: Any) -> Tensor:
        """Return `factor * B A`, (out, in)."""
        (pair,) = self.pairs(adapter).values()
        return product(pair) * self.factor

    def weight_change(self, layer: Any, adapter: Any) -> Tensor:
        """Return `factor * B A`, in the shape of the layer's weight."""
        return from_rows(layer, self.update_rows(adapter))

    def merge(self, layer: Any, adapter: Any) -> None:
        """Add the change to the weight; raises ValueError for a layer that does not compute `W x + bias`."""
        refuse_own_forward(layer)
        bias = next(iter(self.pairs(adapter).values())).b.bias
        layer.weight.copy_(layer.weight + self.weight_change(layer, adapter))
        if bias is not None:
            layer.bias.add_(bias * self.factor)

    # files

    def shares_files(self, other: AdapterRule) -> bool:
        """Say whether another clause differs in what peft knows by layer, rank and alpha, alone."""
        return type(self) is type(other) and all(
            getattr(self, name) == getattr(other, name) for name in ("scale", "dropout", "bias")
        )

    def write(self, adapted: Adapted, folder: Path) -> None:
        """Write peft's files; raises ValueError for what they cannot hold."""
        PeftFormat(self, adapted).write(folder)

    def read(self, adapted: Adapted, folder: Path) -> None:
        """Load peft's files; raises ValueError where they do not fit, and changes nothing then."""
        PeftFormat(self, adapted).read(folder)


def product(pair: Any) -> Tensor:
    """Return B A by rows, (out, in)."""
    from torch import nn

    a: Tensor = pair.a.weight.T if isinstance(pair.a, nn.Embedding) else pair.a.weight.flatten(1)
    found: Tensor = pair.b.weight.flatten(1) @ a
    return found
