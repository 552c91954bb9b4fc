"""A linear head and its loss, of one view or two, become one operator where that pays."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.compiler.passes.step_cases import LOSS, noisy, paced, step_of
from trainc.compiler.graph.step_graph import StepGraph
from trainc.compiler.method.sites import Rewrite
from trainc.compiler.method.term import Term
from trainc.compiler.passes.add_noise import AddNoise
from trainc.compiler.passes.fuse_head import FuseHead
from trainc.compiler.passes.fuse_loss import FuseLoss
from trainc.kernels.loss.cross_entropy_consistency import cross_entropy_consistency


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
        if self.how == "cast":
            return logits.float()
        return logits * 2 if self.how == "scaled" else logits


EARLY = frozenset(["pair_late"])
"""Without noise the views never part, and the head runs once."""


def head_calls(step: StepGraph) -> list[str]:
    names = (
        "linear_cross_entropy_consistency", "cross_entropy_consistency", "linear_cross_entropy",
    )  # fmt: skip
    return [
        n for n in names if any(f"trainc.{n}.default" in str(c.target) for c in step.graph.nodes)
    ]


@pytest.mark.parametrize("distance", ["mse", "kl"])
@pytest.mark.parametrize("how", ["linear", "unbiased", "mm", "swapped", "gram"])
def test_the_loss_through_the_head_is_the_loss_of_its_logits(how: str, distance: str) -> None:
    model = Headed(how).double().train()
    x, targets = torch.randn(4, 6).double(), torch.tensor([3, -100, 1, 4])
    rewrite, scalars = paced(model, distance)
    rewrite.hooks = rewrite.hooks[:1]  # noise on the logits would have to be added to them
    passes = (AddNoise(), FuseLoss(), FuseHead(always=True))
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
    torch.testing.assert_close(got.data_loss, want.data_loss, rtol=1e-10, atol=0)
    torch.testing.assert_close(got.terms, want.terms, rtol=1e-10, atol=0)
    for grad, expected in zip(got.grads.values(), exact, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("how", ["noisy", "scaled"])
def test_a_head_whose_logits_are_read_is_left_alone(how: str) -> None:
    model = Headed(how).double().train()
    batch = (torch.randn(4, 6).double(), torch.tensor([3, -100, 1, 4]))
    rewrite, scalars = paced(model)
    passes = (AddNoise(), FuseLoss(), FuseHead(always=True))
    step = step_of(model, batch, rewrite, scalars=scalars, passes=passes)
    assert head_calls(step) == ["cross_entropy_consistency"]


def test_only_large_heads_and_batches_are_fused_and_no_logits_are_made() -> None:
    model = Headed("linear", 8192).double().train()
    rewrite, scalars = paced(model)
    rewrite.hooks = []
    for examples, want in (
        (8, "cross_entropy_consistency"),
        (260, "linear_cross_entropy_consistency"),
    ):
        batch = (torch.randn(examples, 6).double(), torch.randint(8192, (examples,)))
        step = step_of(model, batch, rewrite, scalars=scalars, without=EARLY)
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
    off = step_of(model, batch, rewrite, scalars=scalars, without=EARLY | {"fuse_head"})
    assert head_calls(off) == ["cross_entropy_consistency"]


BATCH = (torch.randn(4, 6).double(), torch.tensor([3, -100, 1, 4]))


@pytest.mark.parametrize("how", ["linear", "unbiased", "mm", "swapped", "gram"])
def test_chunks_are_the_loss_of_the_logits(how: str) -> None:
    model = Headed(how).double().train()
    step = step_of(model, BATCH, Rewrite(chunks=3))
    assert head_calls(step) == ["linear_cross_entropy"]
    out = step.run(BATCH, {})
    loss = LOSS(model(BATCH[0]), BATCH[1])
    exact = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    torch.testing.assert_close(out.loss, loss.detach(), rtol=1e-10, atol=0)
    for grad, expected in zip(out.grads.values(), exact, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-14)


def test_the_step_has_no_logits_where_size_decides() -> None:
    model = Headed("linear", 8192).double().train()
    for examples, want in ((8, []), (520, ["linear_cross_entropy"])):
        batch = (torch.randn(examples, 6).double(), torch.randint(8192, (examples,)))
        step = step_of(model, batch, Rewrite(chunks=0))
        assert (head_calls(step), step.warnings) == (want, ())
        values = [n.meta.get("val") for n in step.graph.nodes]
        shapes = [tuple(v.shape) for v in values if isinstance(v, Tensor)]
        assert ((examples, 8192) in shapes) == (not want)
    off = step_of(model, batch, Rewrite(chunks=0), without=frozenset(["fuse_head"]))
    assert head_calls(off) == []


def test_16_bit_logits_that_are_cast_for_the_loss_are_not_held() -> None:
    model = Headed("cast").bfloat16().train()
    batch = (BATCH[0].bfloat16(), BATCH[1])
    step, kept = (step_of(model, batch, Rewrite(chunks=chunks)) for chunks in (2, None))
    assert (head_calls(step), head_calls(kept)) == (["linear_cross_entropy"], [])
    got, want = (one.run(batch, {}) for one in (step, kept))
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=0)
    for name, gradient in want.grads.items():  # sums of 16-bit numbers, in another order
        assert gradient is not None, name
        near = 2e-2 * float(gradient.abs().max())
        torch.testing.assert_close(got.grads[name], gradient, rtol=2e-2, atol=near, msg=name)


def test_a_frozen_head_gets_no_gradient() -> None:
    model = Headed("linear").double().train()
    model.head.weight.requires_grad_(False)
    step = step_of(model, BATCH, Rewrite(chunks=2))
    (call,) = [n for n in step.graph.nodes if "linear_cross_entropy.default" in str(n.target)]
    assert call.args[-1] == [True, False, True]


def test_chunks_that_cannot_be_say_why() -> None:
    def found(how: str, rewrite: Rewrite, **more: Any) -> str:
        step = step_of(Headed(how).double().train(), BATCH, rewrite, **more)
        assert head_calls(step) in ([], ["cross_entropy_consistency"])
        (warning,) = step.warnings
        return str(warning)

    assert "a linear layer does not give them" in found("scaled", Rewrite(chunks=2))
    term = Term("z", lambda forward: forward.logits.square().mean(), "targets")
    assert "a term of the loss" in found("linear", Rewrite(chunks=2, terms={"z": term}))
    rewrite, scalars = paced(Headed("noisy").double())
    rewrite.chunks = 2
    assert "more than the loss reads" in found("noisy", rewrite, scalars=scalars)


def test_chunks_take_the_operator_of_two_views_at_any_size() -> None:
    model = Headed("linear").double().train()
    rewrite, scalars = paced(model)
    rewrite.hooks, rewrite.chunks = [], 2
    step = step_of(model, BATCH, rewrite, scalars=scalars, without=EARLY)
    assert (head_calls(step), step.warnings) == (["linear_cross_entropy_consistency"], ())
