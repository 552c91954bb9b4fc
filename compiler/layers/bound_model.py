"""A model as a program was bound to it: what has changed in it since, and whether the program can go on with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from operator import attrgetter, is_
from typing import Any, cast

from torch import Tensor, nn

from trainc.compiler.errors import SiteError
from trainc.compiler.layers.site_state import BoundLayer

_COMPILE_AGAIN = "Change the model before `trainc.compile`, or compile it again"
_form = attrgetter("dtype", "device")
_requires_grad = attrgetter("requires_grad")


class BoundModel:
    """The modules and parameters of a model, compared before every step with those that it has then.

    `parameters` are the program's own, by name; frozen ones that were replaced are taken over there. `trained` are
    those that an optimizer has. Nothing is compared of a sharded model: FSDP2 puts whole parameters in the places of
    shards and takes them out again.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        trained: Iterable[str],
        layers: Iterable[BoundLayer],
    ) -> None:
        self._model, self._parameters = model, parameters
        self._trained, self._layers = dict.fromkeys(trained), tuple(layers)
        self._tables: list[dict[str, Any]] | None = None
        self._values: list[object] = []
        self._around: dict[str, list[nn.Module]] = {}
        self._own: list[nn.Parameter] = []
        self._frozen: list[nn.Parameter] = []
        self._measured: list[nn.Parameter] = []
        self._forms: list[Any] = []

    def remember(self) -> None:
        """Take the model as it is now; raises SiteError where the program cannot go on with it."""
        self._compare()
        self._around = {name: self._modules_around(name) for name in self._trained}
        tables = [(module._modules, module._parameters) for module in self._model.modules()]
        self._tables = [cast("dict[str, Any]", table) for pair in tables for table in pair]
        self._values = self._now()
        self._own = [self._parameters[name] for name in self._trained]
        self._frozen = [p for n, p in self._parameters.items() if n not in self._trained]
        self._measured = [self._parameters[name] for name in self._measured_names()]
        self._forms = [*map(_form, self._own)]

    def changed(self) -> bool:
        """Return whether other modules or frozen parameters stand in the model now, and take them over.

        Raises SiteError, and changes nothing, for what this program cannot train: a parameter that was replaced, added
        or unfrozen, or has another dtype or device, and a layer that is measured or changed and was replaced.
        """
        if self._tables is None:
            return False
        now = self._now()
        if len(now) != len(self._values) or not all(map(is_, now, self._values)):
            self.remember()
            return True
        if any(map(_requires_grad, self._frozen)):
            self._compare()
        if not all(map(_requires_grad, self._measured)):
            self._refuse_frozen()
        if [*map(_form, self._own)] != self._forms:
            self._refuse_form()
        return False

    def _now(self) -> list[object]:
        assert self._tables is not None
        return [*chain.from_iterable(map(dict.values, self._tables))]

    def _compare(self) -> None:
        """Raise SiteError for what cannot be trained; take over frozen parameters that are new or were replaced."""
        now = dict(self._model.named_parameters(remove_duplicate=False))
        for name in self._trained:
            around = self._around.get(name)
            there = now.get(name) is self._parameters[name]
            if not (there and around in (None, self._modules_around(name))):
                raise replaced_parameter(name, self._parameters[name], now)
        own = {id(self._parameters[name]) for name in self._trained}
        for name, parameter in now.items():
            if parameter.requires_grad and id(parameter) not in own:
                raise untrained_parameter(name, self._parameters)
        present = {id(module) for module in self._model.modules()}
        for layer in self._layers:
            if id(layer) not in present:
                raise SiteError(
                    f"`{layer.trainc.name}` is no longer in the model, but a clause measures or changes it"
                    f" ({layer.trainc.description()}): the layer or a module around it was replaced since"
                    f" `trainc.compile`. {_COMPILE_AGAIN}"
                )
        found = dict(self._model.named_parameters())
        for name in [name for name in self._parameters if name not in found]:
            del self._parameters[name]
        self._parameters.update(found)

    def _modules_around(self, name: str) -> list[nn.Module]:
        """Return the modules that hold a parameter, from the model's own child down."""
        found, path = [self._model], name.split(".")[:-1]
        for part in path:
            found.append(found[-1].get_submodule(part))
        return found[1:]

    def _measured_names(self) -> list[str]:
        """Return the trained parameters whose gradients of examples are measured."""
        sites = [layer.trainc.measured for layer in self._layers]
        names = [name for site in sites if site is not None for name in site.parameters]
        return [name for name in names if name in self._trained]

    def _refuse_frozen(self) -> None:
        for name in self._measured_names():
            if not self._parameters[name].requires_grad:
                raise SiteError(
                    f"`{name}` was frozen since `trainc.compile`, but a clause measures the gradients that examples"
                    " give it: exclude its layer from `on` and compile again, or let it require a gradient"
                )

    def _refuse_form(self) -> None:
        for name, form in zip(self._trained, self._forms, strict=True):
            if (found := _form(self._parameters[name])) != form:
                was, now = (f"{dtype} on {device}" for dtype, device in (form, found))
                raise SiteError(
                    f"`{name}` is {now} and was {was} in the step before: the optimizer's state and what the program"
                    " measures are of the old tensor. Convert or move the model before the first step, or move it back"
                )


def replaced_parameter(name: str, parameter: Tensor, now: Mapping[str, Tensor]) -> SiteError:
    """Return the error for a trained parameter that has another place in the model, or none; `now` are its names."""
    here = now.get(name)
    elsewhere = None
    if here is not parameter:
        elsewhere = next((other for other, one in now.items() if one is parameter), None)
    twin = next((other for other, one in now.items() if one is here and other != name), None)
    if elsewhere is not None:
        what = f"the parameter is at `{elsewhere}` now, because a module was put around it"
    elif here is not parameter and twin is not None:
        what = f"it was replaced by `{twin}`, which it shares now"
    elif here is not None:
        what = "the parameter or a module around it was replaced"
    else:
        what = "the parameter, a module around it or its adapter was removed, merged or replaced"
    values = "" if here is None else " (`load_state_dict` without `assign=True` sets values alone)"
    return SiteError(
        f"`{name}` is no longer in the model as this program trains it: {what}. Its optimizer would train the old"
        f" tensor. {_COMPILE_AGAIN}{values}"
    )


def untrained_parameter(name: str, known: Mapping[str, Tensor]) -> SiteError:
    """Return the error for a parameter that requires a gradient although no optimizer trains it."""
    if name in known:
        return SiteError(
            f"`{name}` requires a gradient now, but was frozen at `trainc.compile`, so no optimizer trains it. Freeze"
            " it again (`requires_grad_(False)`), or compile the model again; to train it from a later step on, compile"
            " while it requires a gradient, freeze it then, and unfreeze it in the run"
        )
    return SiteError(
        f"`{name}` is a parameter of its own only since `trainc.compile`, so no optimizer trains it. {_COMPILE_AGAIN}"
    )
