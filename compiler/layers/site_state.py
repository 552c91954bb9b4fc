"""What a bound layer carries, and what the classes of all bound layers share."""

from __future__ import annotations

import copy
import copyreg
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trainc.compiler.errors import ExampleAxisUnknown, SiteError, repeated_layers
from trainc.compiler.method.example_units import ExampleIndex
from trainc.compiler.method.layer_hook import LayerContext, LayerHook, LayerHookSite
from trainc.compiler.method.sites import MeasuredSite


class SiteState:
    """The state of a site: what it measures or changes, and the tensors of the micro-batch while it is active.

    `name` is the layer's name in the user's model.
    """

    def __init__(self, name: str, views: int) -> None:
        self.name, self.views = name, views
        self.measured: MeasuredSite | None = None
        self.hooks: list[LayerHookSite] = []
        self.open: tuple[tuple[LayerHook, LayerContext], ...] = ()
        """The hooks that run now, with what they see of the micro-batch."""
        self.partner: SiteState | None = None
        """The layer that shares this one's weight."""
        self.example_index = ExampleIndex(0)
        self.active = False
        self.in_pass = False
        """Whether the forward pass of a step is under way, in which a reentrant checkpoint has no gradients."""
        self.ran = False
        """Whether a measured layer ran in the forward pass that is under way."""
        self.shares_mask = False
        """Whether the layer is a dropout with one mask for all views."""
        self.also_in_eval = False
        """Whether the operator runs in evaluation mode too."""
        self.checkpoint: Callable[..., Any] | None = None
        """What runs the module as an activation checkpoint, once more in the backward pass; None where it is none."""
        self.compile: Callable[[Callable[..., Any]], Any] | None = None
        """What compiles the inside of a checkpoint; None where it runs as it is."""
        self.changing: set[str] | None = None
        """The buffers with several axes that a checkpoint's first pass changes; None before the first."""
        self.is_copy = False
        """Whether the layer is a copy of a program's layer, as copying a model makes it: no program knows it."""
        self.shared_ids = False
        """Whether an embedding looks up ids that all examples share, such as positions."""
        self.probe: Tensor | None = None
        self.lookup: tuple[Tensor, Tensor] | None = None
        """The auxiliary rows and the ids of an embedding's forward pass, for the head that shares its weight."""

    @property
    def surrounds_adapters(self) -> bool:
        """Whether a hook that runs now has the layer's adapters inside of it."""
        return any(not hook.below_adapters for hook, _ in self.open)

    def __deepcopy__(self, memo: dict[int, Any]) -> SiteState:
        """Copy all but what a forward pass left here for the next layer, which is part of that pass's graph."""
        twin = memo[id(self)] = SiteState.__new__(SiteState)
        vars(twin).update(copy.deepcopy({**vars(self), "lookup": None}, memo), is_copy=True)
        return twin

    def description(self) -> str:
        """Return what happens to the layer, in words."""
        measured = ["measured"] if self.measured is not None else []
        shared = ["one mask for all views"] if self.shares_mask else []
        shared += ["one mask for all views" for hook in self.hooks if hook.hook.of_views]
        own = (hook.label for hook in self.hooks if not hook.hook.of_views)
        changed = [f"changed by {label}" if label else "observed" for label in own]
        again = ["activations computed again"] if self.checkpoint else []
        return ", ".join(dict.fromkeys([*measured, *changed, *shared, *again]))

    @property
    def delivers(self) -> bool:
        """Whether this site must run in every step: it measures, has a hook, or is a checkpoint."""
        hooks = any(not site.hook.of_views for site in self.hooks)
        return self.measured is not None or hooks or self.checkpoint is not None

    def run_once(self) -> None:
        """Raise SiteError where a measured layer runs again in one forward pass; a checkpoint's repetition is none."""
        if self.measured is None or not self.in_pass:
            return
        if self.ran:
            raise repeated_layers([self.measured.module])
        self.ran = True

    def partner_lookup(self) -> tuple[Tensor, Tensor]:
        """Return the `lookup` of the embedding that shares the weight; raises SiteError when that has not run."""
        if self.partner is None or self.partner.lookup is None:
            raise SiteError(
                f"`{self.name}` shares its weight with an embedding that has not run before it in this forward pass."
                " Exclude one of the two from `on`"
            )
        return self.partner.lookup

    def of_micro_batch(self, other: SiteState) -> None:
        """Take over what another state of the layer has of a micro-batch."""
        self.active, self.open, self.views = other.active, other.open, other.views
        self.example_index, self.probe, self.lookup = other.example_index, other.probe, other.lookup

    def deactivate(self) -> None:
        """Let the layer run the user's own forward pass."""
        self.active = False
        self.open = ()
        self.probe = self.lookup = None


class BoundLayer:
    """Base of the classes that `replace_layers` makes; `unbound` is the user's own class."""

    unbound: type[nn.Module]
    trainc: SiteState

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the user's own layer: no file needs the program, and what it holds of a step is left out."""
        reduced: Any = super().__reduce_ex__(protocol)
        make, args, *rest = reduced
        if rest and isinstance(rest[0], dict):
            rest[0] = {name: value for name, value in rest[0].items() if name != "trainc"}
        # pickle makes an object of its own class alone by `copyreg.__newobj__`; by `__new__` it makes any.
        make = self.unbound.__new__ if make is copyreg.__newobj__ else make  # type: ignore[attr-defined]
        return make, tuple(self.unbound if one is type(self) else one for one in args), *rest

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copy the layer as it is bound: the copy of a model keeps its sites, until it is compiled itself."""
        own = getattr(super(), "__deepcopy__", None)
        if own is not None:
            return own(memo)
        twin = memo[id(self)] = type(self).__new__(type(self))
        _fill(twin, copy.deepcopy(self.__getstate__(), memo))
        vars(twin).setdefault("trainc", copy.deepcopy(self.trainc, memo))
        return twin

    def __copy__(self) -> Any:
        own = getattr(super(), "__copy__", None)
        twin = type(self).__new__(type(self)) if own is None else own()
        if own is None:
            _fill(twin, copy.copy(self.__getstate__()))
        vars(twin).setdefault("trainc", self.trainc)
        return twin

    def __dir__(self) -> list[str]:
        """Return what the user's own layer has."""
        return [name for name in super().__dir__() if name not in _OWN_NAMES]

    def extra_repr(self) -> str:
        """Return what the user's own layer says, and what trainc does with it."""
        own, ours = super().extra_repr(), self.trainc.description()  # type: ignore[misc]
        return ", ".join(part for part in (own, ours and f"trainc: {ours}") if part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the operator while the site is active, else the user's own layer."""
        if self.reaches_operator():
            self.trainc.run_once()
            return self.run_operator(*args, **kwargs)
        return self._run_unbound(*args, **kwargs)

    def run_operator(self, *args: Any, **kwargs: Any) -> Any:
        """Return the layer's result by the operator of a subclass; without one, the user's own."""
        return self._run_unbound(*args, **kwargs)

    def _run_unbound(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def reaches_operator(self) -> bool:
        """Say whether the step runs the layer: without gradients in its forward pass alone, where it runs twice."""
        state, training = self.trainc, self.training  # type: ignore[attr-defined]
        of_step = state.in_pass or torch.is_grad_enabled()
        return state.active and of_step and (training or state.also_in_eval)


_OWN_NAMES = {name for name in vars(BoundLayer) if name.strip("_") == name} - {
    "forward",
    "extra_repr",
}
_OWN_NAMES |= {"_run_unbound", "trainc", "unbound"}


def _fill(layer: Any, values: Any) -> None:
    """Give a new layer the attributes of another one, as copying does."""
    if hasattr(layer, "__setstate__"):
        layer.__setstate__(values)
    else:
        vars(layer).update(values)


def join_views(state: SiteState, x: Tensor) -> Tensor:
    """Return x (views * B, ...) as (B, views, ...): an example's views together contribute to the gradient.

    So do the rows of a group: (groups * n, ...) becomes (groups, n, ...).
    """
    if state.example_index.rows > 1:
        require_one_view(state)
        grouped: Tensor = x.unflatten(0, (-1, state.example_index.rows))
        return grouped
    return x if state.views == 1 else x.unflatten(0, (state.views, -1)).transpose(0, 1)


def separate_views(state: SiteState, y: Tensor) -> Tensor:
    """Undo `join_views` on a layer's result."""
    if state.example_index.rows > 1:
        return y.flatten(0, 1)
    return y if state.views == 1 else y.transpose(0, 1).flatten(0, 1)


def checked_probe(state: SiteState, x: Tensor) -> Tensor:
    """Return the site's probe; raises ExampleAxisUnknown unless the first axis of `x` is the example axis."""
    probe = state.probe
    assert state.measured is not None
    assert probe is not None
    if x.shape[0] != probe.shape[0]:
        raise ExampleAxisUnknown(
            f"`{state.measured.module}` gets an input of shape {tuple(x.shape)}, but the batch has"
            f" {probe.shape[0]} examples. Per-example norms need the examples on the first axis: exclude the layer"
            " from `on`"
        )
    return probe


def require_one_view(state: SiteState) -> None:
    """Raise SiteError for a layer that cannot join an example's two views."""
    if state.views > 1:
        raise SiteError(
            f"`{state.name}` cannot be measured while a regularizer passes every example twice: this kind of layer"
            " cannot join the two views. Exclude the layer from `on`"
        )
