"""Replicas that may leave and join, each a process that this file starts, with a lighthouse in a process of its own."""

import contextlib
import faulthandler
import gc
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import trainc
from tests.compiler.exchange_cases import OUTER, SGD, STATE_TOO, Weights, data, net, state
from tests.processes import ENVIRONMENT, ROOT, run_rank
from trainc.compiler.program.program import Program
from trainc.runtime.processes.elastic_group import ElasticGroup
from trainc.runtime.processes.torchft_connection import Connection

ELASTIC = " { membership = torchft"
AVERAGED = SGD + "distribute local every 3 steps"
SPECS = {"averaged": AVERAGED, "state too": STATE_TOO, "outer": OUTER}
LIMIT = 300
"""Seconds after which a process says where it is, and ends."""


def elastic(spec: str) -> str:
    """Return a spec whose last clause is `distribute local`, with replicas that may leave and join."""
    if spec.endswith("}"):
        return spec[: spec.rindex("}")] + ", membership = torchft }"
    return spec + ELASTIC + " }"


class Trained:
    """What a replica keeps of its run: weights and metrics by the number of the step, and all notes."""

    def __init__(self, program: Program, number: int) -> None:
        self.program, self.number = program, number
        self.weights: dict[int, Weights] = {}
        self.metrics: dict[int, dict[str, float]] = {}
        self.notes: list[str] = []

    def steps(self, last: int) -> Iterator[int]:
        """Train up to a step; before each yield how many are done."""
        while True:
            self.program.begin()
            done = self.program.clock.steps
            if done == last:
                self.program.discard_step()
                return
            yield done
            metrics = self.program.step(data(self.number, done))
            step = self.program.clock.steps
            self.weights[step], self.metrics[step] = state(self.program), metrics
            self.notes += self.program.report().notes

    def found(self) -> dict[str, Any]:
        return {
            "weights": self.weights,
            "metrics": self.metrics,
            "notes": self.notes,
            "summary": self.program.summary(),
        }


def stays(number: int, folder: Path, *_: str) -> Any:
    """Every spec after another, in programs that no replica leaves."""
    found = {}
    for name, spec in SPECS.items():
        run = Trained(trainc.compile(elastic(spec), net()), number)
        for _done in run.steps(7):
            pass
        found[name] = run.found()
        del run
        gc.collect()
    return found


def connects(folder: Path, name: str, *others: str) -> None:
    """Let this process, once it is connected, say so by a file and wait for those of others: none meets before that."""
    connected = Connection._connected

    def together(self: Connection) -> Any:
        manager = connected(self)
        if not (folder / name).exists():
            (folder / name).touch()
            for other in others:
                wait_for(folder / other)
            time.sleep(1)  # for the lighthouse to hear of all of them
        return manager

    Connection._connected = together  # type: ignore[method-assign]


def dies_between(number: int, folder: Path, *_: str) -> Any:
    """The last of three ends after step 4."""
    connects(folder, f"is {number}", "is 0", "is 1", "is 2")
    run = Trained(trainc.compile(elastic(STATE_TOO), net()), number)
    for done in run.steps(7):
        if (number, done) == (2, 4):
            os._exit(9)
    return run.found()


def dies_in_turn(number: int, folder: Path, *again: str) -> Any:
    """Of three, number 1 ends in the turn after step 6, and is started again: then it begins on other weights."""
    if again:
        for other in (0, 2):  # a lighthouse that hears of this one may leave a late one out
            wait_for(folder / f"without 1 {other}")
        connects(folder, "again")
    else:
        connects(folder, f"is {number}", "is 0", "is 1", "is 2")
    run = Trained(trainc.compile(elastic(OUTER), net(9 if again else 0)), number)
    for done in run.steps(90):
        if done > 6 and run.metrics.get(done, {}).get("local.replicas") == 3:
            break  # all are there again
        if (number, done) == (1, 5) and not again:
            ElasticGroup._all_reduce = lambda self, tensor: os._exit(9)  # type: ignore[method-assign]
        if done == 10:
            (folder / f"without 1 {number}").touch()
            wait_for(folder / "again")
        if done >= 10:
            time.sleep(0.2)
    return run.found()


def differs(number: int, folder: Path, *_: str) -> Any:
    """Of three, number 2 has another spec, and says why it leaves."""
    connects(folder, f"is {number}", "is 0", "is 1", "is 2")
    spec = SGD.replace("0.1", "0.2") if number == 2 else SGD
    run = Trained(trainc.compile(elastic(spec + "distribute local every 3 steps"), net()), number)
    try:
        for _done in run.steps(4):
            pass
    except ValueError as error:
        return str(error)
    return run.found()


def alone(number: int, folder: Path, *_: str) -> Any:
    """The lighthouse is away in the turn after step 6, and there again for that after step 9."""
    os.environ["TORCHFT_QUORUM_TIMEOUT_SEC"] = "10"
    run = Trained(trainc.compile(elastic(OUTER), net()), number)
    for done in run.steps(10):
        if done == 4:
            (folder / "end lighthouse").touch()
            wait_for(folder / "ended")
        if done == 7:
            (folder / "start lighthouse").touch()
            wait_for(folder / "started")
    return run.found()


def wait_for(path: Path) -> None:
    ends = time.monotonic() + LIMIT
    while not path.exists():
        assert time.monotonic() < ends, f"{path} is not there"
        time.sleep(0.02)


def fixed(rank: int) -> Any:
    """Every spec with the replicas of torch.distributed."""
    found = {}
    for name, spec in SPECS.items():
        run = Trained(trainc.compile(spec, net()), rank)
        for _done in run.steps(7):
            pass
        found[name] = run.found()
    return found


# Starting them.


@contextlib.contextmanager
def lighthouse(least: int, port: int = 0) -> Iterator[str]:
    """Run a lighthouse that wants at least so many replicas; yields its address."""
    process = subprocess.Popen(
        [sys.executable, "-P", __file__, "lighthouse", str(least), str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment({}),
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def be_lighthouse(least: int, port: int) -> None:
    from torchft.coordination import LighthouseServer  # type: ignore[import-not-found]

    server = LighthouseServer(
        bind=f"0.0.0.0:{port}",
        min_replicas=least,
        join_timeout_ms=5000,
        quorum_tick_ms=20,
        heartbeat_timeout_ms=3000,
    )
    print(server.address(), flush=True)
    time.sleep(2 * LIMIT)


def environment(more: dict[str, str]) -> dict[str, str]:
    path = os.pathsep.join((str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])))
    times = {"TORCHFT_TIMEOUT_SEC": "40", "TORCHFT_QUORUM_TIMEOUT_SEC": "120"}
    connect = {"TORCHFT_CONNECT_TIMEOUT_SEC": "5"}
    return dict(os.environ) | ENVIRONMENT | times | connect | {"PYTHONPATH": path} | more


def start(
    case: str, number: int, folder: Path, address: str, *more: str, name: str = ""
) -> subprocess.Popen[str]:
    """Start one replica; what it finds is written to `<name or number>.pt` in the folder."""
    return subprocess.Popen(
        [sys.executable, "-P", __file__, case, str(number), str(folder), name, *more],
        stderr=subprocess.PIPE,
        text=True,
        env=environment({"TORCHFT_LIGHTHOUSE": address, "REPLICA_GROUP_ID": str(number)}),
        start_new_session=True,
    )


def finished(replicas: Sequence[subprocess.Popen[str]], codes: Sequence[int]) -> None:
    """Wait for replicas; fails with what they wrote unless they end with these codes."""
    try:
        errors = [one.communicate(timeout=LIMIT + 10)[1] for one in replicas]
    finally:
        for one in replicas:
            if one.poll() is None:
                one.kill()
                one.communicate()
    assert [one.returncode for one in replicas] == list(codes), "\n".join(errors)


def read(folder: Path, name: str | int) -> Any:
    return torch.load(folder / f"{name}.pt", weights_only=False)


CASES = {one.__name__: one for one in (stays, dies_between, dies_in_turn, differs, alone)}


def main() -> None:
    case, number, folder, name, *more = sys.argv[1:]
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    torch.set_num_threads(1)
    found = CASES[case](int(number), Path(folder), *more)
    torch.save(found, Path(folder) / f"{name or number}.pt")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1] == "lighthouse":
        be_lighthouse(int(sys.argv[2]), int(sys.argv[3]))
    elif sys.argv[1] in CASES:
        main()
    else:
        run_rank(fixed)
