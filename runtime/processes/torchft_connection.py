"""The connection of one replica to those that are there now, by torchft; no other file knows torchft.

A lighthouse, a process of torchft's, knows which replicas are alive and forms a quorum of those that come to meet. One
that is behind the others is given the state of one that is not. What is sent goes through gloo, a state through HTTP.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch.distributed as dist
from torch import Tensor

from trainc.runtime.processes.replica_group import ReplicaLost

LIGHTHOUSE, NUMBER = "TORCHFT_LIGHTHOUSE", "REPLICA_GROUP_ID"
"""The environment variables of torchft that name the lighthouse, and number the replicas from 0."""
WAIT = "TORCHFT_QUORUM_TIMEOUT_SEC"
"""That which says for how many seconds a replica waits for others to meet."""
_TIMES = {
    "TORCHFT_TIMEOUT_SEC": 60,
    WAIT: 600,
    "TORCHFT_CONNECT_TIMEOUT_SEC": 60,
}
"""Seconds that an exchange, the wait for others, and a connection may take, by the variable that says otherwise."""
_NOT_THERE = (RuntimeError, TimeoutError, OSError)
"""What torchft raises where the lighthouse, or another replica, does not answer."""

State = dict[str, Any]


class WrongReplica(ValueError):
    """What says which replica this process is, or where the lighthouse is, makes no sense."""


def has_library() -> bool:
    """Return whether torchft is installed."""
    found = find_spec("torchft")
    return found is not None and found.origin is not None


def has_lighthouse() -> bool:
    """Return whether the environment names a lighthouse, so that this process is to be one of several replicas."""
    return bool(os.environ.get(LIGHTHOUSE))


def find_place(environment: Mapping[str, str] = os.environ) -> tuple[str, int] | None:
    """Return the address of the lighthouse and this replica's number, from the environment; None without lighthouse.

    Raises WrongReplica where they make no sense.
    """
    address, number = environment.get(LIGHTHOUSE, ""), environment.get(NUMBER, "")
    if not address:
        return None
    if not re.fullmatch(r"https?://.+:\d+/?", address):
        raise WrongReplica(
            f"{LIGHTHOUSE} is {address!r}: expected an address such as `http://host:29510`, which `torchft_lighthouse`"
            " shows when it starts"
        )
    if not number.isdecimal():
        raise WrongReplica(
            f"{NUMBER} is {number!r}: give each replica a number of its own, counted from 0, which it keeps when it is"
            " started again"
        )
    return address, int(number)


class Connection:
    """Meets the replicas that are there, and sums tensors over them; all of them must call its methods alike.

    `present` of them meet now, and `place` is that of this one among them, by their numbers.
    """

    def __init__(self, address: str, number: int) -> None:
        self._address, self._number = address, number
        self._manager: Any = None
        self._store: Any = None
        self._group: Any = None
        self._received: State | None = None
        self._give: Callable[[], State] = dict
        self.present, self.place = 1, 0

    @property
    def stands(self) -> bool:
        """Whether the lighthouse answered last."""
        return self._manager is not None

    def meet(self, progress: int, give: Callable[[], State]) -> State | None:
        """Wait for the replicas that are alive; return the state of one of most progress where this one has less.

        `give` returns that of this one, and is called from another thread. Raises ReplicaLost where no meeting comes
        about.
        """
        self._received, self._give = None, give
        try:
            manager = self._connected()
            manager.load_state_dict({"step": progress, "batches_committed": 0})
            manager.start_quorum()
        except _NOT_THERE as error:
            self.close()  # a manager that missed one quorum takes part in no other
            raise ReplicaLost(_first_line(error)) from error
        finally:
            self._give = dict
        self._check()
        self.present, self.place = manager.num_participants(), manager.participating_rank()
        received, self._received = self._received, None
        return received

    def sum(self, tensor: Tensor) -> None:
        """Replace a tensor on the CPU by its sum; raises ReplicaLost where a replica is lost meanwhile."""
        self._manager.allreduce(tensor, reduce_op=dist.ReduceOp.SUM).wait()
        self._check()

    def fail(self, error: Exception) -> None:
        """Let the meeting fail here."""
        self._manager.report_error(error)

    def commit(self) -> str | None:
        """End the meeting; return why it failed here, None where it did not."""
        if self._manager is None:
            return "the lighthouse did not answer"
        try:
            if self._manager.should_commit():
                return None
            self._check()
        except (ReplicaLost, *_NOT_THERE) as error:
            return _first_line(error)
        return "a replica was lost"

    def close(self) -> None:
        """Leave the replicas; the next meeting joins them anew."""
        manager, self._manager = self._manager, None
        if manager is not None:
            with suppress(*_NOT_THERE):
                manager.shutdown()
            self._group.shutdown()

    # inside

    def _connected(self) -> Any:
        """Return torchft's manager of this replica, made anew where it was closed."""
        if self._manager is not None:
            return self._manager
        exchange, wait, connect = (
            timedelta(seconds=int(os.environ.get(name) or seconds))
            for name, seconds in _TIMES.items()
        )
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        host = socket.gethostname()
        if self._store is None:
            self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        groups, managers = (
            import_module(f"torchft.{name}") for name in ("process_group", "manager")
        )
        self._group = groups.ProcessGroupGloo(timeout=exchange)
        self._manager = managers.Manager(
            pg=self._group,
            load_state_dict=self._receive,
            state_dict=self._given,
            min_replica_size=1,  # how many there must be is for the lighthouse to say
            use_async_quorum=False,
            timeout=exchange,
            quorum_timeout=wait,
            connect_timeout=connect,
            rank=0,
            world_size=1,
            store_addr=host,
            store_port=self._store.port,
            lighthouse_addr=self._address,
            replica_id=f"{self._number:06d}",
        )
        return self._manager

    def _receive(self, state: State) -> None:
        self._received = state

    def _given(self) -> State:
        return self._give()

    def _check(self) -> None:
        """Raise ReplicaLost where this meeting failed so far."""
        if (error := self._manager.errored()) is not None:
            raise ReplicaLost(_first_line(error.original_exception))


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
