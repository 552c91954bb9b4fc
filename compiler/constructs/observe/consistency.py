"""Expected consistency: how far two noisy passes would be apart, from one backward pass without noise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from trainc.compiler.bind.linear_outputs import linear_outputs, output_problems
from trainc.dsl.reading.construct import Construct, Effect, Problem, Schedule, Signal
from trainc.runtime.step.action import ActionState
from trainc.runtime.step.observer import Observer, Seen
from trainc.runtime.storage.form import Count, Form, Number, Record

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.method.lowered_method import Scheduled
    from trainc.runtime.companion.companion import Companion
    from trainc.runtime.processes.replica_group import ReplicaGroup
    from trainc.runtime.step.record import Step

QUANTILE = 1.96
"""Of the standard normal distribution: the interval holds the value in 95 of 100 observations."""


class Consistency(Construct):
    """Reports how far two noisy passes of the step's examples would be apart, to first order; changes nothing.

    Where the output h of each selected layer, or the dh of its adapter, were multiplied by 1 + sigma *
    Normal(0, 1), drawn for each pass, example and channel, the logits f of the two passes would differ by
    E sum (f1 - f2)^2 = 2 sum_l sigma_l^2 sum_c (sum_t h_tc df/dh_tc)^2 for small sigma: a sum over the
    layers l, channels c and logits, with t over the tokens of an example. `expected` is the mean of this
    over the counted targets, which is what `regularize pace` with `distance = mse` measures by a second
    pass, at the noise-free model: the step's examples pass once more, in evaluation mode.

    One backward pass gives the derivatives of one number. It is v f with a random sign v for every logit,
    drawn anew each time: the mean of (sum_t h_tc d(v f)/dh_tc)^2 over the signs is the sum over all
    logits. `low` and `high` are the ends of a 95% interval over examples and signs; a step of one example
    has none. `share = none` is of noise that each token has for itself: then the sum over t is outside of
    the square. Replicas draw signs by the places of examples in each: another estimate than that of one
    process.
    """

    cite: ClassVar = (
        "Ni, Zhang and Koniusz, PACE: Marrying Generalization in Parameter-Efficient Fine-Tuning with "
        "Consistency Regularization, NeurIPS 2024, arXiv:2409.17137, theorem 2; with one random sign a logit: "
        "Hutchinson, Communications in Statistics 19 (1990) 433"
    )
    usage: ClassVar = (
        'observe consistency on "blocks.*.mlp.**" & type(Linear) every 100 steps '
        "{ sigma = 1.2 * (1 - depth) }"
    )
    default_every: ClassVar = "100 steps"
    targets: ClassVar = "modules"
    signals: ClassVar = {
        "expected": Signal(
            "expected squared distance of two noisy passes' logits, to first order",
            ends=("low", "high"),
            title="expected",
            logarithmic=True,
        ),
        "low": "lower end of the interval of `expected`",
        "high": "upper end of the interval of `expected`",
    }
    effects: ClassVar = (
        Effect(
            "observe",
            "pass the examples once more and derive their logits",
            ("params", "inputs", "forward", "clock"),
            ("metrics", *(f"signal:{name}" for name in signals)),
        ),
    )

    sigma: Schedule = Field(
        description="standard deviation of the factor on an output; may use `depth`, `block` and `blocks`"
    )
    share: Literal["token", "none"] = Field(
        default="token",
        description="whether the tokens of an example share the noise, or each has its own; nothing is drawn, so"
        " there is no `none_fast`",
    )

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report layers that cannot have noise."""
        yield from output_problems(bound.modules, bound.inventory, "noise")

    def lower(self, to: Lowering) -> None:
        """Read the steps with a copy of the model that has the model's own weights."""
        sites = linear_outputs(to.modules(), to.inventory)
        sigmas = {site.module.name: to.schedule(self.sigma, site.module.place) for site in sites}
        twin = to.companion("twin", since="call", parameters=())
        to.observe(Expected(self, twin, sigmas))

    def reference(self, model: nn.Module, inputs: Tensor, sigmas: Mapping[str, float]) -> Tensor:
        """Return the first-order expected distance of each example, (B,), by a backward pass for every logit."""
        import torch

        outputs: dict[str, Tensor] = {}
        handles = [
            model.get_submodule(name).register_forward_hook(partial(_keep, outputs, name))
            for name in sigmas
        ]
        logits = model(inputs)
        for handle in handles:
            handle.remove()
        found: Tensor = logits.new_zeros(len(inputs))
        for b in range(len(inputs)):
            for f in logits[b].flatten():
                gradients = torch.autograd.grad(f, [*outputs.values()], retain_graph=True)
                for (name, h), gradient in zip(outputs.items(), gradients, strict=True):
                    products = (h[b] * gradient[b]).reshape(-1, h.shape[-1]).detach()
                    if self.share == "token":
                        products = products.sum(0)
                    found[b] += 2 * sigmas[name] ** 2 * products.square().sum()
        return found


def _keep(outputs: dict[str, Tensor], name: str, module: nn.Module, args: Any, out: Tensor) -> None:
    outputs[name] = out


class Expected(Observer):
    """Phase 12: keeps the squared derivatives of every example by layer, until the step's sigma is known."""

    def __init__(
        self, construct: Consistency, twin: Companion, sigmas: Mapping[str, Scheduled]
    ) -> None:
        self.share, self.twin, self.sigmas = construct.share, twin, sigmas
        self.weights = [0.0] * len(sigmas)
        self.squares: list[Tensor] = []
        self.counts: list[Tensor] = []
        self.drawn = 0
        """In how many steps signs were drawn, which is the seed of the next ones."""
        self.first = self.last = math.nan

    def see(self, forward: Seen) -> None:
        import torch

        from trainc.compiler.model.undisturbed import keep_state

        if not self.squares:
            self.twin.copy()  # of buffers; the parameters are the model's own
        module = self.twin.module
        probes: dict[str, Tensor] = {}
        examples = len(forward.counted)
        handles = [
            module.get_submodule(name).register_forward_hook(
                partial(self._scale, probes, name, examples)
            )
            for name in self.sigmas
        ]
        try:
            with torch.enable_grad(), keep_state(module):
                logits = forward.logits_of_module(module)
                self._require(probes)
                counted = _rows_counted(forward.counted, logits)
                total = (logits * self._signs(logits) * counted).sum()
                gradients = torch.autograd.grad(total, [*probes.values()])
        finally:
            for handle in handles:
                handle.remove()
        wide = torch.promote_types(logits.dtype, torch.float32)
        found = [one.detach().to(wide).flatten(1).square().sum(1) for one in gradients]
        by_name = dict(zip(probes, found, strict=True))
        self.squares.append(torch.stack([by_name[name] for name in self.sigmas], 1))
        rows = counted.expand(*logits.shape[:-1], 1) if logits.dim() > 1 else counted
        self.counts.append(rows.reshape(examples, -1).sum(1).to(wide))

    def _require(self, probes: Mapping[str, Tensor]) -> None:
        """Raise SiteError for a layer that the pass did not call, such as one whose weight is another's to use."""
        from trainc.compiler.errors import SiteError

        missing = next((name for name in self.sigmas if name not in probes), None)
        if missing is not None:
            raise SiteError(
                f"`{missing}` is not called in a pass of the copy of the model that is measured, so its output has no"
                " derivative: exclude it from `on`, or remove the clause that runs the layer in another way",
                self.name,
            )

    def _scale(
        self,
        probes: dict[str, Tensor],
        name: str,
        examples: int,
        module: nn.Module,
        args: Any,
        out: Tensor,
    ) -> Tensor:
        """Return the output times 1 + p; the derivative by p is the sum over tokens of h df/dh."""
        import torch

        from trainc.compiler.errors import ExampleAxisUnknown

        if out.shape[0] != examples:
            raise ExampleAxisUnknown(
                f"`{name}` gives an output of shape {tuple(out.shape)}, but the batch has {examples} examples. Noise by"
                " example needs them on the first axis: exclude the layer from `on`",
                self.name,
            )
        if name not in probes:
            tokens = [1] * (out.dim() - 2) if self.share == "token" else out.shape[1:-1]
            shape = (examples, *tokens, out.shape[-1])
            probes[name] = torch.zeros(
                shape, dtype=out.dtype, device=out.device, requires_grad=True
            )
        return out * (1 + probes[name])

    def _signs(self, logits: Tensor) -> Tensor:
        """Return a random sign for every logit: of an example's place in the step, however this is divided."""
        from trainc.kernels.noise.normals import normal

        first = sum(map(len, self.counts))
        drawn = normal(
            (self.drawn, 0), 0, 1, len(logits), logits[0].numel(), None, first, logits.device
        )
        return drawn.sign().reshape(logits.shape).to(logits.dtype)

    def run(self, step: Step) -> None:
        self.weights = [2 * sigma(step.clock) ** 2 for sigma in self.sigmas.values()]
        super().run(step)
        self.drawn += 1

    def found(self, replicas: ReplicaGroup | None = None) -> Mapping[str, float]:
        """Return the mean over the counted targets and its interval over examples, of all replicas."""
        import torch

        own = torch.zeros(0, 1 + len(self.weights), dtype=torch.float64)
        if self.squares:
            numbers = torch.cat(self.counts).unsqueeze(1), torch.cat(self.squares)
            own = torch.cat(numbers, 1).double().cpu()
        if replicas is not None:
            own = replicas.gather_examples(own)
        counts, squares = own[:, 0], own[:, 1:]
        if not float(counts.sum()):
            return {}
        each = squares @ torch.tensor(self.weights, dtype=torch.float64)
        mean = float(each.sum() / counts.sum())
        self.first = mean if self.first != self.first else self.first
        self.last = mean
        if len(each) < 2:
            return {"expected": mean}
        spread = float((each - mean * counts).square().sum()) * len(each) / (len(each) - 1)
        error = QUANTILE * math.sqrt(spread) / float(counts.sum())
        return {"expected": mean, "low": max(0.0, mean - error), "high": mean + error}

    def forget(self) -> None:
        self.squares, self.counts = [], []

    def state_dict(self) -> ActionState:
        if self.last != self.last:
            return {}
        return {"drawn": self.drawn, "first": self.first, "last": self.last}

    def state_form(self) -> Form:
        return Record({}, {"drawn": Count(), "first": Number(0), "last": Number(0)})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.drawn = state.get("drawn", 0)
        self.first, self.last = (state.get(n, math.nan) for n in ("first", "last"))

    def summary(self) -> str | None:
        if self.last != self.last:
            return None
        return f"{self.name}: expected consistency {self.first:.4g} -> {self.last:.4g}"


def _rows_counted(counted: Tensor, logits: Tensor) -> Tensor:
    """Return which rows of logits count, (..., 1); all where the targets are no class of each row."""
    import torch

    if logits.dim() == 1:
        return torch.ones_like(logits)
    if counted.shape != logits.shape[:-1]:
        counted = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    return counted.unsqueeze(-1)
