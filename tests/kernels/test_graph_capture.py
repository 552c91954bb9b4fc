"""A CUDA graph capture that fails leaves a process that draws random numbers: by a stand-in for CUDA's generator."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from benchmarks.device import Cuda
from trainc.kernels.library.graph_capture import random_numbers_survive
from trainc.kernels.norm import tune


@dataclass
class State:
    """A generator's state: how far it is, and whether a capture has it."""

    offset: int = 0
    captured: bool = False


@dataclass
class Generator:
    """As torch's on CUDA: a capture marks the state, and only the end of a whole one unmarks it."""

    state: State = field(default_factory=State)

    def graphsafe_get_state(self) -> State:
        return self.state

    def graphsafe_set_state(self, state: "State | Generator") -> None:
        self.state = state.state if isinstance(state, Generator) else state

    def clone_state(self) -> "Generator":
        return Generator(State(self.state.offset))

    def draw(self) -> int:
        if self.state.captured:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        self.state.offset += 1
        return self.state.offset


class Capture:
    """torch.cuda.graph of a device whose captures fail, or do not."""

    def __init__(self, generator: Generator, *, fails: bool) -> None:
        self.generator, self.fails = generator, fails

    def __enter__(self) -> None:
        self.generator.state.captured = True

    def __exit__(self, *raised: Any) -> None:
        if self.fails:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.generator.state.captured = False


class Stream:
    """A stream without work."""

    def wait_stream(self, other: Any) -> None: ...


@pytest.fixture
def generators(monkeypatch: pytest.MonkeyPatch) -> list[Generator]:
    """Those of two devices; the second is the current one."""
    found = [Generator(), Generator(State(offset=7))]
    monkeypatch.setattr(torch.cuda, "default_generators", found)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    return found


def test_a_failed_capture_gives_the_state_back(generators: list[Generator]) -> None:
    for expected in (8, 9):
        with (
            pytest.raises(RuntimeError, match="during capture"),
            random_numbers_survive(),
            Capture(generators[1], fails=True),
        ):
            pass
        assert generators[1].draw() == expected
    assert generators[0].draw() == 1


def test_a_whole_capture_goes_on_from_where_it_was(generators: list[Generator]) -> None:
    with random_numbers_survive(), Capture(generators[1], fails=False):
        pass
    assert generators[1].draw() == 8


@pytest.mark.parametrize("fails", [False, True])
def test_the_benchmark_runs_eagerly_after_a_failed_capture(
    fails: bool, generators: list[Generator], monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = Capture(generators[1], fails=fails)
    for name, stand_in in {
        "Stream": Stream, "current_stream": Stream, "synchronize": lambda: None,
        "stream": lambda stream: pytest.MonkeyPatch.context(), "CUDAGraph": object,
        "graph": lambda graph, stream: capture,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    assert Cuda().captured(lambda: None)[1] == ("eager" if fails else "graph")
    assert generators[1].draw() == 8


def test_tuning_survives_a_failed_capture(
    generators: list[Generator], monkeypatch: pytest.MonkeyPatch
) -> None:
    testing = pytest.importorskip("triton.testing")

    def measure(work: Any, return_mode: str) -> float:
        with Capture(generators[1], fails=True):
            work()
        return 0.0

    monkeypatch.setattr(testing, "do_bench_cudagraph", measure)
    with pytest.raises(RuntimeError, match="during capture"):
        tune.seconds(lambda: None)
    assert generators[1].draw() == 8
