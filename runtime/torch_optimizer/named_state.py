"""The state of a torch optimizer under parameter names: of each parameter, of its group, and what belongs to neither.

torch numbers parameters by their place, so that its state dict fits no other selection. Here everything that an
optimizer's `state_dict` holds goes by the name of a parameter: `weight/exp_avg` is an entry of its state, of any shape
and nesting, `weight/(group)` a record of its parameter group.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from trainc.runtime.torch_optimizer.attributes import ATTRIBUTES, Attributes
from trainc.runtime.torch_optimizer.nested import copied, decoded, encoded, leaves, same, unsavable
from trainc.runtime.torch_optimizer.problem import OptimizerProblem

GROUP, OTHERS, WHOLE = "(group)", "(others)", "(whole)"
"""The records beside the entries of parameters: of a group, of state that belongs to no parameter, and of an optimizer
whose state dict has another form than torch's, as it is."""

Options = dict[str, Any]


class NamedState:
    """A torch optimizer and the names of its parameters. Raises OptimizerProblem where it holds other parameters."""

    def __init__(
        self, label: str, optimizer: torch.optim.Optimizer, parameters: Mapping[str, Parameter]
    ) -> None:
        self.label, self.optimizer, self.parameters = label, optimizer, dict(parameters)
        known = {id(p): name for name, p in parameters.items()}
        self.groups = [[known.get(id(p)) for p in g["params"]] for g in optimizer.param_groups]
        """The names of the parameters of each group of the optimizer."""
        self.names = [name for group in self.groups for name in group if name is not None]
        if sorted(self.names) != sorted(parameters) or any(None in group for group in self.groups):
            raise OptimizerProblem(
                label,
                f"`{self.kind}` has other parameters in its groups than it was given: a program needs an optimizer that"
                " trains these parameters, each in one group",
                "path",
            )
        self.scheduled: list[Options] = [{} for _ in self.groups]
        """What schedules gave each group last, by the name of the option."""
        self.built_with_state = bool(optimizer.state)
        """Whether the optimizer had state of parameters before its first step, or its first load."""
        self.attributes = Attributes(optimizer)
        self._made = [copy.deepcopy(_options(group)) for group in optimizer.param_groups]

    @property
    def kind(self) -> str:
        """The class of the optimizer."""
        made = type(self.optimizer)
        return f"{made.__module__}:{made.__qualname__}"

    @property
    def size(self) -> int:
        """The entries of all parameters together."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    # save

    def state(self) -> dict[str, Any]:
        """Return the state as a checkpoint holds it: live tensors, nothing copied."""
        return {path: encoded(value) for path, value in self._state().items()}

    def _state(self) -> dict[str, Any]:
        found = self.optimizer.state_dict()
        if not self._is_usual(found):
            return {WHOLE: {"parameters": self.names, "state": dict(found)}}
        state: dict[str, Any] = {}
        others: dict[str, Any] = {k: v for k, v in found.items() if k not in _FORM}
        for key, entries in found["state"].items():
            if not self._is_place(key):
                others.setdefault("state", {})[key] = entries
                continue
            for entry, value in entries.items():
                if isinstance(entry, str) and entry:
                    state[f"{self.names[key]}/{entry}"] = value
                else:
                    state.setdefault(f"{self.names[key]}/", {})[entry] = value
        own = {n: v for n, v in self.attributes.changed().items() if n not in others}
        if own:
            others[ATTRIBUTES] = own
        for i, group in enumerate(self.groups):
            if changed := self._changed(i):
                record = {"options": changed, "rate": self.scheduled[i].get("lr")}
                state |= {f"{name}/{GROUP}": record for name in group}
        return {**state, OTHERS: others} if others else state

    def _changed(self, number: int) -> Options:
        """Return which options of a group the optimizer has changed since it was built: the others are the spec's."""
        before, now = dict(self._made[number]), _options(self.optimizer.param_groups[number])
        before |= self.scheduled[number]
        return {key: v for key, v in now.items() if key not in before or not same(v, before[key])}

    def _is_usual(self, found: Mapping[str, Any]) -> bool:
        """Say whether a state dict has torch's form."""
        if not found.keys() >= _FORM or not isinstance(found["state"], Mapping):
            return False
        own = [entries for key, entries in found["state"].items() if self._is_place(key)]
        return all(isinstance(entries, Mapping) for entries in own)

    def _is_place(self, key: object) -> bool:
        return type(key) is int and 0 <= key < len(self.names)

    def require_savable(self) -> None:
        """Raise OptimizerProblem, naming parameter and entry, where a checkpoint cannot hold the state."""
        for path, value in self._state().items():
            if (found := unsavable(value, path)) is not None:
                place, kind = found
                raise OptimizerProblem(
                    self.label,
                    f"`{place}` in the state of `{self.label}` ({self.kind}) is a {kind}, which a checkpoint cannot"
                    " hold: it holds tensors, numbers, strings, booleans, None, dtypes, and dicts, lists, tuples and"
                    " deques of these",
                    "path",
                )

    def checked(self) -> Iterator[tuple[str, Any, bool]]:
        """Yield every number and tensor of the state with its place, and whether it may be infinite.

        Tensors with axes that belong to a parameter have to be finite. What belongs to a group or to the optimizer may
        be infinite, as a bound that nothing has reached is, and so may single numbers.
        """
        for path, value in self._state().items():
            inside = value
            shared = path.endswith(f"/{GROUP}") or path in (OTHERS, WHOLE)
            if path.endswith(f"/{GROUP}"):
                inside = value["options"]
            for place, leaf in leaves(inside, path):
                single = not isinstance(leaf, Tensor) or leaf.dim() == 0
                yield place, leaf, shared or single

    def nbytes(self, name: str) -> int:
        """Return the bytes of what the optimizer has of a parameter now, without counters, which are 0-d."""
        found = (leaf for _, leaf in leaves(self.entries(name), name))
        return sum(leaf.nbytes for leaf in found if isinstance(leaf, Tensor) and leaf.dim())

    def entries(self, name: str) -> Options:
        """Return the state that the optimizer has of a parameter now."""
        found: Options = self.optimizer.state.get(self.parameters[name], {})
        return found

    # load

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` gave; raises ValueError for the state of other parameters."""
        if WHOLE in state:
            whole = decoded(state[WHOLE])
            if whole["parameters"] != self.names:
                raise ValueError(f"{self.label}: the checkpoint has state of other parameters")
            self.optimizer.load_state_dict(copied(whole["state"], torch.clone, {}))
            return
        entries, records = self.split(state)
        first = [records.get(group[0] or "", {}) if group else {} for group in self.groups]
        options = [{"lr": one["rate"]} | one["options"] if one else {} for one in first]
        self.put(entries, options, decoded(state.get(OTHERS, {})))
        rates = (record.get("rate") for record in first)
        self.scheduled = [{} if rate is None else {"lr": rate} for rate in rates]

    def split(self, state: Mapping[str, Any]) -> tuple[dict[str, Options], dict[str, Options]]:
        """Return the entries of each parameter and the record of its group, where a saved state has them.

        Raises ValueError for a parameter that is not optimized here.
        """
        entries: dict[str, Options] = {}
        records: dict[str, Options] = {}
        for path, value in state.items():
            if path == OTHERS:
                continue
            name, _, key = path.rpartition("/")
            while name not in self.parameters:  # keys may have slashes, as names may
                name, _, more = name.rpartition("/")
                if not name:
                    raise ValueError(
                        f"{self.label}: the checkpoint has optimizer state of `{path.rpartition('/')[0]}`, which this"
                        " clause does not optimize"
                    )
                key = f"{more}/{key}"
            own = decoded(value)
            if key == GROUP:
                records[name] = own
            else:
                entries.setdefault(name, {}).update({key: own} if key else own)
        return entries, records

    def put(
        self,
        entries: Mapping[str, Options],
        options: list[Options],
        others: Mapping[str, Any],
    ) -> None:
        """Give the optimizer copies of this state, bit for bit, and the options it was built with where none is given.

        torch's own `load_state_dict` would round state to the dtype of the parameter; a class that has one of its own
        is asked, and what it rounded is put back.
        """
        memo: dict[int, Any] = {}
        groups = []
        for made, changed, group in zip(
            self._made, options, self.optimizer.param_groups, strict=True
        ):
            moved = {}
            for key, value in changed.items():
                like = next(t for t in (made.get(key), *group["params"]) if isinstance(t, Tensor))
                moved[key] = copied(value, _mover(like), memo)
            groups.append({**copy.deepcopy(made), **moved, "params": group["params"]})
        exact: dict[Any, Any] = defaultdict(dict)
        flags = {name: g for names, g in zip(self.groups, groups, strict=True) for name in names}
        for name, own in entries.items():
            parameter = self.parameters[name]
            on_host = not (flags[name].get("fused") or flags[name].get("capturable"))
            exact[parameter] = {
                key: copied(value, _mover(parameter, counts=key == "step" and on_host), memo)
                for key, value in own.items()
            }
        rest = copied(dict(others), torch.clone, memo)
        exact |= rest.pop("state", {})
        attributes = rest.pop(ATTRIBUTES, {})
        if _loads_itself(self.optimizer):
            self.optimizer.load_state_dict(self._torch_form(exact, groups) | rest)
            for name in entries:
                parameter = self.parameters[name]
                loaded = self.optimizer.state.get(parameter, {})
                for key, value in exact[parameter].items():
                    if key in loaded and not same(loaded[key], value):
                        loaded[key] = _unrounded(loaded[key], value)
        else:
            self.optimizer.__setstate__({"state": exact, "param_groups": groups})
        self.attributes.restore(attributes)

    def _torch_form(self, exact: Mapping[Any, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a state dict as torch has it, parameters by their place."""
        place = {id(self.parameters[name]): i for i, name in enumerate(self.names)}
        return {
            "state": {place.get(id(key), key): value for key, value in exact.items()},
            "param_groups": [
                {**group, "params": [place[id(p)] for p in group["params"]]} for group in groups
            ],
        }


_FORM = {"state", "param_groups"}


def _options(group: Mapping[str, Any]) -> Options:
    return {key: value for key, value in group.items() if key != "params"}


def _mover(like: Tensor, *, counts: bool = False) -> Callable[[Tensor], Tensor]:
    """Return the function that copies tensors to the device of one; a counter of steps stays where it is."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.clone() if counts and not tensor.dim() else tensor.to(like.device, copy=True)

    return move


def _loads_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Say whether a class, or a hook on its instance, has a part in loading its state."""
    plain = type(optimizer).load_state_dict is torch.optim.Optimizer.load_state_dict
    hooks = ("_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks")
    return not plain or any(getattr(optimizer, name, None) for name in hooks)


def _unrounded(loaded: Any, exact: Any) -> Any:
    """Return the saved value where loading changed no more than its dtype; what the class made of it elsewhere."""
    if isinstance(loaded, Tensor) and isinstance(exact, Tensor):
        rounded = loaded.dtype != exact.dtype and loaded.shape == exact.shape
        return exact if rounded else loaded
    if isinstance(loaded, dict) and isinstance(exact, dict):
        return {k: _unrounded(v, exact[k]) if k in exact else v for k, v in loaded.items()}
    if isinstance(exact, str):
        return exact
    if (
        type(loaded) in (list, tuple)
        and isinstance(exact, type(loaded))
        and len(loaded) == len(exact)
    ):
        return type(loaded)(map(_unrounded, loaded, exact))
    return loaded
