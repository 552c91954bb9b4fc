"""Run modules or a step graph as compiled code: which passes do, what was compiled again and why, and what fails."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from trainc.compiler.errors import SiteError
from trainc.compiler.layers.site_state import BoundLayer, SiteState
from trainc.compiler.method.sites import Rewrite
from trainc.runtime.data.batch import Batch

LIMIT = 8
"""How much is compiled before what is new runs uncompiled: a compilation takes seconds to minutes."""
_SETTINGS = {
    # The blocks of a model share the functions of their class.
    "recompile_limit": 64 * LIMIT,
    "accumulated_recompile_limit": 1024 * LIMIT,
    # A hook that the user adds later is called.
    "skip_nnmodule_hook_guards": False,
}
"""Settings of torch's compiler for these modules."""
WHAT = "what runs"
"""Whether a state is of the modules, or of the step graph."""

Backend = Callable[[Any, Any], Any]
T = TypeVar("T")


class Compiler:
    """Compiles the modules or the step graphs of one program, whichever of the two runs, and keeps count.

    Every state of the program (the shapes of its batches, what its clauses do, modes) has code of its own, with sizes
    as numbers: what runs does not depend on what ran before, so that a resumed run goes on bit for bit. Numbers of the
    clock are tensors, and compile nothing again.
    """

    backend = "inductor"
    """What torch.compile is given; tests have others."""

    def __init__(self, layers: Iterable[BoundLayer]) -> None:
        states = (layer.trainc for layer in layers)
        self._checkpoints = [state for state in states if state.checkpoint is not None]
        """Modules that run again in the backward pass; the insides of each are compiled by themselves."""
        self._insides: dict[SiteState, Any] = {}
        self.refused: str | None = None
        """Why nothing is compiled any more."""
        self._known: dict[str, Mapping[str, object] | None] = {}
        """The states that ran compiled, also before a resume, which leaves no more of them than the key."""
        self._here: set[str] = set()
        self._repeated = self._count = 0
        self._notes: list[str] = []
        self._full = False
        self._theirs = False
        self._wrapped: dict[Any, Any] = {}

    def run(
        self,
        forward: Any,
        state: Mapping[str, object],
        keep: Callable[[], Callable[[], None]],
        run: Callable[[Any], T],
    ) -> T:
        """Return `run(model)`, where the model is what `forward` was compiled to, or else `forward` itself.

        `forward` is a model, or the function of a step graph; `state` says in words and values which code a pass needs.
        `keep()` is called before what may fail, and returns what undoes the pass.
        """
        from torch._dynamo.exc import TorchDynamoException

        if is_compiled(forward):
            return self._run_theirs(lambda: run(forward))
        key = hashlib.sha256(repr(state).encode()).hexdigest()[:16]
        if not self._takes(key):
            return run(forward)
        restore = None if key in self._here else keep()
        before, begun = self._count, time.perf_counter()
        try:
            with torch._dynamo.config.patch(_SETTINGS), self._compiling_checkpoints():
                found = run(self._compiled(forward))
        except TorchDynamoException as error:
            self.fail(error)
            if restore is None:
                raise self.failure() from error
            restore()
            return self._run_instead(lambda: run(forward))
        if self._count > before:
            self._tell(key, state, time.perf_counter() - begun)
        self._here.add(key)
        self._known[key] = state
        return found

    def _run_instead(self, run: Callable[[], T]) -> T:
        """Run uncompiled what could not be compiled; where that fails too, compiled code is not to blame."""
        try:
            return run()
        except BaseException:
            self.refused = None
            self._notes.clear()
            raise

    def _takes(self, key: str) -> bool:
        """Say whether a pass in this state runs compiled."""
        if self.refused is not None:
            return False
        if key in self._known or len(self._known) < LIMIT:
            return True
        if not self._full:
            self._full = True
            self._notes.append(
                f"passes were compiled for {LIMIT} shapes of batches (or modes of modules, trained parameters, clauses"
                " that act); further ones run uncompiled. Pad batches to fewer lengths to run them compiled"
            )
        return False

    def _run_theirs(self, run: Callable[[], T]) -> T:
        if not self._theirs:
            self._theirs = True
            self._notes.append(
                "your own code has compiled the model, and `compile = inductor` leaves it as it is"
            )
        return run()

    def _compiled(self, forward: Any) -> Any:
        if forward not in self._wrapped:
            whole = not isinstance(forward, nn.Module)  # the function of a graph has nothing else
            self._wrapped[forward] = torch.compile(
                forward, backend=self._backend(), dynamic=False, fullgraph=whole
            )
        return self._wrapped[forward]

    @contextmanager
    def _compiling_checkpoints(self) -> Iterator[None]:
        """Compile the insides of checkpoints that begin in this block; a second pass is of what the first one ran."""

        def inside(state: SiteState, call: Callable[..., Any]) -> Any:
            if state not in self._insides:
                self._insides[state] = torch.compile(call, backend=self._backend(), dynamic=False)
            return self._insides[state]

        for state in self._checkpoints:
            state.compile = partial(inside, state)
        try:
            yield
        finally:
            for state in self._checkpoints:
                state.compile = None

    def _backend(self) -> Backend:
        """Return the backend; with inductor the model draws the random numbers that it draws uncompiled."""
        compile_graph: Any = torch._dynamo.lookup_backend(self.backend)
        if self.backend == "inductor":
            compile_graph = partial(compile_graph, config_patches={"fallback_random": True})

        def counted(graph: Any, inputs: Any) -> Any:
            self._count += 1
            return compile_graph(graph, inputs)

        return counted

    def forget(self) -> None:
        """Drop the code: the model has other modules or tensors now."""
        self._wrapped.clear()
        self._insides.clear()
        self._here.clear()

    # what is told

    def _tell(self, key: str, state: Mapping[str, object], seconds: float) -> None:
        what = f"{self.backend} compiled {state[WHAT]}"
        if key in self._here:
            self._repeated += 1
            self._notes.append(
                f"{what} again, in {seconds:.0f} s, because values that the model's own Python reads have changed"
                f" ({self._repeated} of at most {LIMIT} times)"
            )
            if self._repeated == LIMIT:
                self.refused = (
                    "the model's own Python values, such as counters, change from step to step. Keep them in buffers,"
                    " or write `compile = off`"
                )
                self._notes.append(f"passes run uncompiled from now on: {self.refused}")
            return
        others = [other for other in self._known.values() if other is not None]
        if not others or key in self._known:
            self._notes.append(f"{what}, in {seconds:.0f} s")
            return
        changed = min(
            ([name for name in state if state[name] != other[name]] for other in others), key=len
        )
        number = len(self._known) + 1
        self._notes.append(
            f"{what} again, in {seconds:.0f} s, because {_words(changed)} changed ({number} of at most {LIMIT})"
        )

    def notes(self) -> tuple[str, ...]:
        """Return what to say since the last call."""
        found = tuple(self._notes)
        self._notes.clear()
        return found

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Say of an error in the compilation of a backward pass what it is; the step can then be run again."""
        from torch._dynamo.exc import TorchDynamoException

        try:
            yield
        except TorchDynamoException as error:
            self.fail(error)
            raise self.failure() from error

    def fail(self, error: Exception) -> None:
        """Compile nothing from now on, and say why once."""
        self.refused = reason_of(error)
        self._notes.append(
            f"{self.backend} cannot compile the passes, which run uncompiled: {self.refused}"
        )

    def failure(self) -> SiteError:
        """Return an error for what cannot be undone any more."""
        return SiteError(
            f"{self.backend} failed to compile a pass: {self.refused}. The next step runs uncompiled"
        )

    # what a checkpoint has

    def state_dict(self) -> dict[str, Any]:
        """Return which states of the program run compiled."""
        return {"known": [*self._known], "repeated": self._repeated, "refused": self.refused}

    def load_state_dict(self, state: Mapping[str, Any], *, accept: bool) -> None:
        """Go on as the run did; where changes are accepted, what failed is tried again."""
        self._known = dict.fromkeys(state["known"])
        self._repeated = int(state["repeated"])
        self.refused = None if accept else state["refused"]


def state_of(what: str, model: nn.Module, batch: Batch, rewrite: Rewrite) -> dict[str, object]:
    """Return in words and values all that decides which code a pass of the modules, or of the step graph, needs."""
    given, structure = tree_flatten(batch)
    devices = sorted({one.device.type for one in given if isinstance(one, Tensor)})
    acting = tuple(site.index for site in rewrite.hooks), rewrite.views, rewrite.share_dropout
    return {
        WHAT: what,
        "the shapes of batches": (str(structure), *map(_form, given)),
        "the dtype of autocast": [
            (one, torch.get_autocast_dtype(one))
            for one in devices
            if torch.is_autocast_enabled(one)
        ],
        "the modes of modules": tuple(module.training for module in model.modules()),
        "the parameters that train": tuple(p.requires_grad for p in model.parameters()),
        "the hooks on modules": tuple(
            len(module._forward_hooks)
            + len(module._forward_pre_hooks)
            + len(module._backward_hooks)
            for module in model.modules()
        ),
        "the clauses that act": (*acting, tuple(site.module for site in rewrite.measured)),
    }


def _form(given: object) -> object:
    """Return what code depends on of a part of a batch: the form of a tensor, the value of a number or a word."""
    if isinstance(given, Tensor):
        return tuple(given.shape), given.dtype, str(given.device)
    plain = given is None or isinstance(given, bool | int | float | str)
    return repr(given) if plain else type(given).__name__


def is_compiled(forward: Any) -> bool:
    """Say whether the user's own code has compiled a module: by `torch.compile(model)`, or `model.compile()`."""
    if getattr(forward, "_orig_mod", None) is not None:
        return True
    return isinstance(forward, nn.Module) and forward._compiled_call_impl is not None


def _words(names: list[str]) -> str:
    """Return names with commas and an `and`."""
    return " and ".join(([", ".join(names[:-1])] if names[1:] else []) + names[-1:])


_ADVICE = {
    "InvalidCxxCompiler": "Install a C++ compiler such as g++, or let the environment variable CXX name one",
    "CppCompileError": "Look at what the C++ compiler says",
    "TritonMissing": "Install triton",
}
"""What to do about some errors, by class."""


def reason_of(error: BaseException) -> str:
    """Return why something cannot be compiled, in a line, and what to write."""
    causes = [error]
    while (
        inner := causes[-1].__cause__ or getattr(causes[-1], "inner_exception", None)
    ) is not None:
        if inner in causes:
            break
        causes.append(inner)
    found = next((one for one in causes if type(one).__name__ in _ADVICE), causes[-1])
    advice = _ADVICE.get(type(found).__name__)
    lines = [line.strip() for line in str(found).splitlines() if line.strip()]
    lines = [line for line in lines if line.startswith("Explanation:")] or lines
    text = f"{type(found).__name__}: {lines[0]}" if lines else type(found).__name__
    return (
        f"{text}. {advice}, or write `compile = off`"
        if advice
        else f"{text}. Write `compile = off`"
    )
