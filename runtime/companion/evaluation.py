"""Weights that evaluation and saving use in place of the trained ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from trainc.runtime.companion.companion import Companion
from trainc.runtime.companion.module_copy import saved_tensors
from trainc.runtime.processes.sharded import reshard
from trainc.runtime.step.action import Action
from trainc.runtime.step.optimizer import OptimizerStep
from trainc.runtime.torch_optimizer.modes import Weights, has_modes, put, put_copies, weights_now


class EvaluationWeights:
    """Puts other weights into the model and takes them out again: a companion's values, or those of optimizers.

    Without any of them the trained weights are used. Parameters stay the same objects: their memory is exchanged, so
    that trained weights come back bit for bit, whatever rounding there is in an optimizer's `eval()` and `train()`.
    Between two evaluations such optimizers are in training mode, and so is the state that is saved of them.
    """

    def __init__(
        self, model: nn.Module, companions: Iterable[Companion], actions: Iterable[Action]
    ) -> None:
        self._model, self._source = model, next(iter(companions), None)
        steps = [action for action in actions if isinstance(action, OptimizerStep)]
        self._optimizers = tuple(step for step in steps if step.has_modes)
        self.estimate: Callable[[int, set[int]], None] | None = None
        """Estimates running statistics, of these tensors by `id`, from this many training batches, 0 for all."""
        self._trained: Weights | None = None
        self._thread = 0

    @property
    def name(self) -> str | None:
        """The clause whose weights evaluation uses now; None where it uses the trained weights."""
        if self._companion is not None:
            return self._companion.name
        return self._optimizers[0].name if self._optimizers else None

    @property
    def _companion(self) -> Companion | None:
        return self._source if self._source is not None and self._source.made else None

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside this block the model has the weights for evaluation; inside another such block nothing changes.

        Raises RuntimeError where another thread is inside one, as does `trained`.
        """
        self._check_thread()
        if self.name is None or self._trained is not None:
            yield
            return
        self._trained = weights_now([tensor for _, tensor in self._live()])
        self._thread = get_ident()
        try:
            self._replace(self._trained)
            self._estimate()
            yield
        finally:
            trained, self._trained = self._trained, None
            try:
                self._switch(weights_now([tensor for tensor, _ in trained]), training=True)
            finally:
                self._put_back(trained)

    def _replace(self, trained: Weights) -> None:
        """Put the weights for evaluation into the model."""
        if self._companion is not None:
            values = self._companion.values
            put([(t, values[name].to(t.device, t.dtype)) for name, t in self._live()])
            return
        self._switch(trained, training=False)

    def _estimate(self) -> None:
        """Estimate the running statistics of a companion's weights where it asks for that and has none.

        Raises RuntimeError where nobody said what from.
        """
        held = self._companion
        if held is None or held.estimates is None or held.estimated or not self._statistics():
            return
        if self.estimate is None:
            raise RuntimeError(
                f"`{held.name}` has running statistics that must be estimated from training batches before it is"
                " evaluated or saved: say where they are, as in `program.estimate_from(lambda: loader)`, or write"
                " `statistics = copy`"
            )
        self.estimate(held.estimates, {id(tensor) for _, tensor in self._live()})
        held.estimated = True
        with torch.no_grad():
            for name, tensor in self._live():
                if not isinstance(tensor, nn.Parameter):
                    held.values[name].copy_(tensor)

    def _statistics(self) -> bool:
        """Say whether a layer of the model has running statistics."""
        return any(getattr(m, "running_mean", None) is not None for m in self._model.modules())

    def _put_back(self, weights: Weights) -> None:
        try:
            put(weights)
        except BaseException:  # interrupted half-way, as by Ctrl-C
            put(weights)
            raise
        finally:
            reshard(self._model)

    @torch.no_grad()
    def _switch(self, weights: Weights, *, training: bool) -> None:
        """Let the optimizers change their mode on copies of these weights, which they overwrite."""
        if self._optimizers:
            put_copies(weights)
            reshard(self._model)
        for step in self._optimizers:
            optimizer = step.torch
            if has_modes(optimizer):
                optimizer.train() if training else optimizer.eval()

    @contextmanager
    def trained(self) -> Iterator[Callable[[Any], Any]]:
        """Inside this block the model has the trained weights, also inside `used`.

        What it gives copies a state that is kept beyond the block, where an optimizer would change it at its end.
        """
        self._check_thread()
        if self._trained is None:
            yield lambda state: state
            return
        now = weights_now([tensor for tensor, _ in self._trained])
        try:
            self._switch(now, training=True)
            put(self._trained)
            yield copy.deepcopy if self._optimizers else lambda state: state
        finally:
            self._switch(self._trained, training=False)
            self._put_back(now)

    def _check_thread(self) -> None:
        """Raise RuntimeError where another thread has put the weights for evaluation into the model."""
        if self._trained is not None and self._thread != get_ident():
            raise RuntimeError(
                "another thread is inside `program.evaluation_weights()` or an evaluation, and the one model has the"
                " weights of one of them at a time: evaluate in one thread, or a copy of the model that is made in the"
                " block"
            )

    def check_outside(self, what: str) -> None:
        """Raise RuntimeError inside `used`, where the model does not have the trained weights."""
        if self._trained is not None:
            raise RuntimeError(
                f"`{what}` was called inside `with program.evaluation_weights()`, where the model has the weights of"
                f" `{self.name or ''}`: call it after the block"
            )

    def state(self) -> dict[str, Tensor]:
        """Return the values that evaluation uses by every name of a state dict; empty where these are the trained."""
        if self.name is None:
            return {}
        if self._companion is not None:
            if self.estimate is not None and not self._companion.estimated:
                with self.used():
                    pass
            values = {id(tensor): self._companion.values[name] for name, tensor in self._live()}
        else:
            with self.used():
                values = {id(tensor): tensor.detach().clone() for _, tensor in self._live()}
        named = self._model.state_dict(keep_vars=True)
        return {name: values[id(t)] for name, t in named.items() if id(t) in values}

    def _live(self) -> list[tuple[str, Tensor]]:
        """Return the tensors of the model that have other values in evaluation."""
        if self._companion is not None:
            names = self._companion.values
            return [(n, t) for n, t in saved_tensors(self._model).items() if n in names]
        return [(slot.name, slot.tensor) for step in self._optimizers for slot in step.slots]
