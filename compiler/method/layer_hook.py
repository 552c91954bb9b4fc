"""Another behaviour of one layer: what a construct gives to `Lowering.layer`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from trainc.compiler.errors import ExampleAxisUnknown, SiteError
from trainc.compiler.model.adapter_rule import with_first

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainc.compiler.method.example_units import ExampleUnits
    from trainc.compiler.method.sites import NormSite
    from trainc.compiler.model.adapters import Adapter
    from trainc.runtime.schedule.gate import Gate


@dataclass(slots=True)
class LayerContext:
    """What a hook may use beside the tensors of its layer, of that `name` in the user's model.

    `index` numbers the hooks that draw random numbers, to tell their draws apart; `views` is how many copies of each
    example are in the batch, view by view. `scalars` are the numbers of the clock by the names that `Lowering.layer`
    was given them, 0-d; `key` is the 0-d int64 of the step's random numbers, `first_example` the number of the batch's
    first example in the step. `captured` says that a graph is being captured: then a hook calls plain operators, which
    graph passes may fuse.
    """

    name: str
    index: int
    views: int
    scalars: Mapping[str, Tensor]
    key: Tensor
    first_example: Tensor | None
    captured: bool = False
    clause: str = ""
    rows: int | None = None
    """The rows of the batch with all views; None where a graph is captured, whose pass compares them."""
    shared: bool = False
    """Whether the views of an example share what is drawn at random, as their dropout masks."""
    inputs: Any = None
    """What the model is called with, one view of it; None where code of the user's own calls it."""
    weight: str = ""
    """The parameter that a `WeightHook` changes, by its name in the layer; `name` is then its name in the model."""
    layer: Any = None
    """The layer of that parameter."""

    def merged(self, weight: Tensor) -> Tensor:
        """Return the weight of a `WeightHook` with what adapters of its layer add to it."""
        for adapter in self._adapters():
            if adapter.changes_weight:
                weight = adapter.used_weight(self.layer, weight)
        return weight

    def unmerged(self, change: Tensor) -> Tensor:
        """Return the change of the weight of a `WeightHook` by which its layer with adapters has this change."""
        for adapter in self._adapters():
            factor = adapter.rule.output_factor(self.layer, adapter)
            if factor is not None:
                change = change / factor.where(factor != 0, 1)
        return change

    def _adapters(self) -> Iterator[Adapter]:
        from trainc.compiler.model.adapters import Adapter

        for child in self.layer.children() if self.weight == "weight" else ():
            if isinstance(child, Adapter):
                yield child

    def check_examples(self, y: Tensor, what: str) -> None:
        """Raise ExampleAxisUnknown unless every view of every example is a row of this tensor of the layer.

        `what` needs that.
        """
        if self.rows is not None and y.shape[0] != self.rows:
            views = f" in {self.views} views" if self.views > 1 else ""
            raise ExampleAxisUnknown(
                f"`{self.name}` gives an output of shape {tuple(y.shape)}, but the batch has"
                f" {self.rows // self.views} examples{views}. {what} needs the examples on the first axis: exclude the"
                " layer from `on`",
                self.clause,
            )

    def draw(self, draw: Drawing, like: Tensor, share: str = "token") -> Tensor:
        """Return random numbers for `like` (views * B, ..., C), a row for each of its rows.

        `draw` is a function of trainc.kernels.noise, such as `uniform`. Rows of views that share what is drawn are
        equal.
        """
        import torch

        views = 1 if self.shared else self.views
        rows = like.shape[0] // self.views * views
        found = draw(like[:rows], self.key, self.index, views, share, self.first_example)
        return torch.cat([found] * self.views) if views < self.views else found

    def error(self, message: str, field: str = "") -> SiteError:
        """Return an error at the clause of the hook, or at a field of it; the message should name the layer."""
        return SiteError(message, self.clause, field)


class Drawing(Protocol):
    """A function that draws random numbers for the rows of a tensor by key, site, views, share and first example."""

    def __call__(
        self,
        like: Tensor,
        key: Tensor,
        site: int,
        views: int,
        share: str = "token",
        first_example: Tensor | None = None,
    ) -> Tensor: ...


class LayerHook:
    """What changes in one layer: override `change_input`, `change_output`, `change_output_of` or `forward`.

    It runs where the layer stands, by the bound modules and while a graph is captured, in train mode only. What it does
    must be made of tensors: a value that it reads from one with `item()` keeps the step from running as a graph.
    """

    operator: ClassVar[str | None] = None
    """The operator of trainc that computes it, for the plan; None for plain PyTorch."""
    fused_by: ClassVar[str | None] = None
    """The graph pass that puts the operator in place of what is captured; None where it is captured as it is."""
    norm: NormSite | None = None
    """The norm that graph passes turn into one operator, where that is what the hook does."""
    draws: ClassVar[bool] = True
    """Whether it draws random numbers."""
    of_branch: ClassVar[str] = ""
    """What the hook does, if the layer must be a residual branch: the result is added to another tensor of its shape.

    The first step looks where the result goes, and is an error, which says this, where it is added to nothing.
    """
    of_views: ClassVar[bool] = False
    """Whether it acts only where every example passes several times, and the layer need not run."""
    zero_is_identity: ClassVar[bool] = False
    """Whether the layer is the user's own where every scalar is 0."""
    modules_only: ClassVar[str | None] = None
    """Why no graph runs it; None where one can."""

    def change_input(self, x: Tensor, at: LayerContext) -> Tensor:
        """Return what the layer gets in place of its first input."""
        return x

    def change_output(self, y: Tensor, at: LayerContext) -> Tensor:
        """Return what the layer gives in place of its result, or of the first tensor of a tuple."""
        return y

    def change_output_of(self, x: Any, y: Tensor, at: LayerContext) -> Tensor:
        """Do what `change_output` does, where the layer was given the first input `x`; None where it has none."""
        return self.change_output(y, at)

    def forward(
        self,
        layer: nn.Module,
        call: Callable[..., Any],
        at: LayerContext,
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Return what the layer gives; `call` is its forward pass without this hook."""
        x = None
        if args:
            x = self.change_input(args[0], at)
            args = (x, *args[1:])
        elif kwargs:
            first = next(iter(kwargs))
            x = self.change_input(kwargs[first], at)
            kwargs = kwargs | {first: x}
        return with_first(call(*args, **kwargs), lambda y: self.change_output_of(x, y, at))

    def done_by_measuring(self, layer_type: str, units: ExampleUnits | None) -> bool:
        """Say whether a layer of this type, measured in these units, does what this hook does without it."""
        return False

    def conflict(self, other: LayerHook) -> str:
        """Return what to write where another clause's hook replaces the forward pass of the layer, too."""
        return "leave the layer out of one of the two clauses"

    outermost: ClassVar[bool] = False
    """Whether it runs around the hooks of all clauses."""
    for_weight: ClassVar[bool] = False
    """Whether it changes a weight that the layer computes with."""

    @property
    def algorithm(self) -> str:
        """How `operator` computes it, for the plan; empty where there is one way alone."""
        return ""

    @property
    def replaces(self) -> bool:
        """Whether the layer's own forward pass may not run at all."""
        return type(self).forward is not LayerHook.forward

    @property
    def below_adapters(self) -> bool:
        """Whether it concerns the layer without what adapters add: its own forward pass, or its weight."""
        return self.replaces or self.for_weight


class KeepOutput(LayerHook):
    """Keeps what a layer gives in one forward pass, a tensor for each call."""

    draws = False
    zero_is_identity = outermost = True

    def __init__(self) -> None:
        self._outputs: list[Tensor] | None = None

    def change_output(self, y: Tensor, at: LayerContext) -> Tensor:
        """Keep a copy of the result, which what follows may change in place, as `nn.ReLU(inplace=True)` does."""
        if self._outputs is not None:
            self._outputs.append(y.clone())
        return y

    def key(self, module: str) -> str:
        """Return the name of what is kept of a module."""
        return module

    def begin(self) -> None:
        """Keep what is given from now on."""
        self._outputs = []

    def take(self) -> list[Tensor]:
        """Return what was kept, and keep nothing more: a checkpoint's second forward pass is not another call."""
        found, self._outputs = self._outputs or [], None
        return found


class KeepInput(KeepOutput):
    """Keeps a function of the first input of a layer, without gradient, a tensor for each call."""

    def __init__(self, of: Callable[[Tensor], Tensor], clause: str) -> None:
        super().__init__()
        self._of, self._clause = of, clause

    def change_input(self, x: Tensor, at: LayerContext) -> Tensor:
        """Keep a function of the input."""
        if self._outputs is not None:
            self._outputs.append(self._of(x.detach()))
        return x

    def change_output(self, y: Tensor, at: LayerContext) -> Tensor:
        """Keep nothing of the result."""
        return y

    def key(self, module: str) -> str:
        return f"input of {module} for {self._clause}"


@dataclass(frozen=True, slots=True)
class WeightSite:
    """A parameter that a hook changes: its name in the model and in the layer, and its random stream.

    Layers that share the parameter have one `index`.
    """

    name: str
    attribute: str
    index: int


@dataclass(frozen=True, slots=True)
class LayerHookSite:
    """A layer with a hook; `scalars` pairs the hook's name of each number with its name in the method.

    No two hooks of a program have one `index`; it is negative where the hook draws no random numbers.
    """

    module: str
    hook: LayerHook
    index: int
    label: str = ""
    scalars: tuple[tuple[str, str], ...] = ()
    gate: Gate | None = None
    weight: WeightSite | None = None
    """The parameter that the hook changes, where it is a `WeightHook`."""

    def context(
        self,
        views: int,
        scalars: Mapping[str, Tensor],
        **seen: Any,
    ) -> LayerContext:
        """Return what the hook sees of a micro-batch, whose numbers are given by their names in the method.

        `seen` are fields of the context.
        """
        own = {name: scalars[full] for name, full in self.scalars}
        first, key = scalars.get("first_example"), scalars["key"]
        name, index, attribute = self.module, self.index, ""
        if self.weight is not None:
            name, index, attribute = self.weight.name, self.weight.index, self.weight.attribute
        at = LayerContext(name, index, views, own, key, first, clause=self.label, **seen)
        at.weight = attribute
        return at
