"""Noise, shared dropout and the distance between two views equal the same operators in eager training."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.compiler.passes.step_cases import (
    LOSS,
    gpt,
    noise_site,
    noisy,
    norm_sites,
    paced,
    paired,
    step_of,
    tokens,
    vectors,
)
from trainc.compiler.errors import SiteUnfit
from trainc.compiler.method.sites import Rewrite
from trainc.kernels.loss.cross_entropy_consistency import cross_entropy_consistency
from trainc.kernels.noise.philox import pack_key


class MeanSquare:
    name = "mse"

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(logits, targets)


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
        assert torch.equal(out.terms["consistency"], consistency)
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
    rewrite.view_requests, rewrite.terms = [], {}
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
        paired(Rewrite()),
        scalars={"weight:consistency": torch.tensor(1.0)},
    )
    torch.manual_seed(5)
    out = step.run(batch, {"weight:consistency": torch.tensor(1.0)})
    assert float(out.terms["consistency"]) < 1e-28
    torch.manual_seed(5)
    hidden = model[0](batch[0])
    mask = F.dropout(torch.ones_like(hidden), 0.5)
    want = LOSS(model[2](hidden * mask), batch[1]).detach()
    torch.testing.assert_close(out.data_loss, want, rtol=1e-12, atol=0)


def test_attention_dropout_is_said_not_to_be_shared() -> None:
    model = gpt(dropout=0.1)
    rewrite, scalars = paced(model)
    step = step_of(model, tokens(), rewrite, scalars=scalars)
    assert len(step.warnings) == 2
    assert "`blocks.0.attn`" in step.warnings[0]


def test_noise_follows_every_call_of_a_module_and_modules_of_other_types() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Sequential(nn.Linear(6, 6), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(torch.relu(self.mix(x)))  # type: ignore[no-any-return]

    model, batch = Model().double().train(), vectors()
    rewrite = Rewrite(hooks=[noise_site("mix", 0)])
    scalars = {"sigma:mix": torch.tensor(0.3), "key": pack_key(1, 1)}
    out = step_of(model, batch, rewrite, scalars=scalars).run(batch, scalars)
    hooks = noisy(model, rewrite, scalars)
    loss = LOSS(model(batch[0]), batch[1])
    hooks[0].remove()
    assert torch.equal(out.loss, loss.detach())


def test_a_noisy_layer_that_does_not_run_is_named() -> None:
    model = gpt()
    model.add_module("unused", nn.Linear(3, 3))
    scalars = {"sigma:unused": torch.tensor(0.1), "key": pack_key(1, 1)}
    with pytest.raises(SiteUnfit, match="`unused`: the layer did not run"):
        step_of(model, tokens(), Rewrite(hooks=[noise_site("unused", 0)]), scalars=scalars)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_noise_left_in_plain_operators_is_the_same_numbers(dtype: torch.dtype) -> None:
    model, batch = gpt().to(dtype), tokens()
    rewrite, scalars = paced(model)
    fused, plain = (
        step_of(model, batch, rewrite, scalars=scalars, without=frozenset(without))
        for without in ([], ["add_noise"])
    )
    outs = [step.run(batch, scalars) for step in (fused, plain)]
    assert torch.equal(outs[0].loss, outs[1].loss)
    for name, gradient in outs[0].grads.items():
        other = outs[1].grads[name]
        assert gradient is not None
        assert other is not None
        assert torch.equal(gradient, other), name
    sums = [
        sum(n.target is torch.ops.aten.ones.default for n in s.graph.nodes) for s in (fused, plain)
    ]
    assert sums == [0, len(rewrite.hooks)]
