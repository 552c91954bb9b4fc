"""Replay the passes of step graphs as CUDA graphs: which are recorded, when they are replayed, and what is refused."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from trainc.compiler.errors import listed
from trainc.compiler.graph.step_graph import StepGraph
from trainc.compiler.graph.trial import disagreement
from trainc.compiler.model.undisturbed import own_generators, random_states
from trainc.compiler.patterns.replayable import host_copies, host_draws, host_reads, written
from trainc.compiler.replay.recorded_pass import (
    RecordedPass,
    copies,
    form_of,
    launch_settings,
    tensors_of,
)
from trainc.compiler.replay.recorder import CudaRecorder, Recorder
from trainc.runtime.memory.failure import first_line, ran_out_of_memory

LIMIT = 8
"""How many kinds of passes are recorded: each recording keeps the memory that its pass needs."""
OWN_LOOP = "your own loop runs the backward pass. Call `program.step(batch)`"
"""Why `program.loss` is not replayed."""
Forward = Callable[..., Sequence[Tensor | None]]


class Replays:
    """Records the passes of one program's step graphs, and replays them with the next batches.

    The first pass of a kind (a graph, and the forms of what it is given) runs as usual. The second one runs, is
    recorded, and replayed once to be compared; the next ones are replayed. Numbers are copied to where the recording
    reads them, and results from where it writes them, since the next replay writes there again.
    """

    recorder: type[Recorder] = CudaRecorder
    """What records; tests have others."""

    def __init__(self, model: nn.Module, *, wanted: bool) -> None:
        self._model, self.wanted = model, wanted
        self.refused: str | None = None
        """Why nothing is recorded any more."""
        self._recorder: Recorder | None = None
        self._passes: dict[Hashable, RecordedPass] = {}
        self._fits: dict[StepGraph, bool] = {}
        self._moves = 0
        self._notes: list[str] = []
        self._told: dict[str, None] = {}

    def here(self, device: torch.device) -> bool:
        """Say whether passes on this device are to be replayed."""
        return self.wanted and device.type == self.recorder.kind

    def around(
        self,
        graph: StepGraph,
        forward: Forward,
        dtypes: Callable[[], Collection[torch.dtype]],
        lent: Callable[[], Collection[str]],
    ) -> Forward | None:
        """Return what runs a graph's function, or replays it; None where no pass of this graph is recorded.

        `forward` is the function, or what it was compiled to; `dtypes` gives those of the computation. The outputs that
        `lent` names are read before the next pass, and are not copied.
        """
        if self.refused is not None or not self.here(self._device):
            return None
        if graph not in self._fits:
            reason = self._against(graph)
            self._fits[graph] = reason is None
            if reason is not None:
                self._say(f"no CUDA graph replays these passes: {reason}")
        if not self._fits[graph]:
            return None
        return partial(self._run, graph, forward, dtypes, lent)

    def forget(self) -> None:
        """Drop all recordings: the model has other modules or tensors now."""
        self._passes.clear()
        self._fits.clear()

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    # what is told

    @property
    def recorded(self) -> int:
        """How many kinds of passes are recorded now."""
        return sum(one.recording is not None for one in self._passes.values())

    @property
    def reasons(self) -> tuple[str, ...]:
        """Everything that was said against replaying some pass."""
        return tuple(self._told)

    def explain(self, modules: str = "") -> None:
        """Say once why a pass was not replayed: `modules` is why these ran it, "" where a graph did."""
        if not self.wanted:
            return
        if not self.here(self._device):
            self._say(
                f"`graphs = true` has no effect: the model is on {self._device.type}, and only CUDA has CUDA graphs"
            )
        elif modules:
            self._say(f"no CUDA graph replays a pass that the modules run: {modules}")

    def notes(self) -> tuple[str, ...]:
        """Return what to say since the last call."""
        found = tuple(self._notes)
        self._notes.clear()
        return found

    def _say(self, text: str) -> None:
        if text not in self._told:
            self._told[text] = None
            self._notes.append(text)

    def _refuse(self, reason: str) -> None:
        """Record and replay nothing from now on, and say why once."""
        self.refused = reason
        self.forget()
        self._recorder = None
        self._say(f"no CUDA graph replays passes from now on: {reason}. Write `graphs = false`")

    # what stands against it

    def _against(self, graph: StepGraph) -> str | None:
        """Return why no pass of a graph can be recorded; None where it can."""
        if own_generators(self._model):
            return "the model has random generators of its own, and a CUDA graph draws from that of the device alone"
        for name, tensor in tensors_of(graph).items():
            # A constant that is one number is read when its kernel is launched, and stays what it is.
            is_number = name in graph.constants and not tensor.dim()
            if not is_number and (reason := self._unreadable(name, tensor)) is not None:
                return reason
        if found := host_reads(graph.graph):
            return f"the host reads what {listed(found)} computes, in the middle of the pass"
        if found := host_draws(graph.graph, self._device.type):
            return f"{listed(found)} draws random numbers on the host"
        if found := host_copies(graph.graph, self._device.type):
            return (
                f"{listed(found)} copies between the host's memory and the device's in the middle of the pass. Make"
                " such tensors on the device, or keep them in buffers"
            )
        inputs = [node.name for node in written(graph.graph) if node.op == "placeholder"]
        return f"the pass writes to its input `{inputs[0]}`" if inputs else None

    def _unreadable(self, name: str, tensor: Tensor) -> str | None:
        """Return why a recording cannot read a tensor where it is."""
        if tensor.layout != torch.strided:
            return f"`{name}` is a tensor of the layout {tensor.layout}"
        if tensor.device != self._device:
            return f"`{name}` is on {tensor.device}, and the model on {self._device}"
        return None

    def _takes(self, graph: StepGraph, given: Sequence[Tensor]) -> bool:
        """Say whether another kind of pass is recorded; where none is, a note says why."""
        if len(self._passes) >= LIMIT:
            self._say(
                f"CUDA graphs were recorded for {LIMIT} kinds of passes (shapes of batches, modes of modules, trained"
                " parameters, clauses that act); further ones run without. Pad batches to fewer lengths to have them"
                " replayed"
            )
            return False
        assert graph.interface is not None
        names = [port.name for port in graph.interface.ports]
        names += [name for name, _ in graph.interface.scalars]
        reasons = (self._unreadable(n, t) for n, t in zip(names, given, strict=True))
        if (reason := next(filter(None, reasons), None)) is not None:
            self._say(f"no CUDA graph replays these passes: {reason}")
        return reason is None

    # running

    def _run(
        self,
        graph: StepGraph,
        forward: Forward,
        dtypes: Callable[[], Collection[torch.dtype]],
        lent: Callable[[], Collection[str]],
        *given: Tensor,
    ) -> Sequence[Tensor | None]:
        key = graph, forward, tuple(map(form_of, given)), launch_settings()
        found = self._passes.get(key)
        try:
            if found is None:
                if self._takes(graph, given):
                    self._passes[key] = RecordedPass(graph, given)
                return forward(*given)
            if not found.stands(given):
                self._begin_again(found, given)
                return forward(*given)
            if found.recording is None:
                return self._record(found, forward, dtypes(), given)
            return found.replay(given, lent())
        except Exception as error:
            # Where nothing is recorded yet, recordings are not to blame: smaller micro-batches may have them.
            if self.recorded and ran_out_of_memory(error):
                self._refuse("memory ran out, of which each recording keeps what its pass needs")
            raise

    def _begin_again(self, found: RecordedPass, given: Sequence[Tensor]) -> None:
        """Take a pass whose tensors are elsewhere now for the first one of its kind."""
        recorded = found.recording is not None
        if found.begin(given):
            return
        self._moves += 1
        if self._moves >= LIMIT:
            self._refuse("parameters or buffers of the model move in memory again and again")
        elif recorded:
            self._notes.append(
                "a CUDA graph is recorded again, because parameters or buffers of the model moved in memory"
                f" ({self._moves} of at most {LIMIT} times)"
            )

    def _record(
        self,
        found: RecordedPass,
        forward: Forward,
        dtypes: Collection[torch.dtype],
        given: Sequence[Tensor],
    ) -> Sequence[Tensor | None]:
        """Run a pass as usual and return its results; record it where a replay gives the same, and changes no more."""
        inputs = found.place(given)
        before = found.buffers.clones(), random_states(self._model)
        results = forward(*inputs)
        want, begun = found.named(results), time.perf_counter()
        if not torch.isfinite(_loss(want)):  # nothing could be compared
            return copies(results)
        found.buffers.find_changed(before[0])
        after = found.buffers.clones(), random_states(self._model)
        drawn = _drawn(self._device)

        def restore(state: tuple[Mapping[str, Tensor], Callable[[], None]]) -> None:
            found.buffers.restore(state[0])
            state[1]()

        gap: str | None = None
        try:
            restore(before)
            recording = self._recorder_of(self._device).record(partial(forward, *inputs))
            restore(before)
            recording.replay()
            got = found.named(recording.outputs) | found.buffers.changed
            gap = disagreement(got, want | after[0], dtypes)
            if gap is None and not torch.equal(_drawn(self._device), drawn):
                gap = "the state of random numbers"
        except Exception as error:  # whatever stands in the way of a recording, the pass has run
            why = "no memory is left for it" if ran_out_of_memory(error) else first_line(error)
            self._refuse(f"a pass cannot be recorded: {why}")
        except BaseException:  # an interrupted capture may have cost other recordings the generator that they draw from
            self.forget()
            self._recorder = None
            raise
        finally:
            restore(after)
        if gap is not None:
            self._refuse(f"a replay gives something else than the pass, {gap}")
        if self.refused is None:
            found.recording = recording
            self._tell(time.perf_counter() - begun)
        return copies(results)

    def _recorder_of(self, device: torch.device) -> Recorder:
        if self._recorder is None or self._recorder.device != device:
            self._recorder = self.recorder(device)
        return self._recorder

    def _tell(self, seconds: float) -> None:
        self._notes.append(
            f"a CUDA graph of a pass was recorded, in {seconds:.1f} s; it replays the next ones ({self.recorded} of at"
            f" most {LIMIT})"
        )


def _drawn(device: torch.device) -> Tensor:
    """Return the state of the random numbers that passes on a device draw."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _loss(results: Mapping[str, Tensor | None]) -> Tensor:
    loss = results["total"]
    assert loss is not None
    return loss
