"""Each pass serves its sites, keeps what it promises, and is caught when it does not."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples import models
from trainc.compiler.errors import PassBug, SiteMissing, SiteUnfit
from trainc.compiler.graph.forward_graph import ForwardGraph
from trainc.compiler.graph.interface import Outputs
from trainc.compiler.graph.step_graph import StepGraph
from trainc.compiler.method.sites import NoiseSite, NormSite, Pairing, Rewrite
from trainc.compiler.passes.add_noise import AddNoise
from trainc.compiler.passes.fuse_head import FuseHead
from trainc.compiler.passes.fuse_norms import FuseNorms
from trainc.compiler.passes.fuse_residual_adds import FuseResidualAdds
from trainc.compiler.passes.instrument_norms import InstrumentNorms
from trainc.compiler.passes.pair_views import PairViews
from trainc.compiler.passes.pass_base import Pass
from trainc.compiler.passes.pipeline import PIPELINE, check_names, check_order
from trainc.compiler.program.capture import capture
from trainc.kernels.loss.cross_entropy_consistency import cross_entropy_consistency
from trainc.kernels.noise.multiplicative_noise import multiplicative_noise
from trainc.kernels.noise.philox import pack_key
from trainc.kernels.norm.rms_norm import rms_norm
from trainc.runtime.data.batch import Batch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


class CrossEntropy:
    name = "cross_entropy"
    ignore_index = -100
    label_smoothing = 0.0

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))


class MeanSquare:
    name = "mse"

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(logits, targets)


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
    given: dict[str, Any] = {"penalties": {}, "scalars": {}} | changes
    return capture(model, given.pop("loss", LOSS), batch, rewrite=rewrite, **given)


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


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_probes_are_the_norms_of_separate_backward_passes(norm: str) -> None:
    model, batch = gpt(norm), tokens()
    sites = norm_sites(model)
    step = step_of(model, batch, Rewrite(norms=sites))
    out = step.run(batch, {})
    check_against_eager(model, batch, out)
    want = one_by_one(model, batch, sites)
    assert list(out.probes) == [site.module for site in sites]
    for name, expected in want.items():
        torch.testing.assert_close(out.probes[name], expected, rtol=1e-10, atol=0)


class LayerNormWritten(nn.Module):
    """A LayerNorm written out by hand, in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.gain = nn.Parameter(torch.rand(6) + 0.5)
        self.shift = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        if self.how == "functional":
            return F.layer_norm(x, (6,), self.gain, self.shift, 1e-3)
        if self.how == "torch":
            return torch.layer_norm(x, (6,), self.gain, self.shift, 1e-3)
        if self.how == "native":
            return torch.native_layer_norm(x, (6,), self.gain, self.shift, 1e-3)[0]
        if self.how == "var":
            scaled = (x - mean) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-3)
            return self.shift + self.gain * scaled
        if self.how == "squares":
            scaled = torch.rsqrt(1e-3 + ((x - mean) ** 2).mean(-1, keepdim=True)) * (x - mean)
            return scaled * self.gain + self.shift
        centred = x - mean
        return centred * (centred.square().mean(2, True) + 1e-3).pow(-0.5) * self.gain + self.shift


class RMSNormWritten(nn.Module):
    """An RMSNorm written out by hand, in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.gain = nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "functional":
            return F.rms_norm(x, (6,), self.gain, 1e-3)
        if self.how == "llama":
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-3)
            return self.gain * wide.to(x.dtype)
        if self.how == "cast-last":
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-3)
            return (wide * self.gain).to(x.dtype)
        if self.how == "gemma":
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-3)
            return (wide * (1.0 + self.gain.to(wide.dtype))).type_as(x)
        if self.how == "product":
            return self.gain * (torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-3) * x)
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-3) * self.gain


class Around(nn.Module):
    """A norm between two linear layers."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 6), norm, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))  # type: ignore[no-any-return]


LAYER = ["functional", "torch", "native", "var", "squares", "power"]
ROOT = ["functional", "llama", "cast-last", "gemma", "product", "divide"]


@pytest.mark.parametrize("how", LAYER)
def test_every_way_to_write_a_layer_norm_is_found(how: str) -> None:
    model, batch = Around(LayerNormWritten(how)).double().train(), vectors()
    sites = [NormSite("norm", "layer", "norm.gain", "norm.shift", 1e-3)]
    out = step_of(model, batch, Rewrite(norms=sites)).run(batch, {})
    check_against_eager(model, batch, out)
    want = one_by_one(model, batch, sites)
    torch.testing.assert_close(out.probes["norm"], want["norm"], rtol=1e-10, atol=0)


@pytest.mark.parametrize("how", ROOT)
def test_every_way_to_write_an_rms_norm_is_found(how: str) -> None:
    model, batch = Around(RMSNormWritten(how)).double().train(), vectors()
    sites = [NormSite("norm", "rms", "norm.gain", None, 1e-3)]
    out = step_of(model, batch, Rewrite(norms=sites)).run(batch, {})
    check_against_eager(model, batch, out)
    want = one_by_one(model, batch, sites)
    torch.testing.assert_close(out.probes["norm"], want["norm"], rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("how", "casting"), [("llama", "llama"), ("cast-last", "none"), ("gemma", "gemma")]
)
def test_the_place_of_the_cast_is_kept_in_bfloat16(how: str, casting: str) -> None:
    model = Around(RMSNormWritten(how)).bfloat16().train()
    inputs, targets = vectors()
    assert isinstance(inputs, Tensor)
    batch = (inputs.bfloat16(), targets)
    sites = [NormSite("norm", "rms", "norm.gain", None, 1e-3, "none")]
    step = step_of(model, batch, Rewrite(norms=sites))
    assert casting in next(n for n in step.graph.nodes if "rms_norm" in str(n.target)).args
    x = model.first(batch[0])
    gain = model.get_parameter("norm.gain")
    logits = model.last(torch.tanh(rms_norm(x, [6], gain, None, 1e-3, casting)))
    assert torch.equal(step.run(batch, {}).loss, LOSS(logits, targets).detach())


def summed(step: StepGraph) -> list[str]:
    """The fused operators of a sum and a norm in a graph, without their backward."""
    names = [str(node.target) for node in step.graph.nodes]
    return [n for n in names if "trainc.add_" in n and "backward" not in n]


@pytest.mark.parametrize("probed", [False, True])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_residual_sums_fuse_with_their_norms_bit_for_bit(
    norm: str, probed: bool, dtype: torch.dtype
) -> None:
    model, batch = gpt(norm).to(dtype), tokens()
    rewrite = Rewrite(norms=norm_sites(model))
    rest = (InstrumentNorms(),) if probed else ()
    plain = step_of(model, batch, rewrite, passes=(FuseNorms(), *rest))
    passes = (FuseNorms(), FuseResidualAdds(always=True), *rest)
    fused = step_of(model, batch, rewrite, passes=passes)
    # The first norm reads the sum of two embeddings, one of them broadcast.
    assert (len(summed(plain)), len(summed(fused))) == (0, 4)
    assert "4 residual sums" in fused.notes[0]
    got, want = (step.run(batch, {}) for step in (fused, plain))
    assert torch.equal(got.loss, want.loss)
    torch.testing.assert_close(got.grads, want.grads, rtol=0, atol=0)
    assert list(got.probes) == ([site.module for site in rewrite.norms] if probed else [])
    assert all(torch.equal(got.probes[name], want.probes[name]) for name in want.probes)


class Summed(nn.Module):
    """A norm whose input is one of several sums."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.norm, self.last = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y, early = self.first(x), 0.0
        if self.how == "broadcast":
            total = y + self.first.bias
        elif self.how == "scaled":
            total = torch.add(y, x, alpha=2)
        elif self.how == "number":
            total = y + 2.0
        else:
            total = y + x
            early = total * 0.5 if self.how == "read-before" else 0.0
        out: Tensor = self.last(self.norm(total)) + early
        return out + total if self.how == "read-after" else out


@pytest.mark.parametrize(
    ("how", "count"),
    [
        ("plain", 1),
        ("read-after", 1),
        ("read-before", 0),
        ("broadcast", 0),
        ("scaled", 0),
        ("number", 0),
    ],
)
def test_only_plain_sums_that_the_norm_reads_first_are_fused(how: str, count: int) -> None:
    model, batch = Summed(how).double().train(), vectors()
    passes = (FuseNorms(), FuseResidualAdds(always=True), InstrumentNorms())
    step = step_of(model, batch, Rewrite(norms=norm_sites(model)), passes=passes)
    assert len(summed(step)) == count
    out = step.run(batch, {})
    check_against_eager(model, batch, out)
    want = one_by_one(model, batch, norm_sites(model))
    torch.testing.assert_close(out.probes["norm"], want["norm"], rtol=1e-10, atol=0)


class Almost(nn.Module):
    """Close to a norm, but none: the pass must keep its hands off."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.gain = nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "other-value":
            return (x + 1) * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3) * self.gain
        if self.how == "other-axis":
            return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-3) * self.gain
        if self.how == "unbiased":
            centred = x - x.mean(-1, keepdim=True)
            return centred * torch.rsqrt(x.var(-1, keepdim=True) + 1e-3) * self.gain
        if self.how == "cube":
            return x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 9.0) * self.gain
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True)) * self.gain


@pytest.mark.parametrize("how", ["other-value", "other-axis", "unbiased", "cube", "no-eps"])
def test_what_only_looks_like_a_norm_is_left_alone(how: str) -> None:
    model = Around(Almost(how)).double().train()
    for layer_type in ("layer", "rms"):
        site = NormSite("norm", layer_type, "norm.gain", None, 1e-3)
        with pytest.raises(SiteMissing, match="`norm`"):
            step_of(model, vectors(), Rewrite(norms=[site]))


def test_norms_without_parameters_are_found_by_their_module() -> None:
    model = nn.Sequential(
        nn.Linear(6, 6), nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 6)
    )
    model, batch = model.double().train(), vectors()
    step = step_of(model, batch, Rewrite(norms=[NormSite("1", "layer", None, None, 1e-5)]))
    out = step.run(batch, {})
    check_against_eager(model, batch, out)
    assert torch.equal(out.probes["1"], torch.zeros(3, 2).double())


def test_a_norm_applied_twice_is_refused_by_name() -> None:
    class Twice(Around):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.norm(torch.tanh(self.norm(self.first(x)))))
            return y

    model = Twice(nn.LayerNorm(6)).double().train()
    with pytest.raises(SiteUnfit, match="`norm`: its weight is used 2 times"):
        step_of(model, vectors(), Rewrite(norms=norm_sites(model)))


def test_a_weight_that_does_more_than_norm_is_refused() -> None:
    class Reused(Around):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.get_parameter("norm.weight")

    model = Reused(nn.LayerNorm(6)).double().train()
    with pytest.raises(SiteUnfit, match="is used 2 times"):
        step_of(model, vectors(), Rewrite(norms=norm_sites(model)))


class Transposed(Around):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x.transpose(0, 1)))
        return self.last(torch.tanh(x)).transpose(0, 1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("length", [5, 3])
def test_a_norm_whose_first_axis_is_not_the_examples_is_refused(length: int) -> None:
    model, batch = Transposed(nn.LayerNorm(6)).double().train(), vectors(3, length)
    with pytest.raises(SiteUnfit, match="`norm`: the first axis of its input"):
        step_of(model, batch, Rewrite(norms=norm_sites(model)))


def test_sequences_as_long_as_the_batch_are_no_obstacle() -> None:
    model, batch = gpt(), tokens(8, 8)
    sites = norm_sites(model)
    step = step_of(model, batch, Rewrite(norms=sites))
    assert step.notes == ()
    want = one_by_one(model, batch, sites)
    probes = step.run(batch, {}).probes
    for name in want:
        torch.testing.assert_close(probes[name], want[name], rtol=1e-10, atol=0)


def test_an_axis_that_could_not_be_proved_is_noted() -> None:
    class Fixed(Around):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] != 3:
                raise RuntimeError("three, please")
            return super().forward(x)

    model = Fixed(nn.LayerNorm(6)).double().train()
    step = step_of(model, vectors(3, 3), Rewrite(norms=norm_sites(model)))
    assert "is taken for the example axis" in step.notes[0]
    assert list(step.run(vectors(3, 3), {}).probes) == ["norm"]


def test_a_site_that_is_not_there_is_named() -> None:
    site = NormSite("blocks.7.ln1", "layer", "blocks.7.ln1.weight", None, 1e-5)
    with pytest.raises(SiteMissing) as missing:
        step_of(gpt(), tokens(), Rewrite(norms=[site]))
    assert missing.value.missing == ("blocks.7.ln1",)
    assert missing.value.pass_name == "fuse_norms"


def paced(model: nn.Module, distance: Any = "mse") -> tuple[Rewrite, dict[str, Tensor]]:
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    noises = [NoiseSite(n, i, "none" if i % 2 else "token") for i, n in enumerate(names)]
    scalars = {site.scalar: torch.tensor(0.1 * (i + 1)) for i, site in enumerate(noises)}
    scalars |= {"key": pack_key(7, 3), "weight:consistency": torch.tensor(0.5)}
    return Rewrite(noises=noises, pairing=Pairing(distance)), scalars


def noisy(model: nn.Module, rewrite: Rewrite, scalars: dict[str, Tensor]) -> list[Any]:
    """Add the noise with forward hooks."""

    def hook(site: NoiseSite) -> Callable[..., Tensor]:
        def add(_: nn.Module, __: Any, out: Tensor) -> Tensor:
            sigma, key = scalars[site.scalar], scalars["key"]
            return multiplicative_noise(out, sigma, key, site.index, rewrite.views, site.share)

        return add

    return [model.get_submodule(s.module).register_forward_hook(hook(s)) for s in rewrite.noises]


@pytest.mark.parametrize("distance", ["mse", "kl"])
def test_noise_and_pairing_equal_the_same_operators_in_eager(distance: str) -> None:
    model, (ids, targets) = gpt(), tokens()
    rewrite, scalars = paced(model, distance)
    step = step_of(model, (ids, targets), rewrite, scalars=scalars)
    assert isinstance(ids, Tensor)
    for weight, key in ((0.5, 3), (0.1, 4)):
        scalars |= {"weight:consistency": torch.tensor(weight), "key": pack_key(7, key)}
        out = step.run((ids, targets), scalars)
        hooks = noisy(model, rewrite, scalars)
        logits = model(torch.cat([ids, ids]))
        for handle in hooks:
            handle.remove()
        loss, data_loss, consistency = cross_entropy_consistency(
            logits, targets, scalars["weight:consistency"], distance
        )
        assert torch.equal(out.loss, loss)
        assert torch.equal(out.data_loss, data_loss)
        assert out.consistency is not None
        assert torch.equal(out.consistency, consistency)
        want = torch.autograd.grad(loss, list(model.parameters()))
        for got, expected in zip(out.grads.values(), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-16)


def test_norms_and_pairs_together_measure_an_example_by_both_views() -> None:
    model, batch = gpt(), tokens()
    rewrite, scalars = paced(model)
    rewrite.norms = norm_sites(model)
    out = step_of(model, batch, rewrite, scalars=scalars).run(batch, scalars)
    assert {tuple(p.shape) for p in out.probes.values()} == {(3, 2)}


def test_the_first_example_of_a_micro_batch_reaches_the_noise() -> None:
    model, (ids, targets) = gpt(), tokens(4)
    rewrite, scalars = paced(model)
    rewrite.pairing = None
    scalars["first_example"] = torch.tensor(0)
    assert isinstance(ids, Tensor)
    whole = step_of(model, (ids, targets), rewrite, scalars=scalars)
    half = (ids[2:], targets[2:])
    part = step_of(model, half, rewrite, scalars=scalars)
    first = step_of(model, (ids[:2], targets[:2]), rewrite, scalars=scalars)
    a = first.run((ids[:2], targets[:2]), scalars).loss
    b = part.run(half, scalars | {"first_example": torch.tensor(2)}).loss
    torch.testing.assert_close(whole.run((ids, targets), scalars).loss, (a + b) / 2)


@pytest.mark.parametrize("distance", ["mse", "kl"])
def test_other_losses_pair_with_a_composed_distance(distance: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double().train()
    batch = (torch.randn(3, 6).double(), torch.randn(3, 4).double())
    rewrite, scalars = paced(model, distance)
    step = step_of(model, batch, rewrite, scalars=scalars, loss=MeanSquare())
    out = step.run(batch, scalars)
    hooks = noisy(model, rewrite, scalars)
    logits = model(torch.cat([batch[0]] * 2))
    for handle in hooks:
        handle.remove()
    # The operator's distance does not depend on its targets.
    ignored = torch.zeros(3, dtype=torch.int64)
    _, _, consistency = cross_entropy_consistency(logits, ignored, torch.tensor(0.5), distance)
    loss = F.mse_loss(logits[:3], batch[1]) + 0.5 * consistency
    torch.testing.assert_close(out.loss, loss.detach())
    want = torch.autograd.grad(loss, list(model.parameters()))
    for got, expected in zip(out.grads.values(), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("inplace", [False, True])
def test_views_share_their_dropout_masks(inplace: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5, inplace), nn.Linear(64, 6))
    batch = vectors()
    step = step_of(
        model.double().train(),
        batch,
        Rewrite(pairing=Pairing("mse")),
        scalars={"weight:consistency": torch.tensor(1.0)},
    )
    torch.manual_seed(5)
    out = step.run(batch, {"weight:consistency": torch.tensor(1.0)})
    assert out.consistency is not None
    assert float(out.consistency) < 1e-28
    torch.manual_seed(5)
    hidden = model[0](batch[0])
    mask = F.dropout(torch.ones_like(hidden), 0.5)
    want = LOSS(model[2](hidden * mask), batch[1]).detach()
    torch.testing.assert_close(out.data_loss, want, rtol=1e-12, atol=0)


def test_attention_dropout_is_said_not_to_be_shared() -> None:
    model = gpt(dropout=0.1)
    rewrite, scalars = paced(model)
    step = step_of(model, tokens(), rewrite, scalars=scalars)
    assert len(step.notes) == 2
    assert "`blocks.0.attn`" in step.notes[0]


def test_noise_follows_every_call_of_a_module_and_modules_of_other_types() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Sequential(nn.Linear(6, 6), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(torch.relu(self.mix(x)))  # type: ignore[no-any-return]

    model, batch = Model().double().train(), vectors()
    rewrite = Rewrite(noises=[NoiseSite("mix", 0)])
    scalars = {"sigma:mix": torch.tensor(0.3), "key": pack_key(1, 1)}
    out = step_of(model, batch, rewrite, scalars=scalars).run(batch, scalars)
    hooks = noisy(model, rewrite, scalars)
    loss = LOSS(model(batch[0]), batch[1])
    hooks[0].remove()
    assert torch.equal(out.loss, loss.detach())


def test_a_missing_noise_site_is_named() -> None:
    rewrite = Rewrite(noises=[NoiseSite("nowhere", 0)])
    with pytest.raises(SiteMissing, match="`nowhere`"):
        step_of(gpt(), tokens(), rewrite, scalars={"sigma:nowhere": torch.tensor(0.1)})


# The runner


@dataclass(frozen=True)
class WrongShape(FuseNorms):
    name: ClassVar[str] = "wrong_shape"

    def run(self, forward: ForwardGraph, rewrite: Rewrite) -> list[str]:
        with forward.graph.inserting_before(forward.output):
            logits = forward.result("logits")
            wide = forward.graph.call_function(torch.ops.aten.unsqueeze.default, (logits, 0))
        forward.set_results({"data_loss": forward.result("data_loss"), "logits": wide})
        return [site.module for site in rewrite.norms]


@dataclass(frozen=True)
class WrongOrder(FuseNorms):
    name: ClassVar[str] = "wrong_order"

    def run(self, forward: ForwardGraph, rewrite: Rewrite) -> list[str]:
        first = next(iter(forward.calls()))
        last = forward.result("logits")
        with forward.graph.inserting_before(first):
            early = forward.graph.call_function(torch.ops.aten.neg.default, (last,))
        forward.set_results({"data_loss": forward.result("data_loss"), "logits": early})
        return [site.module for site in rewrite.norms]


@dataclass(frozen=True)
class Forgets(FuseNorms):
    name: ClassVar[str] = "forgets"

    def run(self, forward: ForwardGraph, rewrite: Rewrite) -> list[str]:
        return [site.module for site in rewrite.norms][1:]


@dataclass(frozen=True)
class Invents(FuseNorms):
    name: ClassVar[str] = "invents"

    def run(self, forward: ForwardGraph, rewrite: Rewrite) -> list[str]:
        return [*super().run(forward, rewrite), "more"]


@dataclass(frozen=True)
class Raises(FuseNorms):
    name: ClassVar[str] = "raises"

    def run(self, forward: ForwardGraph, rewrite: Rewrite) -> list[str]:
        raise AssertionError("not today")


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (WrongShape(), r"`logits` was .*3, 8, 64.* and is .*1, 3, 8, 64"),
        (WrongOrder(), "before it has been defined|used before"),
        (Invents(), "was asked for"),
        (Raises(), "AssertionError: not today"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_broken_pass_is_caught_and_named_with_the_graph_before_it(
    broken: Pass, words: str
) -> None:
    model = gpt()
    with pytest.raises(PassBug) as bug:
        step_of(model, tokens(), Rewrite(norms=norm_sites(model)), passes=(broken,))
    assert bug.value.pass_name == broken.name
    assert re.search(words, str(bug.value))
    assert "aten.layer_norm.default" in bug.value.before
    assert bug.value.before in str(bug.value)


def test_a_pass_that_forgets_a_site_is_caught() -> None:
    model = gpt()
    with pytest.raises(SiteMissing) as missing:
        step_of(model, tokens(), Rewrite(norms=norm_sites(model)), passes=(Forgets(),))
    assert missing.value.missing == ("blocks.0.ln1",)


def test_passes_without_work_do_not_run() -> None:
    step = step_of(gpt(), tokens(), Rewrite())
    assert [(r.name, r.ran, r.diff) for r in step.reports] == [
        (p.name, False, "") for p in PIPELINE
    ]


def test_reports_tell_what_changed() -> None:
    model = gpt()
    step = step_of(model, tokens(), Rewrite(norms=norm_sites(model)))
    reports = {report.name: report for report in step.reports}
    fuse, sums = reports["fuse_norms"], reports["fuse_residual_adds"]
    instrument, pairing = reports["instrument_norms"], reports["pair_views"]
    head = reports["fuse_head"]
    assert len(fuse.sites) == len(instrument.sites) == 5
    assert fuse.unserved == ()
    assert not pairing.ran
    assert not head.ran
    assert (len(sums.sites), sums.diff) == (5, "")  # a CPU gains nothing
    assert fuse.seconds > 0
    removed = [line for line in fuse.diff.splitlines() if line.startswith("-")]
    assert sum("aten.layer_norm.default" in line for line in removed) == 5
    assert "+input probe_blocks_0_ln1: f64[3, 2]" in instrument.diff
    assert instrument.nodes_after == instrument.nodes_before + 5


@pytest.mark.parametrize("name", ["fuse_norms", "instrument_norms"])
def test_leaving_a_pass_out_leaves_its_sites_unserved(name: str) -> None:
    model, batch = gpt(), tokens()
    sites = norm_sites(model)
    step = step_of(model, batch, Rewrite(norms=sites), without=frozenset([name]))
    reports = {report.name: report for report in step.reports}
    assert not reports[name].ran
    assert set(reports[name].unserved) == {site.module for site in sites}
    assert set(reports["instrument_norms"].unserved) == {site.module for site in sites}
    out = step.run(batch, {})
    assert out.probes == {}
    check_against_eager(model, batch, out)


def test_leaving_out_a_pass_that_does_not_exist_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ValueError, match="did you mean `fuse_norms`"):
        step_of(gpt(), tokens(), Rewrite(), without=frozenset(["fuse_norm"]))
    with pytest.raises(ValueError, match="the passes are fuse_norms"):
        check_names(frozenset(["zzz"]))


def test_the_pipeline_is_in_an_order_its_passes_allow() -> None:
    check_order(PIPELINE)
    with pytest.raises(ValueError, match="must come"):
        check_order((InstrumentNorms(), FuseNorms()))
    with pytest.raises(ValueError, match="must come"):
        check_order((AddNoise(), FuseNorms()))


def test_every_pass_says_what_it_is_for() -> None:
    assert len({step.name for step in PIPELINE}) == len(PIPELINE)
    for step in PIPELINE:
        assert step.purpose
        assert step.__doc__


class Headed(nn.Module):
    """A layer and a head, whose product is written in one of several ways."""

    def __init__(self, how: str, classes: int = 11) -> None:
        super().__init__()
        self.how = how
        self.body = nn.Linear(6, 5)
        self.head = nn.Linear(5, classes, bias=how != "unbiased")

    def forward(self, x: Tensor) -> Tensor:
        h, weight = torch.tanh(self.body(x)), self.head.weight
        if self.how in ("mm", "swapped", "gram"):
            h = h.flatten(0, -2)
        if self.how == "mm":
            return torch.mm(h, weight.t())
        if self.how == "swapped":
            return torch.addmm(self.head.bias, h, weight.transpose(0, -1))
        if self.how == "gram":
            return torch.mm(h, weight[:5].t().contiguous())
        logits: Tensor = self.head(h)
        return logits * 2 if self.how == "scaled" else logits


def head_calls(step: StepGraph) -> list[str]:
    names = ("linear_cross_entropy_consistency", "cross_entropy_consistency")
    return [
        n for n in names if any(f"trainc.{n}.default" in str(c.target) for c in step.graph.nodes)
    ]


@pytest.mark.parametrize("distance", ["mse", "kl"])
@pytest.mark.parametrize("how", ["linear", "unbiased", "mm", "swapped", "gram"])
def test_the_loss_through_the_head_is_the_loss_of_its_logits(how: str, distance: str) -> None:
    model = Headed(how).double().train()
    x, targets = torch.randn(4, 6).double(), torch.tensor([3, -100, 1, 4])
    rewrite, scalars = paced(model, distance)
    rewrite.noises = rewrite.noises[:1]  # noise on the logits would have to be added to them
    passes = (AddNoise(), PairViews(), FuseHead(always=True))
    step = step_of(model, (x, targets), rewrite, scalars=scalars, passes=passes)
    assert head_calls(step) == ["linear_cross_entropy_consistency"]
    assert any("one operator" in note for note in step.notes)
    kept = step_of(model, (x, targets), rewrite, scalars=scalars)
    assert head_calls(kept) == ["cross_entropy_consistency"]
    got, want = (one.run((x, targets), scalars) for one in (step, kept))
    hooks = noisy(model, rewrite, scalars)
    loss, *_ = cross_entropy_consistency(
        model(torch.cat([x, x])), targets, scalars["weight:consistency"], distance
    )
    for handle in hooks:
        handle.remove()
    exact = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    torch.testing.assert_close(got.loss, loss.detach(), rtol=1e-10, atol=0)
    for one in ("data_loss", "consistency"):
        torch.testing.assert_close(getattr(got, one), getattr(want, one), rtol=1e-10, atol=0)
    for grad, expected in zip(got.grads.values(), exact, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("how", ["noisy", "scaled"])
def test_a_head_whose_logits_are_read_is_left_alone(how: str) -> None:
    model = Headed(how).double().train()
    batch = (torch.randn(4, 6).double(), torch.tensor([3, -100, 1, 4]))
    rewrite, scalars = paced(model)
    passes = (AddNoise(), PairViews(), FuseHead(always=True))
    step = step_of(model, batch, rewrite, scalars=scalars, passes=passes)
    assert head_calls(step) == ["cross_entropy_consistency"]


def test_only_large_heads_and_batches_are_fused_and_no_logits_are_made() -> None:
    model = Headed("linear", 8192).double().train()
    rewrite, scalars = paced(model)
    rewrite.noises = []
    for examples, want in (
        (8, "cross_entropy_consistency"),
        (260, "linear_cross_entropy_consistency"),
    ):
        batch = (torch.randn(examples, 6).double(), torch.randint(8192, (examples,)))
        step = step_of(model, batch, rewrite, scalars=scalars)
        assert head_calls(step) == [want]
        found = [n.meta.get("val") for n in step.graph.nodes]
        held = [
            v for v in found if isinstance(v, Tensor) and v.shape[-1:] == (8192,) and v.dim() > 1
        ]
        assert bool(held) == (want == "cross_entropy_consistency")
    out = step.run(batch, scalars)
    assert isinstance(batch[0], Tensor)
    logits = model(torch.cat([batch[0], batch[0]]))
    loss, *_ = cross_entropy_consistency(logits, batch[1], scalars["weight:consistency"])
    exact = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(out.loss, loss.detach(), rtol=1e-10, atol=0)
    for grad, expected in zip(out.grads.values(), exact, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-14)
    off = step_of(model, batch, rewrite, scalars=scalars, without=frozenset(["fuse_head"]))
    assert head_calls(off) == ["cross_entropy_consistency"]
