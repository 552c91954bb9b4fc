"""A companion: another module beside the model that trains, with values, mode and checkpointed state of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Container, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import count, takewhile
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainc.runtime.companion.module_copy import (
    Place,
    copy_module,
    held_at,
    saved_places,
    saved_tensors,
)
from trainc.runtime.data.batch import (
    Pick,
    call_model,
    compute_logits,
    find_logits,
    map_tensors,
    no_logits,
)
from trainc.runtime.processes.sharded import is_sharded
from trainc.runtime.step.action import Action, ActionState, Phase
from trainc.runtime.step.record import Step
from trainc.runtime.storage.form import Form, Record, Values
from trainc.runtime.storage.random_streams import kept_streams

Since = Literal["start", "from", "call"]
"""When a copy of the model is made: before the first step, before the first in which the clause acts, or by `copy`."""
Run = Callable[[Any], Tensor]
Through = Callable[[Run, Any], Tensor]
"""Gives logits in place of a module's own: of what runs the module on other inputs, and the inputs of the batch."""


class Companion(Action):
    """A module beside the user's model: a copy of it, or another one. No optimizer, selector or replica knows it.

    A copy holds values of the tensors that `names` gives: parameters and saved buffers of the model, or of these names
    in `weights`. The others are the model's own. Where `wide`, values of 16-bit tensors are in float32. The module is
    in eval mode, on the model's device, and its parameters require no grad.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        names: Callable[[], Collection[str]],
        module: nn.Module | None = None,
        since: Since = "start",
        *,
        wide: bool = False,
        weights: Mapping[str, Tensor] | None = None,
        through: Through | None = None,
        capture: Iterable[str] = (),
    ) -> None:
        self.name, self.model, self.names = name, model, names
        self.weights, self.through, self.captured = weights, through, tuple(capture)
        self.since, self.wide = since, wide
        self.phase = Phase.OBSERVE if since == "call" else Phase.PERTURB
        self.values: dict[str, Tensor] = {}
        """What it holds, by name; empty until the copy is made."""
        self.parameters: frozenset[str] = frozenset()
        """Which of these are parameters."""
        self.made = module is not None
        self.output: Callable[[], Pick] = lambda: None  # of its logits, unless a reader names it
        self.estimates: int | None = None
        """From how many batches evaluation estimates running statistics, 0 for all; None where they stay."""
        self.estimated = False
        """Whether this was done since the values changed."""
        self._module = module
        self._own = module
        self._versions: dict[str, int] = {}
        self._places: dict[str, Place] = {}
        if module is not None:
            module.requires_grad_(False).eval()
            self.values = saved_tensors(module)

    def run(self, step: Step) -> None:
        """Make the copy unless it is made, and its module before a pass that runs without the user's hooks."""
        if self.since != "call":
            self._make()
            _ = self.module

    def _make(self) -> None:
        if not self.made and self.since != "call":
            self.copy()

    @property
    def is_copy(self) -> bool:
        """Whether it is a copy of the model, not a module of its own."""
        return self._own is None

    # what it offers

    @property
    def module(self) -> nn.Module:
        """The module, in eval mode; raises RuntimeError before the copy is made."""
        if not self.made:
            raise RuntimeError(
                f"`{self.name}` has no values yet: its copy of the model is made in a step"
            )
        self._follow_device()
        if self._module is None:
            self._module = self._build()
        self._round(self._module)
        return self._module

    def read(
        self, inputs: Any, output: Pick = None, labels: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return the logits by its name, and what each call of its captured modules gave, by `output_name`.

        Of a module that gives a tuple it is the first tensor.
        """
        self._make()
        found: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for name in self.captured:
                keep = partial(self._keep, found, name)
                module = self.module.get_submodule(name)
                hooks.callback(module.register_forward_hook(keep).remove)
            found[self.name] = self.logits(inputs, output, labels)
        return found

    def of(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return those of named tensors that it gave."""
        own = self.name, f"{self.name}/"
        return {n: t for n, t in named.items() if n == own[0] or n.startswith(own[1])}

    def calls(self, named: Mapping[str, Tensor], module: str) -> list[Tensor]:
        """Return what each call of one of its captured modules gave, of named tensors."""
        names = (self.output_name(module, call) for call in count())
        return [named[name] for name in takewhile(named.__contains__, names)]

    def output_name(self, module: str, call: int) -> str:
        """Return the name of what a call of one of its captured modules gave."""
        return f"{self.name}/{module}/{call}"

    def _keep(
        self, found: dict[str, Tensor], name: str, module: nn.Module, inputs: Any, output: Any
    ) -> None:
        call = len(self.calls(found, name))
        first = output[0] if isinstance(output, tuple | list) else output
        found[self.output_name(name, call)] = first.detach().clone()

    @torch.no_grad()
    def logits(
        self, inputs: Any, output: Pick = None, labels: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return the module's logits in eval mode, without gradient; no global random number is drawn.

        They are the part `output` of what it returns, or that of its own `output`. It is given `labels` by name where
        it takes them: a decoder may make inputs of them. With `through` they are what that gives, without labels.
        Unless its copy is made by `copy`, one that is not made yet is made now.
        """
        self._make()
        module, output = self.module, self.output() if output is None else output
        devices = {t.device for t in module.parameters() if t.device.type == "cuda"}
        with torch.random.fork_rng(sorted(device.index or 0 for device in devices)), kept_streams():
            copies = map_tensors(torch.clone, inputs)
            if self.through is not None:
                return self.through(lambda given: self._run(module, given, output), copies).detach()
            return self._run(module, copies, output, labels).detach()

    def _run(
        self,
        module: nn.Module,
        inputs: Any,
        output: Pick,
        labels: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        if labels and labels.keys() <= inspect.signature(module.forward).parameters.keys():
            found = find_logits(call_model(module, inputs, labels), output)
            if found is None:
                raise no_logits(self.name)
            return found
        return compute_logits(module, inputs, output)

    @torch.no_grad()
    def copy(self) -> None:
        """Take the model's present values; raises ValueError where parameters are sharded over processes."""
        if self._own is not None:
            raise ValueError(f"`{self.name}` is a module of its own, not a copy of the model")
        own, given = self.sources(), self.weights
        self.values = {
            name: self._like(tensor) if given is None else given[name].to(tensor)
            for name, tensor in own.items()
        }
        places = saved_places(self.model)
        self._places = {name: places[name] for name in self.values}
        now = held_at(self._places).items()
        self.parameters = frozenset(name for name, t in now if isinstance(t, nn.Parameter))
        self.made, self._module = True, None

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return each value, on the model's device, with the tensor that the model has now, by name."""
        self._follow_device()
        now = held_at(self._places)
        return {name: (self.values[name], tensor.detach()) for name, tensor in now.items()}

    @torch.no_grad()
    def follow(self, decay: float, copied: Container[str] = ()) -> None:
        """Move the values towards the model's of now, `decay * value + (1 - decay) * now`; counters and `copied` copy.

        The sums are taken in the values' own precision.
        """
        averages: dict[tuple[Any, Any], tuple[list[Tensor], list[Tensor]]] = {}
        for name, (value, now) in self.pairs().items():
            if (
                decay == 0
                or name in copied
                or not (value.is_floating_point() or value.is_complex())
            ):
                value.copy_(now)
                continue
            group = averages.setdefault((value.device, value.dtype), ([], []))
            group[0].append(value)
            group[1].append(now.to(value.dtype))
        for ours, theirs in averages.values():
            torch._foreach_lerp_(ours, theirs, 1 - decay)

    def sources(self) -> dict[str, Tensor]:
        """Return the model's own tensors of which this holds values, by name, detached."""
        names = self.names()
        found = {n: t.detach() for n, t in saved_tensors(self.model).items() if n in names}
        if shard := next((name for name, tensor in found.items() if is_sharded(tensor)), None):
            raise ValueError(
                f"`{shard}` is sharded over processes (FSDP2), and `{self.name}` needs whole tensors: use"
                " DistributedDataParallel, or remove the clause"
            )
        return found

    # inside

    def _like(self, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor, in float32 at least where this is `wide`."""
        value = tensor.detach().clone()
        if self.wide and value.is_floating_point():
            value = value.to(torch.promote_types(value.dtype, torch.float32))
        return value

    def _build(self) -> nn.Module:
        """Return the copied module, whose tensors are the values or, of wide ones, rounded copies."""
        self._versions = {}
        replaced: dict[int, Tensor] = {}
        for name, tensor in saved_tensors(self.model).items():
            if name in self.values:
                value = self.values[name].to(tensor.dtype)
                is_parameter = isinstance(tensor, nn.Parameter)
                replaced[id(tensor)] = nn.Parameter(value, False) if is_parameter else value
        return copy_module(self.model, replaced).eval()

    def _follow_device(self) -> None:
        """Move the values to the model's device, if it has moved."""
        device = next((p.device for p in self.model.parameters()), None)
        if device is None or all(value.device == device for value in self.values.values()):
            return
        if self._own is not None:
            self.values = saved_tensors(self._own.to(device))
        else:
            self.values = {name: value.to(device) for name, value in self.values.items()}
            self._module = None

    def _round(self, module: nn.Module) -> None:
        """Round wide values that have changed to what the module holds."""
        if not self.wide:
            return
        own = saved_tensors(module)
        for name, value in self.values.items():
            if own[name].dtype != value.dtype and self._versions.get(name) != value._version:
                own[name].data.copy_(value)
                self._versions[name] = value._version

    # state

    def memory(self) -> int:
        """Return the bytes of its values."""
        values: Iterable[Tensor] = self.values.values()
        if not self.made:
            values = self.sources().values()
        return sum(value.numel() * self._size(value) for value in values)

    def _size(self, value: Tensor) -> int:
        least = 4 if self.wide and value.is_floating_point() else 0
        return max(least, value.element_size())

    def state_dict(self) -> ActionState:
        return dict(self.values)

    def state_form(self) -> Form:
        """Return the form of its values."""
        if self._own is not None:
            return Record({name: Values.like(value) for name, value in self.values.items()})
        wide = {
            name: self._like(tensor.flatten()[:0]).dtype for name, tensor in self.sources().items()
        }
        return Record(
            {name: Values.like(t, dtype=wide[name]) for name, t in self.sources().items()}
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the values; without a state the copy is made anew when it is time."""
        self._load(state)

    @torch.no_grad()
    def load_compatible(self, state: Mapping[str, Any]) -> str | None:
        """Load the values that are there; the others are those of the model now."""
        if not state:
            self._load(state)
            return None
        known = self._targets()
        missing = sorted(known.keys() - state.keys())
        self._load({name: state.get(name, value) for name, value in known.items()})
        if not missing:
            return None
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return f"{self.name}: `{missing[0]}`{more} start as in the model now"

    def _targets(self) -> dict[str, Tensor]:
        return self.values if self._own is not None else self.sources()

    @torch.no_grad()
    def _load(self, state: Mapping[str, Any]) -> None:
        if not state:
            if self._own is None:
                self.values, self.made, self._module = {}, False, None
            return
        known = self._targets()
        if odd := sorted(known.keys() ^ state.keys()):
            raise ValueError(
                f"{self.name}: the checkpoint has another selection of tensors; they differ in {', '.join(odd)}"
            )
        for name, tensor in known.items():
            if state[name].shape != tensor.shape:
                raise ValueError(
                    f"{self.name}: `{name}` has shape {list(tensor.shape)}, but the checkpoint has"
                    f" {list(state[name].shape)}"
                )
        if self._own is None:
            self.copy()
        for name, value in self.values.items():
            value.copy_(state[name])
