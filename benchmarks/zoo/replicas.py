"""The zoo as replicas: two processes with unequal parts of each batch train as one process does with all of it.

Models are in eval mode: dropout, and statistics of a batch, are each process's own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

import trainc
from benchmarks import ROOT
from benchmarks.zoo.all_architectures import ARCHITECTURES
from benchmarks.zoo.architecture import Architecture
from benchmarks.zoo.clauses import BATCH
from benchmarks.zoo.examine import Outcome, logits_shape
from benchmarks.zoo.library_models import import_library

CUT, STEPS, PATIENCE = BATCH - 1, 2, 600
"""The examples of the first process, and the seconds for which the processes may take."""
WHOLE = (
    "its logits compare the examples of a batch with each other, and each process has some of them"
)
SPEC = "loss {loss}\noptimizer sgd {{ lr = 0.05, momentum = 0.9, clip = 1.0 }}"


def examine_replicas(names: Sequence[str]) -> dict[str, Outcome]:
    """Train architectures as two replicas and alone; compare weights and losses. Raises RuntimeError for a crash."""
    whole = {name: Outcome("refused", WHOLE) for name in names if _needs_whole(ARCHITECTURES[name])}
    names = [name for name in names if name not in whole]
    code = (
        f"import sys; sys.path.append({str(ROOT)!r}); from benchmarks.zoo.replicas import be_rank;"
        " be_rank(int(sys.argv[1]), sys.argv[2], sys.argv[3:])"
    )
    with tempfile.TemporaryDirectory() as folder:
        start = [sys.executable, "-P", "-W", "ignore", "-c", code]
        ranks = [
            subprocess.Popen([*start, str(rank), folder, *names], stderr=subprocess.PIPE, text=True)
            for rank in (0, 1)
        ]
        errors = [one.communicate(timeout=PATIENCE)[1] for one in ranks]
        if any(one.returncode for one in ranks):
            raise RuntimeError("\n".join(errors))
        found = [torch.load(Path(folder, f"{rank}.pt")) for rank in (0, 1)]
    return whole | {name: _compared(name, *(one[name] for one in found)) for name in names}


def _needs_whole(architecture: Architecture) -> bool:
    if architecture.library != "torch":
        import_library(architecture.library)
    return logits_shape(architecture)[1:] != logits_shape(architecture, CUT)[1:]


def be_rank(rank: int, folder: str, names: Sequence[str]) -> None:
    """Be one of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    found = {name: _attempt(ARCHITECTURES[name], rank) for name in names}
    torch.save(found, Path(folder, f"{rank}.pt"))
    dist.barrier()
    os._exit(0)  # a thread of gloo may ask for the interpreter at its end


def _attempt(architecture: Architecture, rank: int | None) -> Any:
    """Return losses and weights after some steps, as one of two replicas or alone; a text where that is an error."""
    if architecture.library != "torch":
        import_library(architecture.library)
    shape, classes = logits_shape(architecture), architecture.loss == "cross_entropy"
    part = slice(None) if rank is None else slice(CUT) if rank == 0 else slice(CUT, None)
    try:
        model = architecture.model().eval()
        program = trainc.compile(SPEC.format(loss=architecture.loss), model)
        if rank is not None:
            program.forward = DistributedDataParallel(model, find_unused_parameters=True)
        losses = []
        for seed in range(STEPS):
            batch = architecture.batch(seed, BATCH, classes, shape)
            losses.append(program.step(tree_map(lambda tensor: tensor[part], batch))["loss"])
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return losses, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _compared(name: str, one: Any, two: Any) -> Outcome:
    """Compare two replicas with each other and with a program that has all examples."""
    architecture = ARCHITECTURES[name]
    alone = _attempt(architecture, None)
    texts = [text for text in (one, two, alone) if isinstance(text, str)]
    if texts:
        return Outcome("refused" if len(texts) == 3 else "wrong", " / ".join(texts))
    (losses, weights), (_, others), (wanted, want) = one, two, alone
    if different := [n for n in want if not torch.equal(weights[n], others[n])]:
        return Outcome("wrong", f"replicas differ in {', '.join(different[:3])}")
    apart = max((_distance(weights[n], want[n]), n) for n in want)
    gap = max(abs(a - b) for a, b in zip(losses, wanted, strict=True))
    coarse = any(one.dtype in (torch.float32, torch.complex64) for one in want.values())
    # transformers takes logits to float32 for the losses of its models.
    rounding = max(architecture.rounding, 1e-5 if coarse else 0.0)
    if apart[0] > rounding or gap > max(rounding, 0.0 if architecture.labels is None else 1e-6):
        return Outcome(
            "wrong", f"`{apart[1]}` is {apart[0]:.2g} off one process, and a loss is {gap:.2g} off"
        )
    return Outcome("works", notes=[f"weights within {apart[0]:.1g} of one process"])


def _distance(one: Tensor, two: Tensor) -> float:
    """Return the largest difference of two tensors, relative to the largest entry where that is above 1."""
    if not one.numel() or not (one.is_floating_point() or one.is_complex()):
        return 0.0
    return float((one - two).abs().max() / two.abs().max().clamp(min=1.0))
