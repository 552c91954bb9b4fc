"""What records CUDA graphs, by a stand-in for torch's CUDA; and what of a graph no recording can keep."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tests.stand_in_recorder import StandIn
from trainc.compiler.graph.trial import disagreement
from trainc.compiler.patterns.replayable import host_copies, host_draws, host_reads, written
from trainc.compiler.replay.recorded_pass import WrittenBuffers, copies
from trainc.compiler.replay.recorder import CudaRecorder, Run


class State:
    """A generator's state, and the graphs that are registered with it."""

    def __init__(self) -> None:
        self.captured = False
        self.graphs: weakref.WeakSet[Graph] = weakref.WeakSet()


class Generator:
    def __init__(self) -> None:
        self.state = State()

    def graphsafe_get_state(self) -> State:
        return self.state

    def graphsafe_set_state(self, state: Any) -> None:
        self.state = getattr(state, "state", state)

    def clone_state(self) -> Generator:
        return Generator()


class Graph:
    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


class Cuda:
    """torch.cuda of one device: captures mark the generator's state, and `fails` says which of them fail."""

    def __init__(self, patch: pytest.MonkeyPatch, fails: set[int]) -> None:
        self.generator, self.fails = Generator(), fails
        self.pools: list[Any] = []
        self.left: list[Any] = []
        self.users, self.remains = 0, False
        """The graphs of the pool, and whether something else is in it, as cuBLAS leaves a workspace there."""
        self.streams = ["own"]
        self.captures = 0
        for name, stand_in in {
            "Stream": lambda device: "side", "graph_pool_handle": lambda: (0, 1), "CUDAGraph": Graph,
            "current_device": lambda: 0, "default_generators": [self.generator],
            "device": lambda device: nullcontext(), "current_stream": lambda: self.streams[-1],
            "stream": self.stream, "graph": self.graph,
        }.items():  # fmt: skip
            patch.setattr(torch.cuda, name, stand_in)
        patch.setattr(torch._C, "_cuda_endAllocateToPool", self.leave, raising=False)
        patch.setattr(torch._C, "_cuda_releasePool", self.release, raising=False)

    def leave(self, device: int, pool: Any) -> None:
        self.left.append(pool)

    def release(self, *_: Any) -> None:
        self.users -= 1

    @contextmanager
    def stream(self, stream: str) -> Any:
        depth = len(self.streams)
        self.streams.append(stream)
        try:
            yield
        finally:
            del self.streams[depth:]

    def graph(
        self, graph: Graph, pool: Any, stream: str, mode: str
    ) -> AbstractContextManager[None]:
        assert mode == "thread_local"
        self.pools.append(pool)
        return self.capture(graph, stream)

    @contextmanager
    def capture(self, graph: Graph, stream: str) -> Any:
        """As torch's: what fails leaves the stream, and the generator's state, as a capture has them."""
        state = self.generator.state
        assert self.users or not self.remains, "INTERNAL ASSERT FAILED: use_count > 0"
        self.users += 1
        self.captures += 1
        state.captured = True
        self.streams.append(stream)
        yield
        if self.captures in self.fails:
            raise RuntimeError("operation failed due to a previous error during capture")
        state.captured = False
        state.graphs.add(graph)
        weakref.finalize(graph, self.release)
        self.remains = True
        self.streams.pop()


def test_every_graph_is_registered_with_the_devices_own_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = Cuda(monkeypatch, fails=set())
    own, recorder = cuda.generator.state, CudaRecorder(torch.device("cuda", 0))
    made = [recorder.record(lambda: [torch.ones(1)]) for _ in range(2)]
    assert cuda.generator.state is own
    assert len(own.graphs) == 2
    assert set(cuda.pools) == {(0, 1)}
    for one in made:
        one.replay()
    assert [graph.replays for graph in own.graphs] == [1, 1]


def test_a_pool_outlives_its_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch, fails=set())
    recorder = CudaRecorder(torch.device("cuda", 0))
    for _ in range(3):  # each is dropped before the next one, as where weights have moved
        recorder.record(lambda: [torch.ones(1)])
    assert cuda.users == 1
    del recorder
    assert cuda.users == 0


@pytest.mark.parametrize("fails", [2, 3])
def test_a_capture_that_fails_leaves_random_numbers_stream_and_pool(
    fails: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = Cuda(monkeypatch, fails={fails})
    own, recorder = cuda.generator.state, CudaRecorder(torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match="during capture"):
        recorder.record(lambda: [torch.ones(1)])
    assert not cuda.generator.state.captured
    assert (cuda.generator.state is own) == (fails == 2)  # else it was captured, and is not usable
    assert cuda.streams == ["own"]
    assert cuda.left == [(0, 1)]
    assert cuda.users == 1  # what holds the pool


# the stand-in of other tests: what a device would refuse, or would compute of what was


def test_the_stand_in_refuses_what_waits_for_a_device() -> None:
    def record(run: Run) -> None:
        StandIn(torch.device("cpu")).record(run)

    mask = NUMBERS > 0
    record(lambda: [NUMBERS[IDS], NUMBERS.clone().index_put_((mask,), torch.tensor(0.0))])
    reads: list[Run] = [
        lambda: [NUMBERS * NUMBERS.sum().item()], lambda: [NUMBERS[mask]], lambda: [mask.nonzero()],
        lambda: [NUMBERS.clone().index_put_((mask,), NUMBERS)], lambda: [torch.linalg.inv(torch.eye(2))],
    ]  # fmt: skip
    for run in reads:
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            record(run)


def test_the_stand_in_refuses_what_a_recording_would_not_follow() -> None:
    """Numbers of the host and addresses are those of the recording for good."""
    x, other, number = NUMBERS.clone(), [NUMBERS.clone()], [2.0]
    follows = StandIn(torch.device("cpu")).record(lambda: [x * 2.0 + x.cumsum(0), None])
    recordings = [
        StandIn(torch.device("cpu")).record(run)
        for run in (
            lambda: [x * number[0]],
            lambda: [x + other[0]],
            lambda: [x] if number[0] == 2 else [x.exp()],
        )
    ]
    x += 1
    for one in (follows, *recordings):
        one.replay()
    assert follows.outputs[0] is not None
    assert torch.equal(follows.outputs[0], x * 2 + x.cumsum(0))
    number[0], other[0] = 3.0, other[0].clone()
    for one in recordings:
        with pytest.raises(AssertionError, match="a recording"):
            one.replay()


# what no recording keeps


def traced(function: Any, *given: Tensor) -> torch.fx.Graph:
    return make_fx(function, tracing_mode="fake")(*given).graph


NUMBERS, IDS = torch.ones(4), torch.tensor([0, 2])


def test_what_the_host_reads_is_found() -> None:
    assert host_reads(traced(lambda x, ids: x[ids] + x.cumsum(0)[:2], NUMBERS, IDS)) == []
    assert host_reads(traced(lambda x: x.clone().index_put_((x > 0,), x.sum()), NUMBERS)) == []

    def puts(x: Tensor) -> Tensor:
        return x.clone().index_put_((x > 0,), x)

    assert host_reads(traced(puts, NUMBERS)) == ["aten.index_put_.default"]
    square = torch.eye(2)
    assert host_reads(traced(torch.linalg.inv, square)) == ["aten._linalg_check_errors.default"]


def test_what_the_host_draws_is_found() -> None:
    graph = traced(lambda x: x + torch.rand(4), NUMBERS)
    assert host_draws(graph, "cpu") == []
    assert host_draws(graph, "cuda") == ["aten.rand.default"]
    assert host_draws(traced(lambda x: x * 2, NUMBERS), "cuda") == []


def test_copies_between_the_hosts_memory_and_the_devices_are_found() -> None:
    aten = torch.ops.aten
    mode = FakeTensorMode()

    def on(device: str, *shape: int) -> Tensor:
        return FakeTensor(mode, torch.empty(shape, device="meta"), torch.device(device))

    def found(operator: Any, result: str, *given: tuple[Any, ...]) -> list[str]:
        """What is found of one operator, given operands of a device and a shape."""
        graph = torch.fx.Graph()
        operands = [graph.placeholder(f"x{at}") for at in range(len(given))]
        for node, (device, *shape) in zip(operands, given, strict=True):
            node.meta["val"] = on(device, *shape)
        called = graph.call_function(operator, tuple(operands))
        called.meta["val"] = on(result, 4)
        return host_copies(graph, "cuda")

    host, device, number = ("cpu", 4), ("cuda:0", 4), ("cpu",)
    assert found(aten._to_copy.default, "cuda:0", host) == ["aten._to_copy.default"]
    assert found(aten._to_copy.default, "cuda:0", number) == ["aten._to_copy.default"]
    assert found(aten._to_copy.default, "cpu", device) == ["aten._to_copy.default"]
    assert found(aten.gather.default, "cuda:0", device, host) == ["aten.gather.default"]
    for nothing in (
        found(aten._to_copy.default, "cuda:0", device), found(aten.mul.Tensor, "cuda:0", device, number),
        found(aten.mul.Tensor, "cpu", host, host), found(aten.zeros_like.default, "cuda:0", host),
        found(aten.new_zeros.default, "cuda:0", host),
    ):  # fmt: skip
        assert nothing == []


def test_writes_to_inputs_are_found_also_through_views() -> None:
    assert written(traced(lambda x: x.clone().mul_(2), NUMBERS)) == []
    (found,) = written(traced(lambda x, y: x[1:].mul_(2) + y[1:], NUMBERS.clone(), NUMBERS))
    assert found.op == "placeholder"


def test_buffers_that_change_are_found_and_given_back() -> None:
    norm = nn.BatchNorm1d(2)
    tensors = dict(norm.state_dict(keep_vars=True)) | {"constant": torch.tensor([float("nan"), 1])}
    tensors["bytes"] = torch.tensor([float("nan"), 1]).to(torch.float8_e4m3fn)
    buffers = WrittenBuffers(tensors, [])
    before = buffers.clones()
    norm(torch.randn(3, 2))
    buffers.find_changed(before)
    assert sorted(buffers.changed) == ["num_batches_tracked", "running_mean", "running_var"]
    buffers.restore(before)
    assert torch.equal(norm.get_buffer("running_mean"), torch.zeros(2))
    assert sorted(buffers.clones()) == sorted(buffers.changed)


def test_copies_share_nothing_but_what_is_lent() -> None:
    one, wide = torch.ones(3), torch.ones(1).expand(3)
    sparse = torch.eye(3).to_sparse()
    found = copies([one, None, wide, sparse, one], [True, False, False, False, False])
    assert found[0] is one
    assert found[1] is None
    assert all(
        new is not None and new.data_ptr() != old.data_ptr()
        for new, old in ((found[2], wide), (found[4], one))
    )
    assert found[3] is not None
    assert torch.equal(found[3].to_dense(), torch.eye(3))


def test_results_disagree_beyond_rounding_alone() -> None:
    bad = float("nan")
    want = {"total": torch.tensor(1.0), "grad:a": torch.tensor([1.0, bad]), "grad:b": None}
    near = {"total": torch.tensor(1.0001), "grad:a": torch.tensor([1.0, bad]), "grad:b": None}
    assert disagreement(near, want, [torch.float32]) is None
    assert disagreement(near, want, [torch.float64]) == "total"
    other = want | {"grad:a": torch.tensor([1.0, 2.0])}
    assert disagreement(other, want, [torch.float32]) == "grad:a"
    assert disagreement(want | {"grad:b": torch.ones(1)}, want, [torch.float32]) == "grad:b"
