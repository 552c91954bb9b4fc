"""PACE: a penalty on the difference between two noisy passes of the same examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from trainc.compiler.bind.linear_outputs import (
    LinearOutput,
    linear_outputs,
    output_problems,
)
from trainc.compiler.constructs.regularize.outputs import _two_views
from trainc.compiler.constructs.regularize.outputs._divergence import weighted_mean
from trainc.compiler.constructs.regularize.outputs._noise import Noise, Share
from trainc.dsl.reading.construct import Construct, Effect, Problem, Schedule
from trainc.dsl.reading.field_types import word_or_call
from trainc.dsl.text.vocabulary import PLACES
from trainc.dsl.values.functions import Function
from trainc.dsl.values.value_json import (
    Binary,
    Call,
    Expr,
    Name,
    Number,
    Quantity,
    Unary,
    to_json,
    walk,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.method.term import Forward
    from trainc.compiler.structure.places import Place


_LAZY = {"lazy": Function({"every": "plain"}, 1, 1)}
Mode = Annotated[str | Call, word_or_call("mode", ("pair", "history"), _LAZY)]


def lazy_period(mode: Call) -> int:
    """Return N of `lazy(N)`; raises ValueError unless it is a whole number, 1 or more."""
    given = [*mode.args, *dict(mode.kwargs).values()][0]
    if not isinstance(given, Number) or given.value < 1 or given.value != int(given.value):
        raise ValueError(f"`{mode}`: expected a whole number of steps, 1 or more, as in `lazy(4)`")
    return int(given.value)


_ACTIONS = {
    "pair": "pass two noisy views",
    "lazy": "add noise, and pass two noisy views once in N steps",
    "history": "add noise, and compare with the logits of the sample's last visit",
}
"""What a step does, by mode."""


class Pace(Construct):
    """Passes every example twice, with noise on the selected outputs, and penalizes the difference of the results.

    The output h of a selected linear layer becomes z * h with z = 1 + sigma * Normal(0, 1), drawn for
    each step, view, example and channel. A layer with an adapter, of `adapt` or of peft's LoRA or DoRA, is
    h0 + z * dh with dh of the adapter; so it is where a module inside such a layer is selected. A head
    is a layer like others. The loss is that of the first view plus `weight` times the mean over the
    targets that count of the distance of the two views' logits there: the sum over classes of
    (l1 - l2)^2, or (KL(p || q) + KL(q || p)) / 2 of their softmaxes. Both views have gradients and the
    same masks of dropout and drop path; evaluation has no noise. The published linear schedule, without
    noise in block 0, is `1.2 * min(block, 1) * (blocks - block) / (blocks - 1)`.

    With `lazy(N)` there are two views in one of N steps, the first of them at `from`; the others pass the
    whole batch once, with noise. With `history` every step passes once, and the second logits are those
    that the sample had when it was last seen, without gradient: 0 is added for a sample that comes for
    the first time. They are kept in 16 bits, as many numbers a sample as it has logits, and numbered by
    sample ids: a loop of one's own gives these to `program.step`. Of `lazy` a larger `weight` is
    advised, of `history` a larger `sigma` and a smaller `weight`.
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
    effects: ClassVar = (
        _two_views.two_views(_ACTIONS["pair"]),
        _two_views.two_views(_ACTIONS["lazy"]),
        Effect("forward", _ACTIONS["history"], ("inputs", "forward", "clock"), ("forward", "loss")),
        Effect("observe", "keep the logits of every sample", ("forward",), ("metrics",)),
    )
    functions: ClassVar = (
        "trainc.compiler.constructs.regularize.outputs._distances:consistency",
        "trainc.compiler.constructs.regularize.outputs.pace:pace_sigma",
    )

    sigma: Schedule = Field(
        description="standard deviation of the factor on an output; may use `depth`, `block` and `blocks`"
    )
    weight: Schedule = Field(description="coefficient of the distance in the loss")
    mode: Mode = Field(
        default="pair",
        description="what is compared with the first view: a second in each step (`pair`), or in one of N steps"
        " (`lazy(N)`), or the sample's last logits (`history`)",
    )
    distance: Literal["mse", "kl"] = Field(
        default="mse",
        description="squared distance of the logits, or mean of the two KL divergences of the softmaxes",
    )
    share: Share = Field(
        default="token",
        description="whether the tokens of an example share the noise, or each has its own; `none_fast` is `none` by"
        " approximate functions on CUDA, in half the instructions, where Normal is off by 6e-6, and by 6e-4 near 0",
    )
    max_table: float = Field(
        default=4.0, gt=0, description="largest table of `mode = history`, in GiB"
    )

    @field_validator("mode")
    @classmethod
    def _counts_steps(cls, value: str | Call) -> str | Call:
        if isinstance(value, Call):
            lazy_period(value)
        return value

    def performs(self, effect: Effect) -> bool:
        """Say whether this clause performs an effect: what it compares is a matter of `mode`."""
        mode = self.mode if isinstance(self.mode, str) else self.mode.function
        return effect.action == _ACTIONS[mode] if effect.phase == "forward" else mode == "history"

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report layers that cannot have noise; warn of a sigma that is 0."""
        yield from output_problems(bound.modules, bound.inventory, "noise")
        sites = linear_outputs(bound.modules, bound.inventory)
        if sites and all(is_zero(self.sigma, site.module.place) for site in sites):
            message = "`sigma` is 0 in every selected layer, so the two views are equal"
            yield Problem("no-effect", message, field="sigma", severity="warning")

    def lower(self, to: Lowering) -> None:
        """Put noise on every layer whose sigma is not always 0, and compare the two views."""
        sites = linear_outputs(to.modules(), to.inventory)
        noisy = [site for site in sites if not is_zero(self.sigma, site.module.place)]
        for site in noisy:
            sigma = to.schedule(self.sigma, site.module.place)
            to.layer(site.module.name, Noise(self.share), {"sigma": sigma})
        if noisy and self.mode == "history":
            self._compare_with_history(to, noisy)
        elif noisy:
            self._compare_views(to, noisy)

    def _compare_views(self, to: Lowering, noisy: Sequence[LinearOutput]) -> None:
        from trainc.kernels.loss.consistency import Consistency

        consistency = Consistency(self.distance)
        every = None if isinstance(self.mode, str) else lazy_period(self.mode)
        to.views(2, share_dropout=True, every=every)
        to.term(
            lambda forward: consistency(forward.logits, _rows(forward)),
            over="targets",
            metric="consistency",
            weight=self.weight,
            joint=consistency,
            of_classes=self.distance == "kl",
            what=f"distance of the two views{_where(noisy)}",
            every=every,
        )

    def _compare_with_history(self, to: Lowering, noisy: Sequence[LinearOutput]) -> None:
        history = to.history(self.max_table, "mode", "use `mode = lazy(4)`")

        def value(forward: Forward) -> Tensor:
            last, known = forward.previous(history)
            return self.history_distance(forward.view(0), last, known, _rows(forward))

        to.term(
            value,
            over="targets",
            metric="consistency",
            weight=self.weight,
            histories=[history],
            of_classes=self.distance == "kl",
            what=f"distance from the logits of the sample's last visit{_where(noisy)}",
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
        from trainc.compiler.constructs.regularize.outputs._distances import consistency

        return consistency(one, two, measure=self.distance)

    def history_distance(
        self, logits: Tensor, last: Tensor, known: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Return the distance of logits (B, ..., C) from those of the samples' last visits, 0-d, in float32 at least.

        `last` has no gradient. The mean runs over all rows, or by their `weights` (B, ...); a sample that is not
        `known` (B,) adds 0.
        """
        import torch

        from trainc.compiler.constructs.regularize.outputs._distances import consistency

        dtype = torch.promote_types(logits.dtype, torch.float32)
        if logits.dim() == 1:
            logits, last = logits.unsqueeze(-1), last.unsqueeze(-1)
        rows = known.view(-1, *[1] * (logits.dim() - 2)).expand(logits.shape[:-1])
        weights = torch.ones_like(rows) if weights is None else weights
        # Whatever the other rows hold, no gradient meets it.
        used = (rows & (weights != 0)).unsqueeze(-1)
        one, two = (x.to(dtype).where(used, 0.0) for x in (logits, last.detach()))
        each = consistency(one, two, measure=self.distance, reduce="none")
        return weighted_mean(each, weights)


def pace_sigma(depths: int | Sequence[int], sigma: float, skip: int = 0) -> list[float]:
    """Return the published schedule of the noise: it falls linearly with the block, the head counting as the last.

    `depths` is the number B of blocks with the head, or the block of each site, from 0: B is then the highest plus 1.
    `sigma` is the standard deviation in the first noisy block, 0 or more. Blocks below `skip` have no noise: 1 for
    ViT-B and 0 for Swin-B in the paper.

    Returns a number for each depth: 0 below `skip`, then sigma * (B - b) / (B - skip) in block b. Raises ValueError for
    depths that are not whole numbers from 0, without any noisy block, and for a negative sigma.

    Source: the official code of PACE, Ni et al. 2024, arXiv:2409.17137.
    """
    given = [*range(depths)] if isinstance(depths, int) else [float(b) for b in depths]
    blocks = int(max(given, default=-1)) + 1
    if any(b != int(b) or b < 0 for b in given) or not 0 <= skip < blocks:
        raise ValueError(
            f"`depths` must be blocks from 0, of which one at least is not below `skip`, not {depths!r} with"
            f" skip = {skip!r}"
        )
    if not sigma >= 0:
        raise ValueError(f"`sigma` must be 0 or more, not {sigma!r}")
    return [sigma * (blocks - b) / (blocks - skip) if b >= skip else 0.0 for b in given]


def _where(noisy: Sequence[LinearOutput]) -> str:
    """Return where the noise is, for the plan and the summary."""
    adapters = sum(site.of_adapter for site in noisy)
    of_these = f", at {adapters} on the output of the adapter" if adapters else ""
    return f" (noise at {len(noisy)} layers{of_these})"


def _rows(forward: Forward) -> Tensor | None:
    """Return what each row of a view's logits weighs, None where all weigh the same: the targets are none of rows."""
    weights = forward.target_weights
    return weights if weights.shape == forward.view(0).shape[:-1] else None


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
