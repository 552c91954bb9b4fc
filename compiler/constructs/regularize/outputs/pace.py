"""PACE: a penalty on the difference between two noisy passes of the same examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from trainc.compiler.constructs.regularize.outputs import _two_views
from trainc.compiler.constructs.regularize.outputs._noise import Noise
from trainc.dsl.reading.construct import Construct, Problem, Schedule
from trainc.dsl.text.vocabulary import PLACES
from trainc.dsl.values.value_json import Binary, Call, Expr, Name, Quantity, Unary, to_json, walk

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.method.term import Forward
    from trainc.compiler.structure.places import Place


class Pace(Construct):
    """Passes every example twice, with noise on the selected outputs, and penalizes the difference of the results.

    The output h of a selected layer becomes z * h with z = 1 + sigma * Normal(0, 1), drawn for each
    step, view, example and channel. Of a frozen layer with an adapter select the adapter:
    h = h0 + z * dh. The loss is that of the first view plus `weight` times the mean over the targets
    that count of the distance of the two views' logits there: the sum over classes of
    (l1 - l2)^2, or (KL(p || q) + KL(q || p)) / 2 of their softmaxes. Both views have gradients and
    the same dropout masks; evaluation has no noise. The published linear schedule, without noise in
    block 0, is `1.2 * min(block, 1) * (blocks - block) / (blocks - 1)`.
    """

    cite: ClassVar = (
        "Ni, Zhang and Koniusz, PACE: Marrying Generalization in Parameter-Efficient Fine-Tuning "
        "with Consistency Regularization, NeurIPS 2024, arXiv:2409.17137"
    )
    usage: ClassVar = (
        'regularize pace on "blocks.*.mlp.**" & type(Linear) '
        "{ sigma = 1.2 * (1 - depth), weight = 0.5, mode = pair }"
    )
    targets: ClassVar = "modules"
    identity: ClassVar = {"weight": "0", "sigma": "0"}
    effects: ClassVar = (_two_views.two_views("pass two noisy views"),)
    rules: ClassVar = _two_views.RULES

    sigma: Schedule = Field(
        description="standard deviation of the factor on an output; may use `depth`, `block` and `blocks`"
    )
    weight: Schedule = Field(description="coefficient of the distance in the loss")
    mode: Literal["pair"] = Field(
        default="pair", description="where the second view comes from: a second pass in each step"
    )
    distance: Literal["mse", "kl"] = Field(
        default="mse",
        description="squared distance of the logits, or mean of the two KL divergences of the softmaxes",
    )
    share: Literal["token", "none"] = Field(
        default="token",
        description="whether the tokens of an example share the noise, or each has its own",
    )

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report layers that cannot have noise; warn of BatchNorm and of a sigma that is 0."""
        linear = "select Linear layers: `& type(Linear)`"
        wrong = [m for m in bound.modules if "Linear" not in m.types]
        if wrong:
            message = f"`{wrong[0].name}` is a {wrong[0].types[0]}; noise is supported for Linear layers only"
            more = (
                (f"other selected modules that are not Linear: {len(wrong) - 1}",)
                if wrong[1:]
                else ()
            )
            yield Problem("wrong-target-kind", message, notes=more, help=linear)
        inner = [m.name for m in bound.modules if "NonDynamicallyQuantizableLinear" in m.types]
        if inner:
            message = (
                f"`{inner[0]}` is never called: nn.MultiheadAttention uses its weight directly"
            )
            yield Problem("wrong-target-kind", message, help="exclude it from `on`")
        yield from _two_views.batch_norm_problems(bound)
        if bound.modules and all(is_zero(self.sigma, m.place) for m in bound.modules):
            message = "`sigma` is 0 in every selected layer, so the two views are equal"
            yield Problem("no-effect", message, field="sigma", severity="warning")

    def lower(self, to: Lowering) -> None:
        """Put noise on every layer whose sigma is not always 0, and compare the two views."""
        noisy = [m for m in to.modules() if not is_zero(self.sigma, m.place)]
        for module in noisy:
            sigma = to.schedule(self.sigma, module.place)
            to.layer(module.name, Noise(self.share), {"sigma": sigma})
        if noisy:
            from trainc.kernels.loss.consistency import Consistency

            consistency = Consistency(self.distance)
            to.views(2, share_dropout=True)
            to.term(
                lambda forward: consistency(forward.logits, _rows(forward)),
                over="targets",
                metric="consistency",
                weight=self.weight,
                joint=consistency,
                of_classes=self.distance == "kl",
                what=f"distance of the two views (noise at {len(noisy)} layers)",
            )

    def reference(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        factors: Mapping[str, Tensor],
        weight: float,
    ) -> dict[str, Tensor]:
        """Return `loss`, its parts `data_loss` and `consistency`, and the `logits` of both views.

        `factors[name]` is z for the output of module `name`, shape (2B, 1 or T, C) or (2B, C).
        """
        import torch
        from torch.nn.functional import cross_entropy

        with ExitStack() as hooks:
            for name, z in factors.items():
                module = model.get_submodule(name)
                hooks.callback(module.register_forward_hook(_multiply(z)).remove)
            logits = model(torch.cat([inputs, inputs]))
        one, two = logits.chunk(2)
        data_loss = cross_entropy(one.flatten(0, -2), targets.flatten())
        consistency = self.distance_of(one, two)
        loss = data_loss + weight * consistency
        return {"loss": loss, "data_loss": data_loss, "consistency": consistency, "logits": logits}

    def distance_of(self, one: Tensor, two: Tensor) -> Tensor:
        """Return the distance of two views' logits (..., C), 0-d, by definition."""
        if self.distance == "mse":
            return (one - two).square().sum(-1).mean()
        p, q = one.log_softmax(-1), two.log_softmax(-1)
        return ((p.exp() - q.exp()) * (p - q)).sum(-1).mean() / 2


def _rows(forward: Forward) -> Tensor | None:
    """Return which rows of a view's logits count, None for all: where the targets are no class of each row."""
    counted = forward.counted
    return counted if counted.shape == forward.view(0).shape[:-1] else None


def _multiply(z: Tensor) -> Any:
    return lambda module, args, out: out * z


def is_zero(sigma: Expr, place: Place) -> bool:
    """Say whether the expression shows that sigma is zero at a place for the whole run."""
    if isinstance(sigma, Binary) and sigma.op == "*":
        return is_zero(sigma.left, place) or is_zero(sigma.right, place)
    if isinstance(sigma, Unary):
        return is_zero(sigma.x, place)
    return _fixed(sigma) and _now(sigma, place) == 0


def _fixed(expression: Expr) -> bool:
    """Say whether an expression depends on the place alone, and not on the clock or a signal."""
    from trainc.runtime.schedule.operations import MATHS

    parts = list(walk(expression))
    moving = any(isinstance(part, Call) and part.function not in MATHS for part in parts)
    named = {part.id for part in parts if isinstance(part, Name)}
    timed = any(isinstance(part, Quantity) for part in parts)
    return not moving and not timed and named <= set(PLACES)


def _now(expression: Expr, place: Place) -> float:
    from trainc.runtime.schedule.clock import Clock, RunLength
    from trainc.runtime.schedule.schedules import compile_schedule
    from trainc.runtime.schedule.unit_conversion import UnitConversion

    values = {name: float(getattr(place, name)) for name in PLACES}
    return compile_schedule(to_json(expression), UnitConversion(), RunLength(1, "steps"))(
        Clock(), values
    )
