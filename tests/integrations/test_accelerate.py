"""A loop of Accelerate under a spec: its numbers are those of the same loop with AdamW, and of the plain loop."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from tests.compiler.image_models import import_library
from tests.integrations.points import (
    ADAMW,
    GNS,
    METHOD,
    batches,
    equal,
    loader,
    near,
    network,
    plain_loop,
    points,
    same_metrics,
)
from tests.processes import run_processes, run_rank

pytestmark = pytest.mark.models


def accelerator_of(scaled: bool = False, **given: Any) -> Any:
    accelerate = import_library("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True, **given)
    if scaled:  # Accelerate makes a scaler for float16 on other devices than the CPU
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return accelerator


class Loop:
    """A training loop as Accelerate's pages show it, by AdamW or by a spec."""

    def __init__(
        self,
        spec: str | None = None,
        number: int = 16,
        size: int = 4,
        clip: float = 0,
        **given: Any,
    ) -> None:
        from trainc.integrations.accelerate import spec_optimizer

        self.clip, self.accelerator, self.bare = clip, accelerator_of(**given), network()
        optimizer: Any = torch.optim.AdamW(self.bare.parameters(), lr=1e-3, weight_decay=0)
        if spec is not None:
            optimizer = spec_optimizer(self.accelerator, self.bare, spec)
        self.own = optimizer
        data = loader(points(number), size)
        self.model, self.optimizer, self.data = self.accelerator.prepare(self.bare, optimizer, data)
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.metrics: list[dict[str, float]] = []
        self.seen: list[Any] = []

    def run(self, epochs: int = 1) -> Loop:
        accelerator = self.accelerator
        for x, y in (batch for _ in range(epochs) for batch in self.data):
            self.seen.append((x, y))
            with accelerator.accumulate(self.model):
                loss = cross_entropy(self.model(x), y)
                accelerator.backward(loss)
                if self.clip and accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
                    self.norms.append(float(norm))
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.losses.append(loss.item())
            if accelerator.sync_gradients and hasattr(self.own, "metrics"):
                self.metrics.append(dict(self.own.metrics))
        return self


CASES: list[dict[str, Any]] = [
    {},
    {"clip": 0.3},
    {"gradient_accumulation_steps": 2},
    {"gradient_accumulation_steps": 2, "number": 20, "clip": 0.3},  # 5 batches
    {"mixed_precision": "bf16"},
    {"scaled": True},
    {"scaled": True, "clip": 0.3, "gradient_accumulation_steps": 2, "number": 20},
]


@pytest.mark.parametrize("given", CASES)
def test_an_empty_spec_is_bit_equal_to_the_same_loop_with_adamw(given: dict[str, Any]) -> None:
    plain = Loop(None, **given).run(2)
    ours = Loop(ADAMW, **given).run(2)
    equal(ours.bare, plain.bare)
    assert (ours.losses, ours.norms) == (plain.losses, plain.norms)


@pytest.mark.parametrize("given", [{}, {"scaled": True}])
def test_clip_grad_norm_is_after_what_is_measured(given: dict[str, Any]) -> None:
    clipped = Loop(f"{ADAMW} {GNS}", clip=0.3, gradient_accumulation_steps=2, **given).run()
    plain = Loop(clip=0.3, gradient_accumulation_steps=2, **given).run()
    near(clipped.bare, plain.bare)
    spec = f"run {{ length = 2 steps, clip = 0.3 }} {ADAMW} {GNS}"
    made = batches(16, 4)
    _, expected = plain_loop(spec, [made[:2], made[2:]])
    for found, wanted in zip(clipped.metrics, expected, strict=True):
        same_metrics(found, wanted)
    lines = clipped.own.program.summary()
    assert any("clip_grad_norm_: clipped 2 of 2 steps to norm 0.3" in line for line in lines)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_spec_gives_the_numbers_of_the_plain_loop(parts: int) -> None:
    loop = Loop(METHOD, size=4 // parts, gradient_accumulation_steps=parts).run()
    made = batches(16, 4 // parts)
    model, expected = plain_loop(METHOD, [made[i : i + parts] for i in range(0, len(made), parts)])
    near(loop.bare, model)
    for found, metrics in zip(loop.metrics, expected, strict=True):
        same_metrics(found, metrics)


def test_a_model_that_accelerate_compiles_trains_by_a_spec() -> None:
    loop = Loop(f"{ADAMW} {GNS}", dynamo_backend="eager").run()
    assert type(loop.model).__name__ == "OptimizedModule"
    model, expected = plain_loop(f"{ADAMW} {GNS}", [[one] for one in batches(16, 4)])
    near(loop.bare, model)
    same_metrics(loop.metrics[-1], expected[-1])


def test_the_state_of_an_accelerator_has_all_of_the_spec(tmp_path: Path) -> None:
    spec = f"{ADAMW} {GNS} regularize ema {{ decay = 0.9 }}"
    whole = Loop(spec).run()
    whole.accelerator.save_state(str(tmp_path))
    whole.run()
    again = Loop(spec)
    again.accelerator.load_state(str(tmp_path))
    again.run()
    equal(again.bare, whole.bare)
    assert str(again.metrics) == str(whole.metrics[4:])
    assert again.own.program.clock.steps == 8


def test_a_model_that_returns_its_loss_and_one_of_another_optimizer() -> None:
    """The program knows the loss from the model; the other model is clipped and trained as ever."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Any, labels: Any) -> dict[str, Any]:
            logits = self.net(x)
            return {"loss": cross_entropy(logits, labels), "logits": logits}

    from trainc.integrations.accelerate import spec_optimizer

    accelerator, own, other = accelerator_of(), Own(), network()
    optimizer = spec_optimizer(accelerator, own, f"{ADAMW} {GNS}")
    sgd = torch.optim.SGD(other.parameters(), lr=0.1)
    model, second, first, sgd = accelerator.prepare(own, other, optimizer, sgd)
    made = batches(16, 4)
    for x, y in made:
        accelerator.backward(model(x=x, labels=y)["loss"])
        first.step()
        before = [p.detach().clone() for p in second.parameters()]
        accelerator.backward(cross_entropy(second(x), y))
        accelerator.clip_grad_norm_(second.parameters(), 0.01)
        sgd.step()
        sgd.zero_grad()
        moved = [
            (a - b.detach()).square().sum()
            for a, b in zip(before, second.parameters(), strict=True)
        ]
        assert float(sum(moved)) ** 0.5 == pytest.approx(0.1 * 0.01, rel=1e-4)
    alone, expected = plain_loop(f"{ADAMW} {GNS}", [[one] for one in made])
    near(own.net, alone)
    same_metrics(optimizer.metrics, expected[-1])


def test_clauses_that_read_logits_have_them_by_backward() -> None:
    spec = f"{ADAMW} regularize distill {{ weight = 0.5 }}"
    loop, made = Loop(spec), batches(16, 4)
    for x, y in made:
        logits = loop.model(x)
        loss = cross_entropy(logits, y)
        loop.accelerator.backward(loss, logits=logits, targets=y, inputs=x)
        loop.optimizer.step()
    model, expected = plain_loop(spec, [[one] for one in made])
    near(loop.bare, model)
    same_metrics(loop.own.metrics, expected[-1])
    x, y = made[0]
    with pytest.raises(ValueError, match=r"write `accelerator\.backward\(loss, logits=logits, tar"):
        loop.accelerator.backward(cross_entropy(loop.model(x), y))
    loop.own.program.discard_step()
    cross_entropy(loop.model(x), y).backward()
    with pytest.raises(RuntimeError, match=r"Call `accelerator\.backward\(loss\)`"):
        loop.optimizer.step()


@pytest.mark.parametrize(
    ("spec", "call", "message"),
    [
        (
            f"run {{ length = 4 steps, clip = 0.5 }} {ADAMW}",
            lambda loop: loop.accelerator.clip_grad_norm_(loop.model.parameters(), 1.0),
            "`clip_grad_norm_` clips to 1, and the spec's `run clip` to 0.5",
        ),
        (
            ADAMW,
            lambda loop: loop.accelerator.clip_grad_norm_(loop.model.parameters(), 1.0, 1),
            "a spec clips the L2 norm of gradients",
        ),
        (
            ADAMW,
            lambda loop: loop.accelerator.clip_grad_value_(loop.model.parameters(), 1.0),
            "clips each entry of the gradients",
        ),
    ],
)
def test_two_ways_of_clipping_are_an_error(spec: str, call: Any, message: str) -> None:
    loop = Loop(spec)
    x, y = batches(4, 4)[0]
    loop.accelerator.backward(cross_entropy(loop.model(x), y))
    with pytest.raises(ValueError, match=message):
        call(loop)


def test_clipping_before_the_last_micro_batch_and_a_prepared_model_are_errors() -> None:
    from trainc.integrations.accelerate import spec_optimizer

    loop = Loop(ADAMW, gradient_accumulation_steps=2)
    x, y = batches(4, 4)[0]
    with loop.accelerator.accumulate(loop.model):
        loop.accelerator.backward(cross_entropy(loop.model(x), y))
        with pytest.raises(ValueError, match=r"write `if accelerator\.sync_gradients"):
            loop.accelerator.clip_grad_norm_(loop.model.parameters(), 1.0)
    with pytest.raises(ValueError, match="the model is prepared already"):
        spec_optimizer(loop.accelerator, loop.model, ADAMW)


def test_types_that_divide_a_model_are_refused() -> None:
    from trainc.integrations.accelerate import spec_optimizer

    class Accelerator:
        distributed_type = import_library("accelerate").DistributedType.FSDP

    with pytest.raises(ValueError, match=r"Accelerator with DistributedType\.FSDP cannot train"):
        spec_optimizer(Accelerator(), network(), ADAMW)


def work(rank: int) -> dict[str, Any]:
    """Train by the spec in the process group that is open."""
    loop = Loop(METHOD, size=2, gradient_accumulation_steps=2, clip=0.5).run()
    return {
        "kind": str(loop.accelerator.distributed_type),
        "weights": [p.detach() for p in loop.bare.parameters()],
        "metrics": loop.metrics,
        "seen": loop.seen,
    }


def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    found = run_processes(Path(__file__), 2, tmp_path)
    whole: Any = [
        tuple(map(torch.cat, zip(*parts, strict=True)))
        for parts in zip(*(one["seen"] for one in found), strict=True)
    ]
    model, expected = plain_loop(METHOD, [whole[:2], whole[2:]])
    for one in found:
        assert one["kind"] == "DistributedType.MULTI_CPU"
        for mine, theirs in zip(one["weights"], model.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
        for metrics, wanted in zip(one["metrics"], expected, strict=True):
            same_metrics(metrics, wanted)


if __name__ == "__main__":
    os.environ |= {"RANK": sys.argv[1], "LOCAL_RANK": sys.argv[1], "WORLD_SIZE": sys.argv[2]}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "LOCAL_WORLD_SIZE": sys.argv[2]}
    os.environ["ACCELERATE_USE_CPU"] = "true"
    warnings.simplefilter("ignore")
    run_rank(work)
