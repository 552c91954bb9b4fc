"""Adapters of layers with a `forward` of their own: merged where it gives what torch's gives, else refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import trainc
from trainc.compiler.constructs.adapt._layers import refuse_own_forward
from trainc.compiler.program.program import Program

BASE = "loss cross_entropy run { length = 10 steps, seed = 3 } optimizer sgd { lr = 0.1 }\n"
IDS = torch.randint(0, 24, (4, 8), generator=torch.Generator().manual_seed(1))
BATCH = (IDS, IDS.roll(-1, 1))
CLAUSES = {
    "lora": 'adapt lora on "1" { rank = 2, alpha = 4 }',
    "dora": 'adapt dora on "1" { rank = 2, alpha = 4 }',
    "lora_mul": 'adapt lora_mul on "1" { rank = 2, terms = [weight] }',
}


class Matmul(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Counting(Matmul):
    """Counts its calls, in a buffer, a number and a list, and draws from random streams."""

    calls: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("calls", torch.zeros(()))
        self.number, self.sizes = 0, [0]
        self.own = torch.Generator().manual_seed(5)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.number += 1
        self.sizes.append(len(x))
        torch.rand(3)
        torch.rand(3, generator=self.own)
        return super().forward(x)


class OfSequences(Matmul):
    """Takes (batch, time, in) alone."""

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        return super().forward(x.flatten(0, 1)).view(batch, time, -1)


class InFloat32(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return functional.linear(x.float(), self.weight.float(), bias).to(x.dtype)


class OwnConvolution(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        found: Tensor = self._conv_forward(x, self.weight, None) + self.bias[:, None]
        return found


class Tripled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class Limited(nn.Linear):
    """Is linear as far as numbers of ordinary size show."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-1e4, 1e4)


class Centred(nn.Linear):
    """Subtracts a mean that is zero now."""

    mean: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("mean", torch.zeros(inputs))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - self.mean)


class Beside(nn.Linear):
    """Has another layer beside it, which gives zero now."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.more = nn.Linear(inputs, outputs, bias=False)
        nn.init.zeros_(self.more.weight)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = super().forward(x) + self.more(x)
        return found


class Dropping(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(super().forward(x), 0.5, self.training)


class Rounded(nn.Linear):
    """Has a step at zero that small inputs alone show."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.where(y.abs() > 1e-3, 0)


class Picky(nn.Linear):
    """Takes inputs of one size alone, which no check can know."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[:-1] != (4, 8):
            raise RuntimeError("expected 4 sequences of 8")
        return super().forward(x)


MERGED = [Matmul, Counting, OfSequences]
REFUSED = [Tripled, Limited, Centred, Beside, Dropping, Rounded, Picky]


def trained(clause: str, kind: Any) -> Program:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(24, 6), kind(6, 6), nn.Linear(6, 24)).double()
    program = trainc.compile(BASE + clause, module)
    for _ in range(3):
        program.step(BATCH)
    return program


def state_of(layer: Any) -> dict[str, Any]:
    return {
        name: value.get_state().tolist() if isinstance(value, torch.Generator) else value
        for name, value in vars(layer).items()
        if name in ("number", "own", "training")
    } | {"sizes": [*getattr(layer, "sizes", ())], "buffers": [b.item() for b in layer.buffers()]}


@pytest.mark.parametrize("clause", CLAUSES.values(), ids=CLAUSES)
@pytest.mark.parametrize("kind", MERGED)
def test_a_forward_that_gives_what_linear_gives_is_merged(kind: Any, clause: str) -> None:
    program = trained(clause, kind)
    layer = program.module.get_submodule("1")
    before, held = program.module(IDS).detach(), layer.weight.detach().clone()  # type: ignore[operator]
    state, stream = state_of(layer), torch.get_rng_state()
    merged = program.merge()
    assert torch.equal(torch.get_rng_state(), stream)
    assert state_of(layer) == state
    assert type(layer) is kind
    assert not torch.equal(layer.weight, held)  # type: ignore[arg-type]
    torch.testing.assert_close(merged(IDS), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("clause", CLAUSES.values(), ids=CLAUSES)
@pytest.mark.parametrize("kind", REFUSED)
def test_a_forward_that_gives_something_else_is_not_merged(kind: Any, clause: str) -> None:
    program = trained(clause, kind)
    layer = program.module.get_submodule("1")
    held = layer.weight.detach().clone()  # type: ignore[operator]
    state, stream = state_of(layer) if kind is not Centred else {}, torch.get_rng_state()
    with pytest.raises(ValueError, match=rf"cannot be merged: the `forward` of {kind.__name__} is"):
        program.merge()
    assert torch.equal(torch.get_rng_state(), stream)
    assert (state_of(layer) if kind is not Centred else {}) == state
    assert torch.equal(layer.weight, held)  # type: ignore[arg-type]
    program.step(BATCH)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [Matmul, InFloat32])
def test_each_dtype_is_known(kind: Any, bias: bool, dtype: torch.dtype) -> None:
    """A rounding more in half precision is none that counts; a factor of 1.001 is one, in float64."""
    refuse_own_forward(kind(300, 20, bias=bias).to(dtype))

    class Off(kind):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = super().forward(x) * 1.001
            return found

    with pytest.raises(ValueError, match=r"the `forward` of Off is not that of nn\.Linear"):
        refuse_own_forward(Off(300, 20, bias=bias).to(dtype))


def test_a_convolution_is_tried_as_well() -> None:
    class Halved(OwnConvolution):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 2

    form = {"stride": 2, "dilation": 2, "padding": 1}
    refuse_own_forward(OwnConvolution(3, 5, 4, **form))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"the `forward` of Halved is not that of nn\.Conv1d"):
        refuse_own_forward(Halved(3, 5, 4, **form))  # type: ignore[arg-type]


def test_running_out_of_memory_stays_what_it_is() -> None:
    class Large(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        refuse_own_forward(Large(3, 4))


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_falcon_is_merged(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.FalconConfig(
        vocab_size=24, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, bias=True,
        hidden_dropout=0.0, attention_dropout=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    module = transformers.FalconForCausalLM(config).double()
    program = trainc.compile(
        BASE + f'adapt {name} on "**.query_key_value" | "**.mlp.*" & type(Linear)'
        " { rank = 2, alpha = 4 }",
        module,
    )
    for _ in range(3):
        program.step(BATCH)
    module.eval()
    before = module(IDS).logits.detach()
    torch.testing.assert_close(program.merge()(IDS).logits, before, rtol=1e-12, atol=1e-12)
    assert type(module.transformer.h[0].mlp.dense_h_to_4h).__name__ == "FalconLinear"
