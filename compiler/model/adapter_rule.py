"""What the construct of an adapter says: how its adapters start, compute, are folded away, written and read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

FILE = "adapters.safetensors"


@dataclass(frozen=True, slots=True)
class Adapted:
    """The adapters of one clause, or of several that share files: by the name of their layer."""

    model: nn.Module
    adapters: Mapping[str, nn.Module]
    layers: Mapping[str, nn.Module]
    trained: tuple[str, ...]
    """The parameters that train besides those of adapters, by name."""


class AdapterRule:
    """A construct that adds adapters derives from this class, too. An adapter is a child of its layer.

    Only this class says what an adapter computes: the compiler runs `change_output` after the layer.
    """

    def initialize(self, name: str, tensor: Tensor, generator: Generator) -> None:
        """Fill a parameter or buffer of an adapter in place, on the CPU; `name` is its name inside the adapter."""
        raise NotImplementedError(f"{type(self).__name__} does not say how `{name}` starts")

    def run_adapter(self, adapter: Any, *inputs: Tensor) -> Tensor:
        """Return what an adapter computes of its layer's inputs: by itself, what is added to the layer's output."""
        raise NotImplementedError(f"{type(self).__name__} does not say what an adapter computes")

    def run_beside(self, adapter: Any, layer: Any, output: Any, *inputs: Tensor) -> Tensor:
        """Return what an adapter computes that needs its layer, or the layer's own output, besides the inputs."""
        return self.run_adapter(adapter, *inputs)

    def change_inputs(
        self, layer: nn.Module, adapter: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what the layer is given in place of its inputs, by position and by name; without this method, these.

        Raises SiteError for inputs with which the adapter cannot run.
        """
        return args, named

    def change_output(
        self, layer: nn.Module, adapter: nn.Module, inputs: tuple[Any, ...], output: Any
    ) -> Any:
        """Return the output of the adapted layer: without this method its own and the adapter's, added up.

        `inputs` are those that the layer was given, the named ones last, in the order of the call. Of a tuple or list
        the first tensor is changed.
        """
        return with_first(
            output, lambda y: (y + adapter(*inputs, layer=layer, output=y)).to(y.dtype)
        )

    def failure(self, adapter: Any, error: Exception) -> Exception | None:
        """Return what to raise in place of an error in a layer whose inputs `change_inputs` changed; None: as it is."""
        return None

    adds_channels: ClassVar[bool] = False
    """Whether what it computes is added to the output of any module, with the channels on the last axis.

    Then an adapted module, selected by another clause, stands for that sum's second part, as an adapted linear layer.
    """

    changes_weight: ClassVar[bool] = False
    """Whether the layer computes with its weight plus `weight_change`."""

    def weight_change(self, layer: nn.Module, adapter: nn.Module) -> Tensor:
        """Return what the adapter adds to the layer's weight, in its shape."""
        raise NotImplementedError(f"{type(self).__name__} does not change the weight of a layer")

    def output_factor(self, layer: Any, adapter: Any) -> Tensor | None:
        """Return what the layer's own output is multiplied by, in a shape that broadcasts with its weight; None: 1."""
        return None

    def merge(self, layer: nn.Module, adapter: nn.Module) -> None:
        """Change the layer's parameters in place, so that it computes without the adapter what it did with it.

        Raises ValueError for a layer or an adapter of which this is impossible; nothing is changed then.
        """
        raise ValueError(
            f"`{getattr(self, 'title', type(self).__name__)}` has no way to merge its adapters: keep them, with"
            " `program.save` or `program.save_adapters`"
        )

    def shares_files(self, other: AdapterRule) -> bool:
        """Say whether `write` puts the adapters of another clause into the same files as those of this one."""
        return False

    def write(self, adapted: Adapted, folder: Path) -> None:
        """Write the adapters, and what else trains, to a folder that exists."""
        from safetensors.torch import save_file

        save_file({n: t.detach().contiguous() for n, t in _state(adapted).items()}, folder / FILE)

    def read(self, adapted: Adapted, folder: Path) -> None:
        """Load what `write` wrote; raises ValueError where it does not fit, and changes nothing then."""
        from safetensors.torch import load_file

        from trainc.runtime.storage.foreign_files import interpreting

        with interpreting(folder / FILE):
            found = load_file(str(folder / FILE))
        here = _state(adapted)
        load_tensors(here, found, str(folder))


def with_first(result: Any, change: Callable[[Any], Any]) -> Any:
    """Return a layer's result with its tensor changed, or the first one of a tuple or list."""
    if not isinstance(result, (tuple, list)):
        return change(result)
    first, *others = result
    named: Any = type(result)
    changed = (change(first), *others)
    return named(*changed) if hasattr(named, "_fields") else named(changed)


def _state(adapted: Adapted) -> dict[str, Tensor]:
    """Return the tensors of adapters and of what else trains, by their names in the model."""
    state = adapted.model.state_dict(keep_vars=True)
    owners = tuple(
        f"{name}.{key}"
        for name, layer in adapted.layers.items()
        for key, child in layer.named_children()
        if child is adapted.adapters[name]
    )
    return {n: t for n, t in state.items() if n in adapted.trained or n.startswith(owners)}


def load_tensors(here: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into those of the same names; raises ValueError, before any is changed, where they do not fit."""
    import torch

    first: dict[int, str] = {}
    for name, tensor in here.items():
        if name in found:
            first.setdefault(id(tensor), name)
    for name in sorted(here.keys() | found.keys()):
        if name not in here:
            raise ValueError(f"{source} has `{name}`, which this program does not have")
        if (same := first.get(id(here[name]))) is None:
            raise ValueError(f"{source} has no `{name}`, which this program trains")
        if name not in found:
            continue  # it is there by another name
        if here[name].shape != found[name].shape:
            raise ValueError(
                f"`{name}` is {list(found[name].shape)} in {source}, but {list(here[name].shape)} in this program"
            )
        if same != name and not torch.equal(found[same], found[name]):
            raise ValueError(
                f"`{name}` and `{same}` differ in {source}, but are one parameter in this program: load it into a model"
                " in which they are not tied"
            )
    with torch.no_grad():
        for name in here.keys() & found.keys():
            here[name].copy_(found[name])
