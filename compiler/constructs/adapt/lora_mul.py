"""LoRAmul and VPTadd, the adapters of PACE: a factor of low rank on each weight, and a prompt added to the inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from trainc.compiler.constructs.adapt._layers import (
    LINEAR,
    RULES,
    apply_weight,
    excess_rank,
    from_rows,
    layer_problem,
    output_count,
    refuse_own_forward,
)
from trainc.compiler.model.adapter_rule import AdapterRule
from trainc.dsl.reading.construct import Construct, Effect, Problem, Selector

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.adapting import Adapting


class LoraMul(Construct, AdapterRule):
    """Lets each selected layer compute with `W * (1 + D U)` in place of W, entry by entry, and adds a prompt to inputs.

    `terms = [weight]` is LoRAmul: the change of the output is `(W * D U) x + b * d`, where D is (out, rank), U is
    (rank, in) and d (out,) changes the bias b. `terms = [prompt]` is VPTadd: it is `W p`, where the prompt p = P Q has
    one number for each input, P is (in, rank) and Q (rank, 1). With both, which are PACE's strong baseline, it is their
    sum. U and Q start as xavier has them and all others at zero, so that the first output is the model's own, bit for
    bit. Everything else is frozen, but for `train`. The parameters are `LAYER.lora_mul.weight_down`, `weight_up`,
    `bias`, `prompt_down` and `prompt_up`; a layer without a bias has no d, and of an output whose bias is 0 it
    does nothing. Layers are nn.Linear and transformers'
    Conv1D.

    Every step computes `W * D U`, of the size of W, and a second product with it. `program.merge()` writes
    `W * (1 + D U)` to the weight and `b * (1 + d) + W p` to the bias; a layer that has a prompt and no bias cannot be
    merged. `regularize pace` on an adapted layer has its noise on the change of the output.
    """

    cite: ClassVar = (
        "Ni, Zhang and Koniusz, PACE: Marrying Generalization in Parameter-Efficient Fine-Tuning with Consistency"
        " Regularization, NeurIPS 2024, arXiv:2409.17137, section 3.1"
    )
    usage: ClassVar = 'adapt lora_mul on "blocks.**" & type(Linear) { rank = 10 }'
    targets: ClassVar = "modules"
    identity: ClassVar = {"rank": "0"}
    changes_weight: ClassVar = True
    rules: ClassVar = RULES
    effects: ClassVar = (
        Effect("forward", "multiply weights and add prompts", ("params", "inputs"), ("forward",)),
    )

    rank: int = Field(
        default=10, ge=0, description="rank of the factors; 0: no adapter, and nothing is frozen"
    )
    terms: tuple[Literal["weight", "prompt"], ...] = Field(
        default=("weight", "prompt"),
        description="what is trained: factors on weight and bias, a prompt added to the inputs, or both",
    )
    train: Selector | None = Field(
        default=None,
        description="parameters that train as well, such as those of a new head",
    )

    @field_validator("terms")
    @classmethod
    def _names_each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("expected `weight`, `prompt` or both: write `terms = [weight]`")
        if len(set(value)) < len(value):
            raise ValueError("a term is named twice")
        return value

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report layers that are not linear."""
        for entry in bound.modules:
            if (problem := layer_problem(entry, bound.inventory, LINEAR)) is not None:
                yield problem
        if "weight" in self.terms:
            yield from excess_rank(bound, self.rank, LINEAR)

    def adapt(self, to: Adapting) -> None:
        """Add the adapters, and freeze the rest."""
        for entry in to.modules():
            to.add(entry.name, partial(self.make_parts, to.module(entry.name)))
        to.train_only(() if self.train is None else to.select(self.train, "parameters"))

    def make_parts(self, layer: Any) -> dict[str, nn.Parameter]:
        """Return the parameters of the adapter of a layer, by name."""
        import torch
        from torch import nn

        outputs = output_count(layer)
        inputs = layer.weight.numel() // outputs
        shapes: dict[str, tuple[int, ...]] = {}
        if "weight" in self.terms:
            shapes |= {"weight_down": (outputs, self.rank), "weight_up": (self.rank, inputs)}
            shapes |= {} if layer.bias is None else {"bias": (outputs,)}
        if "prompt" in self.terms:
            shapes |= {"prompt_down": (inputs, self.rank), "prompt_up": (self.rank, 1)}
        return {name: nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()}

    def initialize(self, name: str, tensor: Tensor, generator: Generator) -> None:
        """Draw the factors of which the other starts at zero."""
        from torch import nn

        if name.endswith("_up"):
            nn.init.xavier_uniform_(tensor, generator=generator)
        else:
            nn.init.zeros_(tensor)

    def run_beside(self, adapter: Any, layer: Any, output: Any, *inputs: Tensor) -> Tensor:
        """Return `(W * D U) x + W p + b * d`, as far as there are these terms."""
        bias = self.bias_change(layer, adapter)
        x = inputs[0].to(next(adapter.parameters()).dtype)
        if "weight" not in self.terms:
            assert bias is not None
            return bias.expand(*x.shape[:-1], -1)
        return apply_weight(layer, x, self.weight_change(layer, adapter), bias)

    def weight_change(self, layer: Any, adapter: Any) -> Tensor:
        """Return `W * D U`, in the shape of the layer's weight."""
        import torch

        if "weight" not in self.terms:
            return torch.zeros_like(layer.weight)
        factor = from_rows(layer, adapter.weight_down @ adapter.weight_up)
        change: Tensor = layer.weight * factor
        return change

    def bias_change(self, layer: Any, adapter: Any) -> Tensor | None:
        """Return what is added to every output, `W p + b * d`; None where nothing is."""
        found: Tensor | None = None
        if "prompt" in self.terms:
            prompt = (adapter.prompt_down @ adapter.prompt_up).squeeze(1)
            found = apply_weight(layer, prompt, layer.weight.to(prompt.dtype))
        if "weight" in self.terms and layer.bias is not None:
            change = layer.bias * adapter.bias
            found = change if found is None else found + change
        return found

    def merge(self, layer: Any, adapter: Any) -> None:
        """Change weight and bias; raises ValueError for a layer without a bias that has a prompt."""
        refuse_own_forward(layer)
        bias = self.bias_change(layer, adapter)
        if bias is not None and layer.bias is None:
            raise ValueError(
                "its prompt adds the same numbers to every output, and the layer has no bias that could hold them. Keep"
                " the adapter, or train with `terms = [weight]`"
            )
        layer.weight.copy_(layer.weight + self.weight_change(layer, adapter))
        if bias is not None:
            layer.bias.copy_(layer.bias + bias)

    def reference(
        self, x: Tensor, weight: Tensor, bias: Tensor, parameters: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the output of an adapted layer by definition; x (rows, in), weight (out, in), bias (out,)."""
        import torch

        down, up = parameters["weight_down"], parameters["weight_up"]
        columns = []
        for o in range(len(weight)):
            value = bias[o] * (1 + parameters["bias"][o])
            for i in range(weight.shape[1]):
                factor = 1 + sum(down[o, r] * up[r, i] for r in range(self.rank))
                prompt = sum(
                    parameters["prompt_down"][i, r] * parameters["prompt_up"][r, 0]
                    for r in range(self.rank)
                )
                value = value + weight[o, i] * (factor * x[:, i] + prompt)
            columns.append(value)
        return torch.stack(columns, 1)
