"""N:M sparsity that is trained: n of each m consecutive weights are not zero (SR-STE)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field, model_validator

from trainc.compiler.method.weight_hook import WeightHook
from trainc.dsl.reading.construct import Construct, Effect, Problem, Schedule
from trainc.runtime.step.action import Action, Phase
from trainc.runtime.step.gradients import GradientTransform, ParameterGradient

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.method.layer_hook import LayerContext
    from trainc.runtime.companion.companion import Companion
    from trainc.runtime.mask.structures import Structure
    from trainc.runtime.schedule.clock import Clock
    from trainc.runtime.step.record import Step


class NM(Construct):
    """Lets layers compute with the `n` largest |w| of each `m` consecutive weights along axis 1, and zeros elsewhere.

    All weights are kept and trained: the gradient of M * W, where M says which weights are not zero, is taken as that
    of W (straight-through), and `decay * (1 - M) * W` is added to it, before clipping. M is found anew in every
    forward pass, so that a weight can come back; of equal weights the first is kept. Axis 1 of a linear layer's
    weight, and of a convolution's, are its inputs. Evaluation and saved weights have M * W as it is after the last
    step. On hardware with sparse tensor cores `torch.sparse.to_sparse_semi_structured` takes a saved 2:4 weight.
    """

    name: ClassVar = "n_m"
    cite: ClassVar = (
        "Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch, ICLR 2021,"
        " arXiv:2102.04010, equation 9"
    )
    usage: ClassVar = 'mask n_m on "blocks.**" & ndim(2) { n = 2, m = 4 }'
    targets: ClassVar = "parameters"
    functions: ClassVar = ("trainc.compiler.constructs.mask.n_m:sr_ste",)
    effects: ClassVar = (
        Effect("forward", "compute with n of m weights", ("params", "clock"), ("forward",)),
        Effect(
            "gradients",
            "decay the weights that are left out",
            ("gradient", "params", "clock"),
            ("gradient",),
        ),
        Effect("observe", "keep the masked weights for evaluation", ("params",), lasting=True),
    )

    n: int = Field(default=2, ge=1, description="weights of each group that are not zero")
    m: int = Field(default=4, ge=2, description="consecutive weights in a group, more than `n`")
    decay: Schedule = Field(
        default="2e-4",
        validate_default=True,
        description="strength of the decay of the weights that are left out; 0 is the plain straight-through estimator",
    )

    @model_validator(mode="after")
    def _leaves_weights_out(self) -> Self:
        if self.n >= self.m:
            raise ValueError(f"{self.n} of {self.m} weights leaves none out: write a smaller `n`")
        return self

    @property
    def structure(self) -> Structure:
        """Return what is chosen."""
        from trainc.runtime.mask.structures import Structure

        return Structure("n_m", (self.n, self.m))

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report tensors that are frozen or do not divide into groups of inputs."""
        for entry in bound.parameters:
            problem = self.structure.problem(entry.shape)
            if problem is None and "Conv1D" in entry.types:
                problem = "is of a Conv1D, whose axis 1 are its outputs"
            if problem is None and not entry.trainable:
                problem = "is frozen, so its weights cannot adapt"
            if problem is not None:
                yield Problem(
                    "wrong-target-kind",
                    f"`{entry.name}` {problem}",
                    help="exclude it from `on`, or choose another `m`",
                )
                return

    def lower(self, to: Lowering) -> None:
        """Change weights where layers compute, their gradients, and what evaluation uses."""
        from trainc.compiler.structure.computed_weights import refuse_lost_zeros

        to.refuse_times("the weights of the end are masked", "until", "every")
        names = [entry.name for entry in to.parameters()]
        for name in names:
            refuse_lost_zeros(to.model, name)
            to.weight(name, Masked(self.structure))
        decay = to.schedule(self.decay)
        to.gradient(DecayLeftOut(self.structure, decay), names)
        held = to.companion("masked", since="call", parameters=names)
        to.evaluate_with(held)
        to.action(KeepMasked(to.label, held, names, self.structure))

    def reference(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return M * W, group by group."""
        found = {}
        for name, weight in weights.items():
            found[name] = weight.detach().clone()
            for row in found[name].unbind():
                for group in row.split(self.m):
                    sizes = [(-abs(float(w)), place) for place, w in enumerate(group)]
                    group[[place for _, place in sorted(sizes)[self.n :]]] = 0
        return found


class Masked(WeightHook):
    """The largest weights of each group and zeros, whose gradient is that of all weights."""

    draws: ClassVar[bool] = False

    def __init__(self, structure: Structure) -> None:
        self.structure = structure

    def change_weight(self, weight: Tensor, at: LayerContext) -> Tensor:
        """Return M * W, straight through."""
        masked = weight.where(_mask(weight, self.structure), 0.0)
        return weight + (masked - weight).detach()


def _mask(weight: Tensor, structure: Structure) -> Tensor:
    """Return where the largest weights of each group are, bool."""
    return structure.largest_of_each(weight.detach().abs())


class DecayLeftOut(GradientTransform):
    """Phase 8: adds the decay of the weights that are left out to their gradients."""

    def __init__(self, structure: Structure, decay: Callable[[Clock], float]) -> None:
        self.structure, self.decay = structure, decay

    def change(self, gradients: Sequence[ParameterGradient], step: Step) -> None:
        decay = self.decay(step.clock)
        for one in gradients:
            kept = _mask(one.weight, self.structure)
            one.gradient.copy_(sr_ste(one.gradient, one.weight, kept, decay))


class KeepMasked(Action):
    """Phase 12: keeps the masked weights, with which evaluation goes on."""

    phase = Phase.OBSERVE

    def __init__(
        self, label: str, held: Companion, names: Sequence[str], structure: Structure
    ) -> None:
        self.name, self.held, self.names, self.structure = f"{label} keep", held, names, structure

    def run(self, step: Step) -> None:
        self.held.copy()
        for name in self.names:
            weight = self.held.values[name]
            weight.masked_fill_(~_mask(weight, self.structure), 0)


def sr_ste(gradient: Tensor, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
    """Return the gradient of a dense weight whose layer computed with `mask` * `weight` (SR-STE).

    It is `gradient` + `decay` * (1 - `mask`) * `weight`: `gradient`, of one shape with the others, is that of the
    masked weight, taken as that of all weights; `mask` is bool, True where weights were not zero.

    Raises ValueError for shapes that differ and for a `mask` that is not bool. Source: Zhou et al., arXiv:2102.04010,
    equation 9.
    """
    if not gradient.shape == weight.shape == mask.shape:
        shapes = [list(t.shape) for t in (gradient, weight, mask)]
        raise ValueError(f"expected one shape of gradient, weight and mask, not {shapes}")
    if str(mask.dtype) != "torch.bool":
        raise ValueError(f"expected a bool mask, not {mask.dtype}: write `mask != 0`")
    return gradient + decay * weight.detach().masked_fill(mask, 0)
