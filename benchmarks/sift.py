"""Peak memory and step time of training few entries, beside all of them and beside LoRA of as many parameters.

The layers have the shapes of a model of 7e9 parameters, each side divided by the same number. `python -P
benchmarks/run.py sift` takes the measurement. Memory is that of a process of each case, above what it had before
the first step: in the step that chooses the entries, and in those after it. Times are processor times on one thread, in
turn in one process. `state` is what stays between steps: moments, positions, copies.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.measure import Times, compared, in_turn, seconds, timed

WIDTH, INNER, LAYERS, TOKENS, CLASSES = 640, 1720, 4, 32, 64
"""A 1/6.4 of 4096 and 11008, and 4 of 32 layers."""
ROUNDS = 12
MIB = 2**20
CASES = {
    "dense": "",
    "lora": "",
    "sift 1%": 'mask sift on "layers.*" { density = 1%, rest = freeze }',
    "sift 5%": 'mask sift on "layers.*" { density = 5%, rest = freeze }',
}
SPEC = "train 1\nloss cross_entropy\noptimizer adamw { lr = 1e-4, weight_decay = 0.01 }\n"


def model() -> Any:
    """Return the model: attention projections and a gated feed-forward part, without what has no weights."""
    import torch
    from torch import nn

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
                nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)
            )
            self.gate_proj, self.up_proj = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
            self.down_proj = nn.Linear(INNER, WIDTH, bias=False)

        def forward(self, x: Any) -> Any:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
            x = x + self.o_proj(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
            return x + self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
            self.head = nn.Linear(WIDTH, CLASSES, bias=False)

        def forward(self, x: Any) -> Any:
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    torch.manual_seed(0)
    return Net()


def made(case: str) -> tuple[Any, Any]:
    """Return the program of a case, and a batch."""
    import torch

    import trainc

    net = model()
    if case == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        dense = sum(p.numel() for p in net.layers.parameters())
        of_rank = sum(sum(p.shape) for p in net.layers.parameters())
        names = [name.rpartition(".")[0] for name, _ in net.layers.named_parameters()]
        rank = max(1, round(0.01 * dense / of_rank))
        config = LoraConfig(r=rank, target_modules=[f"layers.{name}" for name in names])
        net = inject_adapter_in_model(config, net)
        net.head.requires_grad_(False)
    program = trainc.compile(SPEC + CASES[case], net)
    batch = torch.randn(1, TOKENS, WIDTH), torch.randint(CLASSES, (1, TOKENS))
    return program, batch


def optimizers(program: Any) -> list[Any]:
    """Return the optimizers of a program."""
    from trainc.runtime.step.optimizer import OptimizerStep

    return [one for one in program._machine.actions if isinstance(one, OptimizerStep)]


def held(program: Any) -> int:
    """Return the bytes that stay between steps besides weights."""
    states = (state for one in optimizers(program) for state in one.torch.state.values())
    moments: int = sum(tensor.nbytes for state in states for tensor in state.values())
    masks: int = sum(mask.memory() for mask in program.execution.method.masks.values())
    return moments + masks


def _status(key: str) -> float:
    """Return a line of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def memory(case: str) -> dict[str, float]:
    """Return what a case takes, in MiB; run in a process of its own."""
    import torch

    torch.set_num_threads(1)
    program, batch = made(case)
    with torch.no_grad():
        program.module(batch[0])
    peaks, before = [], _status("VmRSS")
    for steps in (1, 3):
        Path("/proc/self/clear_refs").write_text("5")  # begins the peak again
        for _ in range(steps):
            program.step(batch)
        peaks.append(_status("VmHWM") - before)
    weights = sum(p.nbytes for p in program.module.parameters())
    trained = sum(slot.tensor.numel() for one in optimizers(program) for slot in one.slots)
    return {
        "weights": round(weights / MIB, 1),
        "trained": trained,
        "state": round(held(program) / MIB, 3),
        "first step": round(peaks[0], 1),
        "later steps": round(peaks[1], 1),
    }


def measure() -> dict[str, Any]:
    """Measure all cases; see the head of this file."""
    import torch

    torch.set_num_threads(1)
    rows: dict[str, dict[str, Any]] = {}
    for case in CASES:
        code = (
            f"import json; from benchmarks.sift import memory; print(json.dumps(memory({case!r})))"
        )
        ran = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={
                **os.environ,
                "MALLOC_MMAP_THRESHOLD_": "65536",
            },  # what is freed leaves the process
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        rows[case] = json.loads(ran.stdout.splitlines()[-1])
    programs = {case: made(case) for case in CASES}

    def work(case: str) -> Times:
        program, batch = programs[case]
        return timed(lambda: program.step(batch))

    times = in_turn({case: partial(work, case) for case in CASES}, ROUNDS)
    ratios = {case: compared(times[case], times["dense"]) for case in CASES if case != "dense"}
    for case in CASES:
        rows[case]["step"] = seconds(times[case])
        rows[case]["state of dense"] = round(rows[case]["state"] / rows["dense"]["state"], 5)
    met = {
        "state at 1%": rows["sift 1%"]["state of dense"] <= 0.02,
        "step at 1%": ratios["sift 1%"]["cpu"]["median"] <= 1,
        "step at 5%": ratios["sift 5%"]["cpu"]["median"] <= 1,
    }
    shape = {"width": WIDTH, "inner": INNER, "layers": LAYERS, "tokens": TOKENS, "float": "32"}
    return {
        "expected": "state at most 2% of that of dense AdamW at a density of 1%; a step no slower than a dense one",
        "met": met,
        "measured": {"model": shape, "rows": rows, "step over dense": ratios},
    }
