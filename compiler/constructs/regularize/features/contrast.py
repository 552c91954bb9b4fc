"""Supervised contrast: features of one class come together, and those of others apart."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from trainc.compiler.constructs.regularize.features import _features
from trainc.compiler.model.adapter_rule import AdapterRule
from trainc.dsl.reading.construct import Construct, Effect, Problem, Schedule
from trainc.dsl.reading.field_types import call_of
from trainc.dsl.values.functions import Function
from trainc.dsl.values.value_json import Call, Number

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.adapting import Adapting
    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.method.term import Forward

Singles = Literal["skip", "zero"]
HEADS = {"mlp": Function({"widths": "numbers"}, 1, 1, schedule=False)}
Head = Annotated[Call, call_of("projection head", HEADS, "mlp(512, 256)")]


class Contrast(Construct, AdapterRule):
    """Adds the supervised contrastive loss of the features that one layer gives.

    With z the features divided by their L2 norm, the loss of an anchor i is
    `-1/|P(i)| sum_(p in P(i)) log(exp(z_i z_p / T) / sum_(a != i) exp(z_i z_a / T))`: P(i) are the other
    features of its class, and a runs over all features of the micro-batch but its own. The term is the
    mean over the anchors whose class has another feature; without any it is 0. The layer gives a vector
    for each target, (B, D), or (B, T, D) for targets (B, T); those of targets that the loss does not
    count take no part. Where another clause passes examples several times, each view is a feature of its
    own. With `head` the features pass through linear layers of these widths with ReLU between them, which
    train beside the model as `LAYER.contrast.layers` and are thrown away by `program.merge()`.

    It compares the examples of one micro-batch, in each replica its own: `micro` of `data` decides how
    many there are.
    """

    cite: ClassVar = (
        "Khosla et al., Supervised Contrastive Learning, NeurIPS 2020, arXiv:2004.11362, equation 2"
    )
    usage: ClassVar = (
        'regularize contrast on "ln_f" { weight = 0.1, temperature = 0.2, head = mlp(16, 8) }'
    )
    targets: ClassVar = "modules"
    identity: ClassVar = {"weight": "0"}
    effects: ClassVar = (Effect("forward", "contrast features", ("forward", "clock"), ("loss",)),)
    division: ClassVar = "a feature is compared with the others of its own micro-batch alone"
    functions: ClassVar = ("trainc.compiler.constructs.regularize.features.contrast:supcon",)

    weight: Schedule = Field(description="coefficient of the term")
    temperature: float = Field(
        default=0.1, gt=0, description="what the cosines of two features are divided by"
    )
    labels: Literal["targets"] = Field(
        default="targets", description="what says which features belong together: their targets"
    )
    singles: Singles = Field(
        default="skip",
        description="anchors without another feature of their class: left out of the mean, or a 0 in it",
    )
    head: Head | None = Field(
        default=None, description="projection of the features, by the widths of its layers"
    )

    @field_validator("head")
    @classmethod
    def _whole_widths(cls, value: Call | None) -> Call | None:
        for width in () if value is None else value.args:
            if not (isinstance(width, Number) and width.value >= 1 and width.value % 1 == 0):
                raise ValueError(
                    f"the widths of a head are whole numbers such as `mlp(512, 256)`, found `{width}`"
                )
        return value

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report more than one module."""
        return _features.one_module(bound)

    # the head

    @property
    def adapts(self) -> bool:
        """Whether it has a head, which is a part of the model's modules."""
        return self.head is not None

    @property
    def widths(self) -> list[int]:
        """The widths of the head's layers."""
        return [int(w.value) for w in self.head.args if isinstance(w, Number)] if self.head else []

    def adapt(self, to: Adapting) -> None:
        """Add the head; raises ValueError where the layer does not say how wide its features are."""
        for entry in to.modules():
            width = _features.width_of(to.module(entry.name))
            if width is None:
                raise ValueError(
                    f"`{entry.name}` ({entry.types[0]}) does not say how wide its features are, which `head` needs:"
                    " select a linear layer, a convolution or a norm"
                )
            to.add(entry.name, partial(self._parts, width))

    def _parts(self, width: int) -> dict[str, nn.Module]:
        from torch import nn

        sizes = [width, *self.widths]
        return {"layers": nn.ModuleList(nn.Linear(n, m) for n, m in pairwise(sizes))}

    def initialize(self, name: str, tensor: Tensor, generator: Generator) -> None:
        """Draw weights as nn.Linear does, and set biases to 0."""
        from torch import nn

        if name.endswith("bias"):
            nn.init.zeros_(tensor)
        else:
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)

    def change_output(self, layer: Any, adapter: Any, inputs: Any, output: Any) -> Any:
        """Return the layer's output as it is."""
        return output

    def merge(self, layer: Any, adapter: Any) -> None:
        """Throw the head away."""

    def project(self, features: Tensor, layers: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Return features (N, D) after the layers of the head, each a weight and a bias."""
        from torch.nn.functional import linear, relu

        for i, (weight, bias) in enumerate(layers):
            features = linear((relu(features) if i else features).to(weight.dtype), weight, bias)
        return features

    # the term

    def lower(self, to: Lowering) -> None:
        """Keep the features, and add the loss of every pair of them."""
        (module,) = (entry.name for entry in to.modules())
        prefix = f"{module}.{self.name}.layers".removeprefix(".")
        names = [(f"{prefix}.{i}.weight", f"{prefix}.{i}.bias") for i in range(len(self.widths))]
        to.refuse_shards(
            (name for pair in names for name in pair),
            "its head runs outside of the layer",
            "Remove `head`, or use DistributedDataParallel",
        )
        to.capture([module])

        def value(forward: Forward) -> Tensor:
            features, labels, counted = _features.rows_of(forward, module, to.label)
            own = forward.parameters
            features = self.project(features, [(own[w], own[b]) for w, b in names])
            return supcon(features, labels, self.temperature, self.singles, counted)

        to.term(
            value,
            over="targets",
            weight=self.weight,
            of_classes=True,
            what="contrast of the features",
        )

    def reference(self, features: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        """Return the term by definition, anchor by anchor: features (N, D), classes (N,), which count (N,)."""
        z = features / features.square().sum(1, keepdim=True).sqrt()
        rows = [i for i in range(len(z)) if counted[i]]
        found = []
        for i in rows:
            others = [a for a in rows if a != i]
            positives = [p for p in others if labels[p] == labels[i]]
            below = sum((z[i] @ z[a] / self.temperature).exp() for a in others)
            own = [((z[i] @ z[p] / self.temperature).exp() / below).log() for p in positives]
            if own:
                found.append(-sum(own, start=z.new_zeros(())) / len(own))
        number = len(found) if self.singles == "skip" else len(rows)
        return sum(found, start=z.new_zeros(())) / max(number, 1)


def supcon(
    features: Tensor,
    labels: Tensor,
    temperature: float = 0.1,
    singles: Singles = "skip",
    counted: Tensor | None = None,
) -> Tensor:
    """Return the supervised contrastive loss L_out of `features` (N, D) with classes `labels` (N,), 0-d.

    The features are divided by their L2 norms, and their cosines by `temperature`; an anchor is compared with all
    others, never with itself. It is the mean over the anchors that have a positive, another feature of their class;
    with `singles` as `zero` over all of them, those without one as 0. Without any positive it is 0, with gradients of
    0. Rows that are not `counted`, bool (N,), take no part. It is computed in float32 at least. Raises ValueError where
    the shapes do not fit each other. Source: Khosla et al., arXiv:2004.11362, equation 2.
    """
    import torch
    from torch.nn.functional import normalize

    if features.dim() != 2 or labels.dim() != 1:
        raise ValueError(
            f"`features` {list(features.shape)} and `labels` {list(labels.shape)}: give vectors (N, D) and the class of"
            " each, (N,)"
        )
    if counted is None:
        counted = torch.ones_like(labels, dtype=torch.bool)
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    with torch.autocast(features.device.type, enabled=False):
        z = normalize(wide.where(counted.unsqueeze(1), 0.0), dim=1)
        cosines = z @ z.T / temperature
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    others = counted & ~itself
    same = (labels.unsqueeze(1) == labels) & others & counted.unsqueeze(1)
    number = same.sum(1)
    anchors = number > 0
    # The rows of other anchors stay as they are: a sum over nothing has no finite gradient.
    below = cosines.masked_fill(anchors.unsqueeze(1) & ~others, -torch.inf).logsumexp(1)
    each = (below.unsqueeze(1) - cosines).where(same, 0.0).sum(1) / number.clamp_min(1)
    mean_over = anchors if singles == "skip" else counted
    mean: Tensor = each.sum() / mean_over.sum().clamp_min(1)
    return mean
