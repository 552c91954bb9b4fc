"""Gradients rescaled between backward() and update(): refused, or unscaled by the GradScaler that is given."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import trainc
from examples.models import gpt
from trainc.compiler.program.program import Program

SPEC = """
loss cross_entropy
optimizer {optimizer} {{ lr = 1e-3 }}
noise_scale gns on {on} {{ smooth = 5 steps, method = {method} }}
"""
Leave = Callable[[Program, torch.amp.GradScaler | None], None]


def program(
    method: str = "per_example", on: str = "type(LayerNorm)", optimizer: str = "adamw"
) -> Program:
    torch.manual_seed(0)
    model = gpt(layers=2, width=32, heads=2, context=16)
    return trainc.compile(SPEC.format(on=on, method=method, optimizer=optimizer), model)


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 256, (8, 17), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


def halves(made: Program, scaler: torch.amp.GradScaler | None, seed: int = 0) -> None:
    """Leave the gradient of a batch, in two micro-batches."""
    inputs, targets = batch(seed)
    for rows in (slice(0, 4), slice(4, 8)):
        loss = made.loss((inputs[rows], targets[rows]), loss_weight=0.5)
        (loss if scaler is None else scaler.scale(loss)).backward()


def graph(made: Program, scaler: torch.amp.GradScaler | None) -> None:
    assert scaler is None
    made.graph(batch())


def clip(made: Program, norm: float) -> None:
    nn.utils.clip_grad_norm_(made.module.parameters(), norm)


@pytest.mark.parametrize("leave", [halves, graph])
@pytest.mark.parametrize("method", ["per_example", "micro_batch"])
def test_a_gradient_clipped_by_hand_is_refused(leave: Leave, method: str) -> None:
    made = program(method)
    leave(made, None)
    clip(made, 0.1)
    with pytest.raises(ValueError, match=r"times what they gave.* `clip` of the spec"):
        made.update()


def test_a_clip_that_changes_nothing_is_accepted() -> None:
    made, plain = program(), program()
    for one in (made, plain):
        halves(one, None)
    clip(made, 1e6)
    assert made.update() == plain.update()


def test_a_scaled_loss_without_its_scaler_is_refused() -> None:
    made, scaler = program(), torch.amp.GradScaler("cpu")
    halves(made, scaler)
    with pytest.raises(ValueError, match=r"multiplied by 65536, .* `program.update\(scaler\)`"):
        made.update()


def test_gradients_that_were_set_to_zero_are_refused() -> None:
    made = program()
    halves(made, None)
    made.module.zero_grad(set_to_none=False)
    with pytest.raises(RuntimeError, match=r"a gradient of zeros.*`zero_grad\(\)`"):
        made.update()


def test_a_backward_pass_beside_the_program_is_accepted() -> None:
    made = program()
    halves(made, None)
    weights = [p for p in made.module.parameters() if p.dim() == 1]
    sum((1e-3 * p.square().sum() for p in weights), torch.zeros(())).backward()
    assert made.update()["loss"] > 0


def test_a_scaler_changes_neither_weights_nor_what_is_measured() -> None:
    scaled, plain = program(optimizer="sgd"), program(optimizer="sgd")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for seed in range(3):
        halves(scaled, scaler, seed)
        found = scaled.update(scaler)
        scaler.update()
        halves(plain, None, seed)
        wanted = plain.update()
        assert found["gns.noise"] == pytest.approx(wanted["gns.noise"], rel=1e-5)
        assert found["gns.signal"] == pytest.approx(wanted["gns.signal"], rel=1e-3)
    for name, parameter in plain.module.named_parameters():
        torch.testing.assert_close(scaled.module.get_parameter(name), parameter)


def test_a_step_whose_scaled_gradients_overflow_is_skipped_and_the_scale_falls() -> None:
    made, scaler = program(), torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = {name: p.detach().clone() for name, p in made.module.named_parameters()}
    halves(made, scaler)
    assert made.update(scaler)["skipped"] == 1.0
    scaler.update()
    assert scaler.get_scale() == 2.0**126
    assert made.clock.steps == 1
    assert all(torch.equal(before[name], p) for name, p in made.module.named_parameters())
    halves(made, None)
    assert "skipped" not in made.update()


def test_gradients_in_16_bits_may_round() -> None:
    torch.manual_seed(0)
    model = gpt(layers=2, width=32, heads=2, context=16).to(torch.bfloat16)
    made = trainc.compile(
        SPEC.format(on="type(LayerNorm)", method="per_example", optimizer="sgd"), model
    )
    inputs, targets = batch()
    for i in range(8):
        made.loss((inputs[i : i + 1], targets[i : i + 1]), loss_weight=1 / 8).backward()
    assert made.update()["gns.noise"] > 0


def test_a_mask_and_a_scaler_exclude_each_other() -> None:
    torch.manual_seed(0)
    model = gpt(layers=2, width=32, heads=2, context=16)
    spec = (
        "loss cross_entropy\noptimizer adamw { lr = 1e-3 }\nmask sift on ndim(2) { density = 5% }\n"
    )
    made, scaler = trainc.compile(spec, model), torch.amp.GradScaler("cpu")
    scaler.scale(made.loss(batch())).backward()
    with pytest.raises(ValueError, match="a GradScaler cannot find the gradients of"):
        made.update(scaler)
