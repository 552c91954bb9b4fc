"""PAC-tuning: weight noise whose size is learned, under a PAC-Bayes bound."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from trainc.compiler.errors import FieldError
from trainc.compiler.method.weight_hook import WeightHook
from trainc.compiler.model.adapter_rule import AdapterRule
from trainc.dsl.reading.construct import Construct, Duration, Effect, Problem
from trainc.runtime.step.action import Action, Phase

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.adapting import Adapting
    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.method.layer_hook import LayerContext
    from trainc.compiler.method.term import Forward
    from trainc.compiler.model.inventory import Inventory, ModuleEntry
    from trainc.runtime.schedule.gate import Gate
    from trainc.runtime.step.record import Step

LEAST = 1e-4
"""The least mean magnitude of a weight that its first noise is taken from: a bias may be all zeros."""


class PacNoise(Construct, AdapterRule):
    """Lets layers compute with W + exp(p) * e in place of W, and learns the log sizes p of the noise.

    e is standard normal, cut off at -2 and 2, drawn once for each step and entry. p is one number for each tensor, or
    for each entry (`levels = per_parameter`), and b one log size of the prior for each tensor; they train beside the
    model as `LAYER.pac_noise.log_sigma_weight` and `LAYER.pac_noise.log_prior_weight`, and likewise `_bias`. The loss
    has KL / (`gamma` n) added, where n is the number of training samples and KL, between Normal(W, exp(p)^2) and
    Normal(W0, exp(b)^2) around the start W0, the sum over tensors of d entries of
    (sum e^(2p - 2b) - d - 2 sum p + 2 d b + |W - W0|^2 e^(-2b)) / 2. As published, W trains on the loss alone, so that
    KL has no gradient of it; what the bound has beside KL does not change with p and b, and is left out.

    In a second stage, after `learn`, p and b stay as they are, and the loss is that of the noisy weights alone.
    Evaluation has no noise. Give p and b an optimizer clause of their own, with a rate near 0.1 and no weight decay:
    `optimizer adamw on "**.pac_noise.*" { lr = 0.1, weight_decay = 0 }`. Besides p and b, with their optimizer's state,
    a copy of the start is kept. Entries that a mask does not train have no noise.
    """

    cite: ClassVar = (
        "Liu, Li, Zhao and Wang, PAC-tuning: Fine-tuning Pretrained Language Models with PAC-driven Perturbed Gradient"
        " Descent, EMNLP 2023, arXiv:2310.17588"
    )
    usage: ClassVar = (
        'perturb pac_noise on "blocks.*.mlp.**" & type(Linear) { gamma = 10, samples = 1000 }'
    )
    targets: ClassVar = "modules"
    functions: ClassVar = ("trainc.compiler.constructs.perturb.pac_noise:pac_kl",)
    effects: ClassVar = (
        Effect("forward", "add learned noise to weights", ("params", "clock"), ("forward", "loss")),
        Effect(
            "reduce", "keep the sizes as they are in the second stage", ("clock",), ("gradient",)
        ),
        Effect("observe", "keep the weights at the start", ("params",)),
    )

    gamma: float = Field(default=10.0, gt=0, description="the bound's gamma, 5 to 10 in the paper")
    levels: Literal["per_tensor", "per_parameter"] = Field(
        default="per_tensor",
        description="whether each tensor or each entry has a size of its noise",
    )
    samples: int | None = Field(
        default=None,
        ge=1,
        description="samples of the training data, n; those of the data clause unless given",
    )
    start: Literal["square", "mean"] = Field(
        default="square",
        description="the first size of a tensor's noise: the squared mean of |W|, as for pretrained layers, or the"
        " mean, as for a new head",
    )
    learn: Duration | None = Field(
        default=None, description="how long the sizes are learned; in the whole run unless given"
    )

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report layers without parameters of their own, and with shared ones."""
        for entry in bound.modules:
            names = _own(entry, bound.inventory)
            if not names:
                yield Problem(
                    "wrong-target-kind",
                    f"`{entry.name}` ({entry.types[0]}) has no floating-point parameters of its own",
                    help="select the layers that hold the weights, such as `& type(Linear)`",
                )
            for name in names:
                if len(bound.inventory.parameter[name].modules) > 1:
                    yield Problem(
                        "wrong-target-kind",
                        f"`{name}` is shared by several layers, and its noise would have a size in each",
                        help=f"exclude `{entry.name}` from `on`",
                    )

    # beside the model

    def adapt(self, to: Adapting) -> None:
        """Add the log sizes to the layers."""
        for entry in to.modules():
            shapes = {
                name.rpartition(".")[2]: to.base.parameter[name].shape
                for name in _own(entry, to.base)
            }
            to.add(entry.name, partial(self.make_parts, shapes), partial(self.first, [*shapes]))

    def make_parts(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, nn.Parameter]:
        """Return the log sizes for parameters of these shapes, by name."""
        import torch
        from torch import nn

        made = {}
        for own, shape in shapes.items():
            # `fully_shard` takes no 0-d parameters, and would fail before the clause can say why it is refused.
            size = tuple(shape) if self.levels == "per_parameter" and shape else (1,)
            made[f"log_sigma_{own}"] = nn.Parameter(torch.empty(size))
            made[f"log_prior_{own}"] = nn.Parameter(torch.empty(1))
        return made

    def first(self, names: Iterable[str], layer: nn.Module) -> dict[str, Tensor]:
        """Return what the log sizes of a layer start from, by name."""
        found: dict[str, Tensor] = {}
        for own in names:
            mean = layer.get_parameter(own).detach().double().abs().mean().clamp(min=LEAST).log()
            value = 2 * mean if self.start == "square" else mean
            found |= {f"log_sigma_{own}": value, f"log_prior_{own}": value}
        return found

    def initialize(self, name: str, tensor: Tensor, generator: Generator) -> None:
        """Fill a log size, which `first` then sets."""
        tensor.zero_()

    def change_output(
        self, layer: nn.Module, adapter: nn.Module, inputs: tuple[Any, ...], output: Any
    ) -> Any:
        """Return the layer's own output: only its weights are changed."""
        return output

    def merge(self, layer: nn.Module, adapter: nn.Module) -> None:
        """Do nothing: without noise the layer computes with its own weights."""

    # training

    def performs(self, effect: Effect) -> bool:
        """Say whether there is a second stage."""
        return effect.phase != "reduce" or self.learn is not None

    def lower(self, to: Lowering) -> None:
        """Change the weights where layers compute with them, and add the bound to the loss."""
        from trainc.runtime.companion.start import Anchors

        owners = {n: e.name for e in to.modules() for n in _own(e, to.inventory)}
        to.refuse_shards(
            owners,
            "it keeps the start of whole weights",
            "Use DistributedDataParallel, or remove the clause",
        )
        samples = self.samples or to.training_samples
        if samples is None:
            raise FieldError(
                "samples", "the data does not say how many samples it has: write `samples = 1000`"
            )
        starts = {name: to.tensor(name).detach().clone() for name in owners}
        levels = {name: _levels(name, layer, self.name) for name, layer in owners.items()}
        for name in owners:
            to.weight(name, LearnedNoise(self.name))
        first = None if self.learn is None else to.window(None, self.learn, None)
        keys = {name: f"{to.label}:start:{name}" for name in owners}

        def value(forward: Forward) -> Tensor:
            found, now = [], forward.parameters
            for name, (sigma, prior) in levels.items():
                weight, start = now[name].detach(), forward.tensors[keys[name]]
                size = now[sigma] if now[sigma].shape == weight.shape else now[sigma].squeeze()
                found.append(pac_kl([weight], [start], [size], [now[prior].squeeze()]))
            kl: Tensor = sum(found[1:], start=found[0])
            return kl / (self.gamma * samples) * forward.tensors["learning"]

        learning = {"learning": lambda clock: float(first is None or first.fires(clock))}
        tensors = {keys[name]: start for name, start in starts.items()}
        to.term(value, over="parameters", scalars=learning, tensors=tensors)
        to.action(Anchors(to.label, lambda: {name: to.tensor(name) for name in owners}, starts))
        if first is not None:
            names = [name for pair in levels.values() for name in pair]
            to.action(Keep(f"{to.label} second stage", first, names))

    @staticmethod
    def reference(weight: Tensor, noise: Tensor, log_sigma: Tensor) -> Tensor:
        """Return what a layer computes with, by definition, from standard normal `noise`."""
        return weight + log_sigma.exp() * noise.clip(-2, 2)


def pac_kl(
    weights: Sequence[Tensor],
    starts: Sequence[Tensor],
    log_sigmas: Sequence[Tensor],
    log_priors: Sequence[Tensor],
) -> Tensor:
    """Compute the divergence of normal weights from a prior around their start: the KL of PAC-tuning's bound.

    The `weights` and their `starts` are lists of tensors of equal shapes. `log_sigmas` has the logarithm of the
    standard deviation of each tensor, in its shape or 0-d, and `log_priors` that of its prior, 0-d.

    Returns KL(Normal(w, e^2p) || Normal(w0, e^2b)) summed over all entries, in nats, 0-d and in float32 at least, with
    gradients of all of them. Raises ValueError where the lists differ in length, or shapes do not fit.

    Source: PAC-tuning, Liu et al. 2023, arXiv:2310.17588.
    """
    import torch

    if len({len(given) for given in (weights, starts, log_sigmas, log_priors)}) != 1 or not weights:
        raise ValueError("expected lists of one length, with a tensor or more in each")
    total = None
    for w, w0, p, b in zip(weights, starts, log_sigmas, log_priors, strict=True):
        if w.shape != w0.shape or p.shape not in ((), w.shape) or b.dim():
            raise ValueError(
                f"a weight of shape {list(w.shape)} needs a start of this shape, a log sigma of this shape or 0-d and a"
                f" 0-d log prior, not {list(w0.shape)}, {list(p.shape)} and {list(b.shape)}"
            )
        wide = torch.promote_types(w.dtype, torch.float32)
        w, w0, p, b = (one.to(w.device, wide) for one in (w, w0, p, b))
        each, precision = w.numel() / max(p.numel(), 1), torch.exp(-2 * b)
        spread = (2 * p).exp().sum() * each + (w - w0).square().sum()
        own = (spread * precision - w.numel() - 2 * p.sum() * each + 2 * w.numel() * b) / 2
        total = own if total is None else total + own
    assert total is not None
    return total


@dataclass(frozen=True)
class LearnedNoise(WeightHook):
    """Adds normal noise to a weight, of the log size that its layer has under a name."""

    operator: ClassVar = "random_entries"
    of_untrained: ClassVar = False

    held_as: str

    def change_weight(self, weight: Tensor, at: LayerContext) -> Tensor:
        """Return the weight with noise."""
        log_sigma = getattr(getattr(at.layer, self.held_as), f"log_sigma_{at.weight}")
        noise = self.random(weight, at, "normal").clip(-2, 2)
        if log_sigma.shape != weight.shape:
            log_sigma = log_sigma.squeeze()
        changed: Tensor = weight + log_sigma.to(noise.dtype).exp() * noise
        return changed


@dataclass(eq=False)
class Keep(Action):
    """Phase 7: from the second stage on the log sizes have no gradient, so that their optimizer leaves them."""

    phase = Phase.REDUCE
    name: str
    first: Gate
    names: Sequence[str]

    def run(self, step: Step) -> None:
        if not self.first.fires(step.clock):
            for name in self.names:
                step.parameters[name].grad = None


def _own(entry: ModuleEntry, inventory: Inventory) -> list[str]:
    """Return the floating-point parameters that a layer holds itself."""
    own = [n for n in entry.parameters if n.rpartition(".")[0] == entry.name]
    return [n for n in own if inventory.parameter[n].dtype.startswith(("float", "bfloat"))]


def _levels(parameter: str, layer: str, held_as: str) -> tuple[str, str]:
    """Return the names of the log sizes of a parameter's noise and prior."""
    path, own = f"{layer}.{held_as}".removeprefix("."), parameter.rpartition(".")[2]
    return f"{path}.log_sigma_{own}", f"{path}.log_prior_{own}"
