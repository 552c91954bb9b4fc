"""Other people's loops under a spec: the Trainer of transformers, and a loop with DistributedDataParallel.

Each beside the same without trainc: how much does an empty spec add, and how much a noise scale on all norms?
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import trainc
from benchmarks import ROOT
from benchmarks.empty_spec import ByHand
from benchmarks.measure import (
    Json,
    Times,
    compared_over,
    in_processes,
    in_turn,
    seconds,
    timed,
)
from benchmarks.zoo.library_models import import_library
from examples.models import gpt

EXPECTED = (
    "median ratio of step times at most 1.01 with an empty spec and at most 1.05 with a noise scale on norms, in the"
    " Trainer by processor time and with 2 processes by wall time, one thread each"
)
GOALS = {"empty": 1.01, "gns": 1.05}
ADAMW = "optimizer adamw { lr = 1e-4, weight_decay = 0.01 }"
SPECS = {"empty": ADAMW, "gns": f"{ADAMW} noise_scale gns on role(norm) {{ smooth = 100 steps }}"}
PROCESSES = 2


@dataclass(frozen=True, slots=True)
class Size:
    """A GPT over bytes and a batch of `samples` times `context` tokens in each process."""

    layers: int = 4
    width: int = 256
    context: int = 128
    samples: int = 8
    rounds: int = 10
    processes: int = 5
    """How often all is begun anew, in fresh processes."""


SMALL = Size(layers=1, width=16, context=8, samples=2, rounds=2, processes=2)


class StepByStep:
    """A `Trainer.train()` in a thread of its own that runs one step when asked, and times it."""

    def __init__(self, spec: str | None, size: Size, folder: str) -> None:
        transformers = import_library("transformers")

        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._begin: tuple[float, float] | None = None
        self.times = Times(0.0, 0.0)
        self._ends = False
        self._error: BaseException | None = None
        stepper = self

        class Waits(transformers.TrainerCallback):  # type: ignore[misc, name-defined]  # transformers has no types here
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                stepper.pause()
                control.should_training_stop = stepper._ends

        self._trainer = _trainer(spec, size, folder)
        self._trainer.add_callback(Waits())
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def step(self) -> Times:
        """Run the next step; the first one begins with what the Trainer does before it."""
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error
        return self.times

    def end(self) -> None:
        """Let the training end."""
        self._ends = True
        self._go.release()
        self._thread.join()

    def pause(self) -> None:
        """Note the time of the step that has ended, and wait for the next to be asked for."""
        if self._begin is not None:
            wall, cpu = self._begin
            self.times = Times(time.perf_counter() - wall, time.thread_time() - cpu)
        self._done.release()
        self._go.acquire()
        self._begin = time.perf_counter(), time.thread_time()

    def _run(self) -> None:
        try:
            self._go.acquire()
            self._begin = time.perf_counter(), time.thread_time()
            self._trainer.train()
        except BaseException as error:
            self._error = error
        self._done.release()


def _trainer(spec: str | None, size: Size, folder: str) -> Any:
    transformers = import_library("transformers")
    torch.manual_seed(0)
    sizes = {"n_layer": size.layers, "n_embd": size.width, "n_head": 4, "n_positions": size.context}
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    words = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0}
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**words, **sizes, **drop, use_cache=False)
    )
    rows = torch.randint(0, 256, (256, size.context))
    optimizer = {"learning_rate": 1e-4, "lr_scheduler_type": "constant", "weight_decay": 0.01}
    arguments = transformers.TrainingArguments(
        folder,
        max_steps=100_000,
        per_device_train_batch_size=size.samples,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **({"optim": "adamw_torch", **optimizer} if spec is None else {}),
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    trainer.remove_callback(transformers.PrinterCallback)
    if spec is not None:
        from trainc.integrations.transformers import use_spec

        use_spec(trainer, spec)
    return trainer


def trainers(size: Json) -> dict[str, list[Times]]:
    """Time the Trainer beside itself under a spec, step by step in turn; gradients are clipped, as by default."""
    return _trainers(Size(**size))


def _trainers(size: Size) -> dict[str, list[Times]]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        steppers = {
            name: StepByStep(spec, size, folder)
            for name, spec in {"plain": None, **SPECS, "plain again": None}.items()
        }
        versions = {name: stepper.step for name, stepper in steppers.items()}
        times = in_turn(versions, size.rounds, warm_up=5)
        for stepper in steppers.values():
            stepper.end()
    return times


def _program(spec: str, size: Size) -> trainc.Program:
    model = _gpt(size)
    program = trainc.compile(f"loss cross_entropy {spec}", model)
    program.forward = DistributedDataParallel(model)
    return program


def _gpt(size: Size) -> torch.nn.Module:
    torch.manual_seed(0)
    return gpt(size.layers, size.width, heads=4, context=size.context)


def replica(rank: int, folder: str, size: Size) -> None:
    """Be one of the processes: all run the versions in the same turn, and rank 0 writes the times."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=PROCESSES)
    ids = torch.randint(
        0, 256, (size.samples, size.context + 1), generator=torch.Generator().manual_seed(rank)
    )
    batch = ids[:, :-1], ids[:, 1:]
    steps: dict[str, Callable[[Any], object]] = {
        "plain": ByHand(DistributedDataParallel(_gpt(size))).step
    }
    steps |= {name: _program(spec, size).step for name, spec in SPECS.items()}
    steps["plain again"] = ByHand(DistributedDataParallel(_gpt(size))).step

    def once(step: Callable[[Any], object]) -> Callable[[], Times]:
        def run() -> Times:
            dist.barrier()  # both begin together, however the last step ended
            return timed(lambda: step(batch))

        return run

    times = in_turn({name: once(step) for name, step in steps.items()}, size.rounds, warm_up=5)
    if rank == 0:
        found = {name: [(t.wall, t.cpu) for t in every] for name, every in times.items()}
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()


def replicas(size: Json) -> dict[str, list[Times]]:
    """Time a loop with DistributedDataParallel beside `program.step`, in two processes of one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-P", "-c", _REPLICA, str(ROOT), folder, json.dumps(size)]
        started = [subprocess.Popen([*words, str(rank)]) for rank in range(PROCESSES)]
        codes = [process.wait() for process in started]
        if any(codes):
            raise RuntimeError(f"a replica failed: {codes}")
        found = json.loads(Path(folder, "found.json").read_text())
    return {name: [Times(*pair) for pair in pairs] for name, pairs in found.items()}


_REPLICA = """
import json, sys
sys.path.append(sys.argv[1])
from benchmarks.loops import Size, replica
replica(int(sys.argv[4]), sys.argv[2], Size(**json.loads(sys.argv[3])))
"""


def measure(sizes: Sequence[Size] = (Size(),)) -> Json:
    """Measure both kinds of loop; a replica waits for the other, so there the time on the wall counts."""
    found: Json = {}
    met = []
    for size in sizes:
        for kind, function, clock in (
            ("Trainer", "trainers", "cpu"),
            ("DDP, 2 processes", "replicas", "wall"),
        ):
            times = in_processes(f"benchmarks.loops:{function}", size.processes, size=asdict(size))
            one = found[f"{kind}, {size.layers} layers of {size.width}"] = _summary(times, size)
            met += [one["ratio"][spec][clock]["median"] <= goal for spec, goal in GOALS.items()]
    return {"expected": EXPECTED, "met": all(met), "measured": found}


def _summary(times: Sequence[dict[str, list[Times]]], size: Size) -> Json:
    return {
        "size": asdict(size),
        "seconds": {name: seconds([t for one in times for t in one[name]]) for name in times[0]},
        "ratio": {name: compared_over(times, name, "plain") for name in SPECS},
        "ratio of two equal loops": compared_over(times, "plain again", "plain"),
    }
