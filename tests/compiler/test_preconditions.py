"""What per-example norms need of a model is checked before the first number, with every executor."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import trainc
from trainc.compiler.errors import ExampleAxisUnknown, SiteError
from trainc.compiler.method.loss import Loss
from trainc.compiler.method.losses import Losses
from trainc.compiler.per_example.batch_slices import (
    InputSlicer,
    first_axis_lengths,
    possible_slicers,
)
from trainc.compiler.per_example.mixing import ExamplesMix
from trainc.compiler.per_example.weight_uses import WeightUsedElsewhere
from trainc.functional import measured_parameters, per_example_sq_norms
from trainc.runtime.run.interface import NonFiniteLoss

RUN = "loss cross_entropy optimizer sgd { lr = 0 } run { length = 9 steps, seed = 4 }\n"
Build = Callable[["Uses", Tensor], Tensor]


class Uses(nn.Module):
    """An embedding, a norm and linear layers; `how` says where else their weights are used."""

    def __init__(self, how: Build) -> None:
        super().__init__()
        self.how = how
        self.words, self.norm = nn.Embedding(7, 6), nn.LayerNorm(6)
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.how(self, ids)


def hidden(model: Uses, ids: Tensor) -> Tensor:
    return torch.tanh(model.inner(model.norm(model.words(ids))))


def head_by_function(model: Uses, ids: Tensor) -> Tensor:
    return F.linear(hidden(model, ids), model.words.weight)


def norm_by_function(model: Uses, ids: Tensor) -> Tensor:
    return model.head(F.layer_norm(hidden(model, ids), (6,), model.norm.weight))  # type: ignore[no-any-return]


def divided_by_its_norm(model: Uses, ids: Tensor) -> Tensor:
    return model.head(hidden(model, ids) / model.inner.weight.norm())  # type: ignore[no-any-return]


def in_a_reentrant_checkpoint(model: Uses, ids: Tensor) -> Tensor:
    def block(x: Tensor) -> Tensor:
        return F.layer_norm(x, (6,), model.norm.weight)

    return model.head(checkpoint(block, hidden(model, ids), use_reentrant=True))  # type: ignore[no-any-return]


class Doubled(torch.autograd.Function):
    """A function that torch's own dispatch does not see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return dy * weight, (dy * x).flatten(0, -2).sum(0)


def by_an_own_function(model: Uses, ids: Tensor) -> Tensor:
    return model.head(Doubled.apply(hidden(model, ids), model.norm.weight))  # type: ignore[no-any-return,no-untyped-call]


def plainly(model: Uses, ids: Tensor) -> Tensor:
    return model.head(hidden(model, ids))  # type: ignore[no-any-return]


def without_gradient(model: Uses, ids: Tensor) -> Tensor:
    with torch.no_grad():
        size = model.inner.weight.norm()
    scaled = hidden(model, ids) * model.norm.weight.detach() / size
    return model.head(scaled)[..., : model.head.weight.shape[0]]  # type: ignore[no-any-return]


ELSEWHERE = {
    head_by_function: ("words", "Embedding"),
    norm_by_function: ("norm", "LayerNorm"),
    divided_by_its_norm: ("inner", "Linear"),
    in_a_reentrant_checkpoint: ("norm", "LayerNorm"),
    by_an_own_function: ("norm", "LayerNorm"),
}


def made(how: Build) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(2)
    return Uses(how).double(), torch.randint(7, (5, 4)), torch.randint(7, (5, 4))


@pytest.mark.parametrize("executor", ["auto", "module", "graph"])
@pytest.mark.parametrize("how", ELSEWHERE)
def test_a_weight_used_elsewhere_is_an_error_with_the_line_that_uses_it(
    how: Build, executor: Any
) -> None:
    name, kind = ELSEWHERE[how]  # type: ignore[index]
    model, x, y = made(how)
    program = trainc.compile(f"{RUN}noise_scale gns on type({kind})", model, executor=executor)
    with pytest.raises(
        WeightUsedElsewhere, match=rf"`{name}.weight` is also used .*test_preconditions.py:"
    ):
        program.step((x, y))


@pytest.mark.parametrize("how", [h for h in ELSEWHERE if h is not in_a_reentrant_checkpoint])
def test_per_example_norms_refuse_it_as_well(how: Build) -> None:
    model, x, y = made(how)
    loss = partial(cross_entropy, y=y)
    with pytest.raises(WeightUsedElsewhere, match=f"`{ELSEWHERE[how][0]}.weight`.*used.*:"):  # type: ignore[index]
        per_example_sq_norms(model, loss, x, on=f"type({ELSEWHERE[how][1]})")  # type: ignore[index]
    others = ["norm.bias" if how is head_by_function else "head.bias"]
    expected = brute(model, x, y, others)
    torch.testing.assert_close(per_example_sq_norms(model, loss, x, on=others), expected)


def cross_entropy(out: Any, y: Tensor) -> Tensor:
    logits = getattr(out, "logits", out)
    return F.cross_entropy(logits.flatten(0, -2), y.flatten())


def brute(model: nn.Module, x: Tensor, y: Tensor, names: Any) -> Tensor:
    """Return |c_b|^2 under the mean over all targets, (examples, names), one backward pass per example."""
    rows = []
    for b in range(len(x)):
        loss = cross_entropy(model(x[b : b + 1]), y[b : b + 1]) / len(x)
        found = torch.autograd.grad(loss, [model.get_parameter(name) for name in names])
        rows.append(torch.stack([gradient.square().sum() for gradient in found]))
    return torch.stack(rows)


def test_a_loss_that_reads_a_weight_is_refused() -> None:
    model, x, y = made(plainly)
    with pytest.raises(WeightUsedElsewhere, match=r"`head.weight` is also used outside `head`"):
        per_example_sq_norms(
            model, lambda out: cross_entropy(out, y) + model.get_parameter("head.weight").sum(), x
        )


@pytest.mark.parametrize("how", [plainly, without_gradient])
def test_a_use_without_gradient_is_accepted(how: Build) -> None:
    model, x, y = made(how)
    forwards = [vars(module).get("forward") for module in model.modules()]
    found = per_example_sq_norms(model, partial(cross_entropy, y=y), x)
    torch.testing.assert_close(found, brute(model, x, y, measured_parameters(model)))
    program = trainc.compile(f"{RUN}noise_scale gns on all", model)
    program.step((x, y))
    assert program.signals["gns.noise"] > 0
    assert [vars(module).get("forward") for module in model.modules()] == forwards


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(7, 6), nn.LayerNorm(6)
        self.head = nn.Linear(6, 7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.norm(self.words(ids)))))  # type: ignore[no-any-return]


def test_a_layer_that_runs_twice_is_an_error() -> None:
    x = torch.randint(7, (4, 3))
    with pytest.raises(SiteError, match="`norm` ran more than once"):
        per_example_sq_norms(Twice(), partial(cross_entropy, y=x), x)
    program = trainc.compile(f"{RUN}noise_scale gns", Twice())
    with pytest.raises(SiteError, match="`norm` ran more than once"):
        program.step((x, x))


class Masked(nn.Module):
    """Attention under a mask (T, T), which comes with the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm, self.head = nn.Embedding(7, 6), nn.LayerNorm(6), nn.Linear(6, 7)

    def forward(self, mask: Tensor, ids: Tensor) -> Tensor:
        x = self.norm(self.words(ids))
        x = F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], mask)[:, 0]
        return self.head(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("examples", [4, 6])
def test_an_input_as_long_as_the_batch_need_not_hold_examples(examples: int) -> None:
    torch.manual_seed(3)
    model = Masked().double()
    ids, mask = torch.randint(7, (examples, 6)), torch.ones(6, 6, dtype=torch.bool).tril()
    found = per_example_sq_norms(model, partial(cross_entropy, y=ids), {"mask": mask, "ids": ids})
    for b in range(examples):
        loss = cross_entropy(model(mask, ids[b : b + 1]), ids[b : b + 1]) / examples
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        expected = torch.stack([gradient.square().sum() for gradient in gradients])
        torch.testing.assert_close(found[b], expected)
    program = trainc.compile(f"{RUN}noise_scale gns on all", model, executor="module")
    program.step(((mask, ids), ids))
    assert program.signals["gns.noise"] > 0


def test_a_model_that_fails_on_a_few_examples_raises_its_own_error_with_a_note() -> None:
    class Six(Masked):
        def forward(self, mask: Tensor, ids: Tensor) -> Tensor:
            return super().forward(mask, ids.view(6, 6))

    x = torch.randint(7, (6, 6))
    with pytest.raises(RuntimeError, match="shape") as caught:
        per_example_sq_norms(Six(), partial(cross_entropy, y=x), {"mask": x > -1, "ids": x})
    (note,) = caught.value.__notes__
    assert "on 2 and on 3 of 6 examples" in note
    assert "it sliced `inputs['mask']` (6, 6), `inputs['ids']` (6, 6)" in note


def test_slicers_take_all_inputs_first_and_then_leave_out_few() -> None:
    inputs = {"a": torch.zeros(4, 2), "b": torch.zeros(4), "c": torch.zeros(3), "d": 1.0}
    assert first_axis_lengths(inputs) == [4, 3]
    assert list(possible_slicers(inputs, [4])) == [
        InputSlicer(4, frozenset(s)) for s in ((0, 1), (1,), (0,))
    ]
    assert list(possible_slicers(inputs, [5])) == [InputSlicer(5, frozenset())]
    few = InputSlicer(4, frozenset([1])).take(inputs, [0, 0, 3])
    assert [len(few[name]) for name in "abc"] == [4, 3, 3]


class Mixing(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.words, self.norm, self.head = nn.Embedding(7, 6), nn.LayerNorm(6), nn.Linear(6, 7)
        self.dropout, self.mixes = dropout, True

    def forward(self, ids: Tensor) -> Tensor:
        x = F.dropout(self.norm(self.words(ids)), self.dropout, self.training)
        return self.head(x - x.mean(0) if self.mixes else x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_model_that_mixes_examples_is_an_error(dropout: float) -> None:
    torch.manual_seed(0)
    x, model = torch.randint(7, (5, 3)), Mixing(dropout)
    with pytest.raises(ExamplesMix, match="outputs for two examples change when the third"):
        per_example_sq_norms(model, partial(cross_entropy, y=x), x)
    program = trainc.compile(f"{RUN}noise_scale gns", model)
    with pytest.raises(ExamplesMix, match="method = micro_batch"):
        program.step((x, x))
    program.unbind()
    model.mixes = False
    modes = [module.training for module in model.modules()]
    per_example_sq_norms(model, partial(cross_entropy, y=x), x)
    trainc.compile(f"{RUN}noise_scale gns", model).step((x, x))
    assert [module.training for module in model.modules()] == modes


def test_attention_over_the_first_axis_is_mixing() -> None:
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)  # (T, B, D)
    with pytest.raises((ExamplesMix, ExampleAxisUnknown), match="batch_first"):
        per_example_sq_norms(
            block, lambda out: out.square().mean(), torch.randn(5, 4, 8), "role(norm)"
        )


def test_a_batch_without_targets_follows_on_nan_and_is_checked_later() -> None:
    model, x, y = made(divided_by_its_norm)
    none = torch.full_like(y, -100)
    spec = f"{RUN.replace('seed = 4', 'seed = 4, on_nan = skip')}noise_scale gns on type(Linear)"
    program = trainc.compile(spec, model, executor="module")
    assert program.step((x, none))["skipped"] == 1.0
    with pytest.raises(WeightUsedElsewhere):
        program.step((x, y))
    model, x, y = made(plainly)
    program = trainc.compile(f"{RUN}noise_scale gns on type(Linear)", model)
    with pytest.raises(NonFiniteLoss, match="the loss is nan"):
        program.step((x, none))


def test_only_examples_with_targets_are_checked() -> None:
    model, x, y = made(plainly)
    y[:3] = -100
    program = trainc.compile(f"{RUN}noise_scale gns on all", model)
    program.execution.losses = Losses.of(Halved(program.execution.loss_fn))
    with pytest.raises(SiteError, match="not a sum"):
        program.step((x, y))


class Halved(Loss):
    """A loss that is not the mean its weights say."""

    name = "sum"

    def __init__(self, loss_fn: Loss) -> None:
        self.loss_fn = loss_fn

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss_fn(outputs, targets) / (targets >= 0).sum()

    def target_weights(self, targets: Tensor) -> Tensor:
        return self.loss_fn.target_weights(targets)


def test_a_model_in_eval_mode_is_an_error_that_says_so() -> None:
    model, x, y = made(plainly)
    program = trainc.compile(f"{RUN}noise_scale gns on all", model.eval())
    with pytest.raises(SiteError, match=r"in eval mode.*`model.train\(\)`"):
        program.loss((x, y))


def test_compiled_parts_hide_no_use() -> None:
    model, x, y = made(lambda m, ids: torch.compile(head_by_function, backend="eager")(m, ids))
    program = trainc.compile(f"{RUN}noise_scale gns on type(Embedding)", model, executor="module")
    with pytest.raises(WeightUsedElsewhere, match=r"`words.weight`"):
        program.step((x, y))
