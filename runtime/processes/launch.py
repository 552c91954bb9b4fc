"""The processes that a launcher such as torchrun started for one run, as its environment variables tell."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from hashlib import sha256
from importlib import import_module
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
import torch.distributed as dist

_MARGIN = timedelta(minutes=1)
"""How much later than our own timeout that of torch ends a process, so that ours can say who is late."""
_CONNECT = timedelta(seconds=60)
_POLITE = 0.5
"""Seconds for which other ranks let rank 0 speak first."""


P = ParamSpec("P")
Found = TypeVar("Found")
_JOINED = [0]
"""How many runs this process has been a part of."""


class WrongLaunch(ValueError):
    """The environment variables of a launcher do not describe a process of several."""


@dataclass(frozen=True, slots=True)
class Launch:
    """This process among those that were started together: `local_rank` counts those of this machine.

    `restarts` is how often the launcher has started all of them again.
    """

    rank: int
    size: int
    local_rank: int
    restarts: int = 0

    @property
    def name(self) -> str:
        """Return what this process is called in messages."""
        return f"rank {self.rank}"


def find_launch(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """Return this process's place as torchrun's variables tell it; None where nothing launched several processes.

    Raises WrongLaunch where they do not fit together.
    """
    size = _number(environment, "WORLD_SIZE", 1)
    restarts = _number(environment, "TORCHELASTIC_RESTART_COUNT", 0)
    if size == 1 and "TORCHELASTIC_RUN_ID" not in environment:
        return None
    wanted = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in wanted if not environment.get(name)]:
        raise WrongLaunch(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set: start the"
            " processes with `torchrun --nproc-per-node N -m trainc run ...`, or remove WORLD_SIZE to train in one"
        )
    rank = _number(environment, "RANK", 0)
    if not 0 <= rank < size:
        raise WrongLaunch(f"RANK is {rank}, and WORLD_SIZE is {size}: expected 0 to {size - 1}")
    if size > 1 and not dist.is_available():
        raise WrongLaunch(f"WORLD_SIZE is {size}, but this torch was built without distributed")
    return Launch(rank, size, _number(environment, "LOCAL_RANK", rank), restarts)


def is_one_of_several() -> bool:
    """Return whether a launcher started this process together with others."""
    with suppress(WrongLaunch):
        launch = find_launch()
        return launch is not None and launch.size > 1
    return False


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdecimal():
        raise WrongLaunch(f"{name} is {text!r}: expected a whole number, 0 or more")
    return int(text)


def connect(run: int) -> Any:
    """Return a connection of its own to the store through which the processes find each other.

    `run` is the number of the run in these processes. The launcher's store may stay when it starts them again, with
    what those before have written there.
    """
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    launch = find_launch()
    store = next(iter(rendezvous("env://", timeout=_CONNECT)))[0]
    return PrefixStore(f"trainc {0 if launch is None else launch.restarts} {run}", store)


def first_to_say(text: str) -> bool:
    """Return whether no other process of this launch says the same; rank 0 is let go first."""
    with suppress(Exception):
        launch = find_launch()
        if launch is None or launch.size == 1:
            return True
        if launch.rank:
            time.sleep(_POLITE)
        return bool(connect(_JOINED[0]).add(f"said/{sha256(text.encode()).hexdigest()}", 1) == 1)
    return True


def lasting(store: Any) -> Any:
    """Return the part of a store that stays when the launcher starts all processes again; None where none does."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return store.underlying_store


@contextmanager
def joined(launch: Launch, device: torch.device, timeout: float) -> Iterator[Any]:
    """Be one of the processes of a launch inside this block; they talk by gloo, and on CUDA by NCCL as well.

    `timeout` is how many seconds one of them may wait for the others. Yields a connection to their store.
    """
    _JOINED[0] += 1
    own = connect(_JOINED[0])
    if launch.size == 1:
        yield own
        return
    # Its functions have the group there is at their import as a default argument: imported within the block, as a
    # capture does, they kept the group, and its threads could abort a process at its end.
    import_module("torch.distributed.nn")
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend,
        store=connect(_JOINED[0]),
        rank=launch.rank,
        world_size=launch.size,
        timeout=timedelta(seconds=timeout) + _MARGIN,
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield own
    finally:
        dist.destroy_process_group()


def leaving_no_threads(run: Callable[P, Found]) -> Callable[P, Found]:
    """Let nothing stay of the process groups of a function once it returns.

    DistributedDataParallel is a cycle that holds its group, and this its threads.
    """

    @wraps(run)
    def ran(*args: P.args, **options: P.kwargs) -> Found:
        try:
            return run(*args, **options)
        finally:
            if is_one_of_several():
                gc.collect()

    return ran


def end_process(code: int) -> NoReturn:
    """End this process with an exit code, after what was registered for its end, and without Python's own clean-up.

    A thread of gloo that asks for the interpreter meanwhile would abort the process ("terminate called without an
    active exception").
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
