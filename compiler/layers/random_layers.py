"""Dropout with one mask for all views of an example, and what draws for each view apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from trainc.compiler.errors import ExampleAxisUnknown
from trainc.compiler.layers.site_state import BoundLayer
from trainc.compiler.method.sites import drawn_apart
from trainc.compiler.model.eager import uncompiled


class BoundDropout(BoundLayer):
    """Dropout with a shared mask, so that the distance between the views measures the noise alone."""

    def reaches_operator(self) -> bool:
        """Say whether the views share a mask now: without dropout there is none, and one view needs no sharing."""
        shared = self.trainc.views > 1 and cast(nn.Dropout, self).p != 0.0
        return super().reaches_operator() and shared

    def run_operator(self, x: Tensor) -> Tensor:
        own, state = cast(nn.Dropout, self), self.trainc
        if x.shape[0] % (state.views * state.example_index.all_rows):
            raise ExampleAxisUnknown(
                f"`{state.name}` gets an input of shape {tuple(x.shape)}, but the batch has"
                f" {state.example_index.count} examples in {state.views} views, which share one dropout mask. Set its"
                " `p` to 0, or give it every example"
            )
        half = x.shape[0] // state.views
        mask = torch.dropout(torch.ones_like(x[:half]), own.p, True)
        return x * torch.cat([mask] * self.trainc.views)


class SharedDropout(TorchFunctionMode):
    """Lets the views of an example share the mask of a call of `F.dropout`, and notices what draws for each apart.

    A part of the model that is run again for its backward pass, under activation checkpointing, draws for each view
    apart: there this mode would no longer be active.
    """

    def __init__(self, rows: int, views: int, share: bool) -> None:
        super().__init__()
        self.rows, self.views, self.share, self.found = rows, views, share, set[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if _draws(func, args, given) and args and len(args[0]) % (self.rows * self.views) == 0:
            if func is F.dropout and self.share and not _runs_again():
                return self._shared(*args, **given)
            self.found.add(func.__name__)
        return func(*args, **given)

    def _shared(
        self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        mask = torch.dropout(torch.ones_like(x[: len(x) // self.views]), p, training)
        masks = torch.cat([mask] * self.views)
        return x.mul_(masks) if inplace else x * masks

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Notice calls inside this block; compiled parts run uncompiled there."""
        with uncompiled(), self:
            yield

    @property
    def notes(self) -> tuple[str, ...]:
        """Return a note for each of the functions that draw for each view apart."""
        return tuple(drawn_apart(f"`{name}`") for name in sorted(self.found))


def _runs_again() -> bool:
    """Say whether what runs now is run again in the backward pass."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None or not torch.is_grad_enabled()


def _draws(func: Any, args: Any, given: Any) -> bool:
    """Say whether a call is one of dropout that drops something."""
    if func is F.scaled_dot_product_attention:
        return bool(given.get("dropout_p", args[4] if len(args) > 4 else 0.0))
    if func not in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout):
        return False
    p = given.get("p", args[1] if len(args) > 1 else 0.5)
    training = given.get("training", args[2] if len(args) > 2 else func is not F.alpha_dropout)
    return bool(p) and bool(training)
