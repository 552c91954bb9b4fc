"""Adapters in lower precision: under autocast, with a GradScaler, and on weights of bfloat16."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trainc
from trainc.compiler.program.program import Program

BASE = "loss cross_entropy optimizer sgd { lr = 0.5 } run { length = 20 steps, seed = 3 } adapt "
CLAUSES = {
    "lora": 'lora on "0.linear1" | "0.linear2" { rank = 2, alpha = 4 }',
    "lora of an embedding": "lora on type(Embedding) { rank = 2, alpha = 4 }",
    "dora": 'dora on "0.linear1" | "0.linear2" { rank = 2, alpha = 4 }',
    "lora_mul": 'lora_mul on "0.linear1" | "0.linear2" { rank = 2 }',
    "parallel": 'parallel on "0" { rank = 2, norm = layer, init = xavier }',
    "prompt": 'prompt on "0" { tokens = 2 }',
    "apt": 'apt on "0.self_attn" { tokens = 2, rank = 2, init = published }',
}
IDS = torch.randint(0, 12, (4, 6), generator=torch.Generator().manual_seed(1))
TARGETS = IDS.roll(-1, 1)
every_adapter = pytest.mark.parametrize("clause", CLAUSES.values(), ids=CLAUSES)


class Model(nn.Sequential):
    """An embedding, a transformer block and a head."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True), nn.Linear(16, 12)
        )
        self.embedding = nn.Embedding(12, 16)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self[1](self[0](self.embedding(ids)))
        return found


def program_of(clause: str, dtype: torch.dtype = torch.float32) -> Program:
    """Return a program whose adapters are trained already, in full precision."""
    program = trainc.compile(BASE + clause, Model().double(), executor="module")
    for _ in range(3):
        program.step((IDS, TARGETS))
    module = program.module.to(dtype)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trainc.compile(BASE + clause, module)


def gradients(module: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the gradients by hand of what trains, under autocast with a dtype."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = F.cross_entropy(module(IDS).flatten(0, 1), TARGETS.flatten())
    found = torch.autograd.grad(loss, list(trained.values()))
    return {name: one.double() for name, one in zip(trained, found, strict=True)}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], most: float) -> None:
    """Compare gradients as wholes: relative to the norm of all that are expected."""
    assert found.keys() == expected.keys()
    one, two = (torch.cat([g.flatten() for g in of.values()]) for of in (found, expected))
    assert float((one - two).norm() / two.norm()) < most


@every_adapter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_scaled_step_under_autocast_is_that_of_a_loop_by_hand(
    clause: str, dtype: torch.dtype
) -> None:
    program = program_of(clause)
    by_hand = copy.deepcopy(program.module)
    trained = [p for p in by_hand.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.5)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
    for _ in range(3):
        with torch.autocast("cpu", dtype):
            program.step((IDS, TARGETS), scalers[0])
            loss = F.cross_entropy(by_hand(IDS).flatten(0, 1), TARGETS.flatten())
        scalers[1].scale(loss).backward()
        scalers[1].step(optimizer)
        optimizer.zero_grad()
        for scaler in scalers:
            scaler.update()
    mine = [p for p in program.module.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in mine)
    for one, two in zip(mine, trained, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


@every_adapter
@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_gradients_under_autocast_are_those_of_full_precision(
    clause: str, dtype: torch.dtype, most: float
) -> None:
    module = program_of(clause).module
    assert_near(gradients(module, dtype), gradients(copy.deepcopy(module).double()), most)


@every_adapter
def test_weights_in_bfloat16_keep_adapters_in_float32(clause: str) -> None:
    program = program_of(clause, torch.bfloat16)
    module = program.module
    kinds = {p.requires_grad: p.dtype for p in module.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    assert_near(gradients(module), gradients(copy.deepcopy(module).double()), 0.1)
    before = copy.deepcopy(module.state_dict())
    program.step((IDS, TARGETS))
    changed = {n for n, v in module.state_dict().items() if not torch.equal(v, before[n])}
    assert changed
    assert changed <= {n for n, p in module.named_parameters() if p.requires_grad}
