"""Norms are found however they are written, fused, and measured per example."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.compiler.passes.step_cases import (
    LOSS,
    check_against_eager,
    gpt,
    norm_sites,
    one_by_one,
    step_of,
    tokens,
    vectors,
)
from trainc.compiler.errors import SiteMissing, SiteUnfit
from trainc.compiler.method.sites import NormSite, Rewrite
from trainc.kernels.norm.rms_norm import rms_norm


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
    with pytest.raises(SiteUnfit, match="`norm`: the weight is used 2 times"):
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
