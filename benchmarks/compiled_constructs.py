"""Every construct under `compile = inductor`, as a graph and by modules: how far its numbers are from uncompiled."""

import copy
import json
import time

import torch
from torch import Tensor, nn

import trainc
from benchmarks.measure import Json
from examples.models import gpt
from trainc.compiler.execution.execution import Executor

EXPECTED = "weights after three steps in float64 within 1e-9 of those of `compile = off`, for every construct"
GOAL = 1e-9
BASE = {
    "loss": "loss cross_entropy",
    "optimizer": "optimizer adamw { lr = 1e-2, weight_decay = 0.1 }",
}
SKIPPED = ("model", "data", "run", "distribute")
"""Kinds that name things, or need several processes."""


def measure() -> Json:
    """Train a small GPT under the example of every construct; what the example does not fit is said."""
    found = {
        f"{kind} {name}": _measure(kind, construct.usage)
        for (kind, name), construct in trainc.catalog().items()
        if kind not in SKIPPED
    }
    worst = [row["off by"] for rows in found.values() for row in rows.values() if "off by" in row]
    refused = [row for rows in found.values() for row in rows.values() if row.get("refused")]
    met = bool(worst) and max(worst) <= GOAL and not refused
    return {"expected": EXPECTED, "met": met, "measured": found}


def _measure(kind: str, usage: str) -> Json:
    rows: Json = {}
    executors: tuple[Executor, ...] = ("auto", "module")
    for executor in executors:
        begun = time.perf_counter()
        try:
            want, _ = _trained(kind, usage, "off", executor)
        except (trainc.SpecError, ValueError, RuntimeError, TypeError) as error:
            rows[executor] = {"not measured": str(error).strip().splitlines()[0]}
            continue
        got, program = _trained(kind, usage, "inductor", executor)
        compiler = program.execution.compiler
        assert compiler is not None
        off = max(_distance(got[name], value) for name, value in want.items())
        rows[executor] = {
            "off by": float(f"{off:.2g}"),
            "refused": compiler.refused,
            "seconds": round(time.perf_counter() - begun, 1),
        }
    print(f"{usage.splitlines()[0]}: {json.dumps(rows)}", flush=True)
    return rows


def _trained(
    kind: str, usage: str, mode: str, executor: Executor
) -> tuple[dict[str, Tensor], trainc.Program]:
    """Return the weights after three steps of two micro-batches, and the program."""
    clauses = [usage, *(text for other, text in BASE.items() if other != kind)]
    run = f"run {{ length = 400 steps, seed = 3, compile = {mode} }}"
    program = trainc.compile("\n".join([*clauses, run]), _model(), executor=executor)
    for seed in range(3):
        torch.manual_seed(seed)
        ids = [torch.arange(3), torch.arange(3, 6)] if program.reads_sample_ids else None
        program.step([_text(2 * seed), _text(2 * seed + 1)], sample_ids=ids)
    return copy.deepcopy(dict(program.module.state_dict())), program


def _model() -> nn.Module:
    torch.manual_seed(0)
    return gpt(layers=2, width=16, heads=2, context=8, vocabulary=24).double()


def _text(seed: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 24, (3, 9), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


def _distance(got: Tensor, want: Tensor) -> float:
    """Return the largest difference, to the largest number."""
    scale = float(want.abs().max()) or 1.0
    return float((got - want).abs().max()) / scale
