"""Adapters beside a module: what they compute of its input is added to its output."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from trainc.compiler.constructs.adapt._widths import first_tensor, width_problems, widths_of
from trainc.compiler.errors import SiteError
from trainc.compiler.model.adapter_rule import AdapterRule, with_first
from trainc.dsl.reading.construct import Construct, Problem, Selector

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.adapting import Adapting


class Beside(Construct, AdapterRule):
    """Base of adapters beside a module: `make_parts` makes one, `added` says what it computes."""

    adds_channels: ClassVar = True

    width: int | None = Field(
        default=None,
        ge=1,
        description="channels of the module's input and output; those of its first layer unless given",
    )
    train: Selector | None = Field(
        default=None,
        description="parameters that train as well, such as those of a new head, norms or biases",
    )

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report modules that do not say how wide they are."""
        return width_problems(bound, self.width)

    def adapt(self, to: Adapting) -> None:
        """Add the adapters, and freeze the rest."""
        for entry in to.modules():
            inputs, outputs = widths_of(entry, to.base, self.width) or (0, 0)
            to.add(entry.name, partial(self.make_parts, inputs, outputs))
        to.train_only([] if self.train is None else to.select(self.train, "parameters"))

    def make_parts(self, inputs: int, outputs: int) -> dict[str, Any]:
        """Return the modules and parameters of one adapter, by name."""
        raise NotImplementedError

    def added(self, adapter: Any, x: Tensor) -> Tensor:
        """Return what an adapter computes of its module's first input (..., C)."""
        raise NotImplementedError

    def channels(self, adapter: Any) -> int:
        """Return how many channels an adapter takes."""
        raise NotImplementedError

    def combined(self, adapter: Any, y: Tensor, dy: Tensor) -> Tensor:
        """Return the output of the adapted module, of its own and what the adapter computed."""
        return y + dy

    def run_adapter(self, adapter: Any, *inputs: Tensor) -> Tensor:
        """Return what the adapter computes; raises SiteError for an input of another width."""
        x, width = first_tensor(inputs), self.channels(adapter)
        if x is None or x.dim() < 2 or x.shape[-1] != width:
            found = "no tensor of floating-point numbers" if x is None else f"{tuple(x.shape)}"
            raise SiteError(
                f"the first input of `{adapter.layer_name}` is {found}, but its adapter takes {width} channels on the"
                " last axis: select another module, or write `width`",
                adapter.label,
            )
        return self.added(adapter, x)

    def change_output(
        self, layer: nn.Module, adapter: Any, inputs: tuple[Any, ...], output: Any
    ) -> Any:
        """Add what the adapter computes to the output, or to the first tensor of a tuple."""

        def change(y: Tensor) -> Tensor:
            dy = adapter(*inputs)
            if y.shape != dy.shape:
                raise SiteError(
                    f"`{adapter.layer_name}` gives {tuple(y.shape)}, but its adapter computes {tuple(dy.shape)} of its"
                    " first input: select modules that keep the shape of what they are given, or linear layers",
                    adapter.label,
                )
            return self.combined(adapter, y, dy).to(y.dtype)

        return with_first(output, change)
