"""Models, batches and losses for steps through the passes, and what eager training gives for them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples import models
from trainc.compiler.constructs.regularize.outputs._noise import Noise
from trainc.compiler.execution.capture import capture
from trainc.compiler.graph.interface import Outputs
from trainc.compiler.graph.step_graph import StepGraph
from trainc.compiler.layers.bound_modules import replace_layers
from trainc.compiler.method.layer_hook import LayerHookSite
from trainc.compiler.method.sites import NormSite, Rewrite, Views
from trainc.compiler.method.term import Term
from trainc.kernels.loss.consistency import Consistency
from trainc.kernels.noise.multiplicative_noise import multiplicative_noise
from trainc.kernels.noise.philox import pack_key
from trainc.runtime.data.batch import Batch


class CrossEntropy:
    name = "cross_entropy"
    ignore_index = -100
    label_smoothing = 0.0
    is_cross_entropy = True

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))


LOSS = CrossEntropy()


def tokens(examples: int = 3, length: int = 8) -> Batch:
    return torch.randint(64, (examples, length)), torch.randint(64, (examples, length))


def vectors(examples: int = 3, length: int = 5, width: int = 6) -> Batch:
    return torch.randn(examples, length, width).double(), torch.randint(width, (examples, length))


def gpt(norm: Any = "layer", dropout: float = 0.0) -> nn.Module:
    model = models.gpt(2, 16, 2, 8, 64, norm=norm, dropout=dropout).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def norm_sites(model: nn.Module) -> list[NormSite]:
    sites = []
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            sites.append(NormSite(name, "layer", f"{name}.weight", f"{name}.bias", module.eps))
        elif isinstance(module, nn.RMSNorm):
            sites.append(NormSite(name, "rms", f"{name}.weight", None, module.eps))
    return sites


def step_of(model: nn.Module, batch: Batch, rewrite: Rewrite, **changes: Any) -> StepGraph:
    given: dict[str, Any] = {"scalars": {}} | changes
    sites = replace_layers(model, Rewrite(hooks=rewrite.hooks))
    try:
        return capture(model, given.pop("loss", LOSS), batch, rewrite=rewrite, sites=sites, **given)
    finally:
        sites.unbind()


def noise_site(module: str, index: int, share: Any = "token") -> LayerHookSite:
    return LayerHookSite(module, Noise(share), index, "", (("sigma", f"sigma:{module}"),))


def one_by_one(model: nn.Module, batch: Batch, sites: Sequence[NormSite]) -> dict[str, Tensor]:
    """Squared norms of each example's part of each gradient, by a backward pass for each."""
    inputs, targets = batch
    assert isinstance(inputs, Tensor)
    count = len(targets)
    found: dict[str, list[Tensor]] = {site.module: [] for site in sites}
    for i in range(count):
        loss = LOSS(model(inputs[i : i + 1]), targets[i : i + 1]) / count
        model.zero_grad()
        loss.backward()
        for site in sites:
            squares = []
            for name in site.parameters:
                grad = None if name is None else model.get_parameter(name).grad
                squares.append(torch.zeros(()).double() if grad is None else grad.square().sum())
            found[site.module].append(torch.stack(squares))
    model.zero_grad(set_to_none=True)
    return {name: torch.stack(rows) for name, rows in found.items()}


def check_against_eager(model: nn.Module, batch: Batch, out: Outputs) -> None:
    loss = LOSS(model(batch[0]), batch[1])
    want = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(out.loss, loss.detach(), rtol=1e-12, atol=0)
    for got, expected in zip(out.grads.values(), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)


def paced(model: nn.Module, distance: Any = "mse") -> tuple[Rewrite, dict[str, Tensor]]:
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    hooks = [noise_site(n, i, "none" if i % 2 else "token") for i, n in enumerate(names)]
    scalars = {f"sigma:{name}": torch.tensor(0.1 * (i + 1)) for i, name in enumerate(names)}
    scalars |= {"key": pack_key(7, 3), "weight:consistency": torch.tensor(0.5)}
    return paired(Rewrite(hooks=hooks), distance), scalars


def paired(rewrite: Rewrite, distance: str = "mse") -> Rewrite:
    """Add two views with one dropout mask and the term `consistency` that compares them."""
    consistency = Consistency(distance)
    rewrite.view_requests = [Views("consistency", 2, True, False)]
    rewrite.terms["consistency"] = Term(
        "consistency",
        lambda forward: consistency(forward.logits),
        "examples",
        "weight:consistency",
        joint=consistency,
    )
    return rewrite


def noisy(model: nn.Module, rewrite: Rewrite, scalars: dict[str, Tensor]) -> list[Any]:
    """Add the noise with forward hooks."""

    def hook(site: LayerHookSite) -> Callable[..., Tensor]:
        def add(_: nn.Module, __: Any, out: Tensor) -> Tensor:
            sigma, key = scalars[f"sigma:{site.module}"], scalars["key"]
            share = site.hook.share  # type: ignore[attr-defined]
            return multiplicative_noise(out, sigma, key, site.index, rewrite.views, share)

        return add

    return [model.get_submodule(s.module).register_forward_hook(hook(s)) for s in rewrite.hooks]
