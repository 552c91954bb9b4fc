"""The form of an optimizer's state: entries of parameters, and records of groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainc.runtime.storage.form import Form, Number, StateProblem, reading, shown
from trainc.runtime.torch_optimizer.entry_form import EntryForms, Make, alike, of_torch
from trainc.runtime.torch_optimizer.named_state import OTHERS, WHOLE, NamedState, Options
from trainc.runtime.torch_optimizer.nested import decoded, leaves, same


@dataclass(frozen=True)
class OptimizerForm(Form):
    """The state of a torch optimizer under parameter names.

    Of a class of torch.optim each entry has the shape and dtype that the class gives it, and options are in the range
    that the class allows; of any other, numbers are finite, and its own loading says the rest.
    """

    named: NamedState
    make: Make
    of_any_length: Set[str] = frozenset()
    """The parameters whose vectors may have any length: scores or weights say how many of their entries train."""

    def fits(self, value: Any, partial: bool) -> bool:
        return isinstance(value, Mapping) and all(type(key) is str for key in value)

    def __str__(self) -> str:
        return f"the state of a `{self.named.kind}`"

    def check(self, value: Any, path: str, partial: bool = False) -> None:
        super().check(value, path, partial)
        if WHOLE in value:
            whole = decoded(value[WHOLE])
            if not isinstance(whole, dict) or not {"parameters", "state"} <= whole.keys():
                raise StateProblem(
                    f"{path}/{WHOLE}", "`parameters` and `state`", shown(value[WHOLE])
                )
            return
        for key, inner in value.items():
            with reading(f"{path}/{key}", "what an optimizer keeps"):
                for place, leaf in leaves(decoded(inner), f"{path}/{key}"):
                    _check_leaf(place, leaf)
        try:
            entries, records = self._split(value, path)
        except ValueError:
            if partial:  # of parameters that are others now, which the load itself says
                return
            raise
        for name, record in records.items():
            self._check_record(record, f"{path}/{name}/(group)")
        if not partial:
            self._check_groups(records, path)
        if OTHERS in value and not isinstance(value[OTHERS], Mapping):
            raise StateProblem(f"{path}/{OTHERS}", "a dict", shown(value[OTHERS]))
        for name, own in entries.items():
            self._check_entries(name, own, f"{path}/{name}", partial)

    def _split(
        self, value: Mapping[str, Any], path: str
    ) -> tuple[dict[str, Options], dict[str, Options]]:
        with reading(path, "entries of parameters"):
            return self.named.split(value)

    def _check_record(self, record: Any, path: str) -> None:
        """Compare what a group has changed with the options that it was built with."""
        if not isinstance(record, dict) or record.keys() != {"options", "rate"}:
            raise StateProblem(path, "`options` and `rate`", shown(record))
        options, rate = record["options"], record["rate"]
        if rate is not None:
            Number().check(rate, f"{path}/rate")
        if not isinstance(options, dict):
            raise StateProblem(f"{path}/options", "a dict", shown(options))
        kind = type(self.named.optimizer)
        if not of_torch(kind):
            return
        built = self.named.optimizer.defaults
        for key, option in options.items():
            if key in built and not alike(option, built[key]):
                raise StateProblem(
                    f"{path}/options/{key}", f"a value such as {built[key]!r}", shown(option)
                )
        known = {key: options.get(key, value) for key, value in built.items()}
        with reading(f"{path}/options", f"options of `{self.named.kind}`"):
            self._build(kind, known)

    @staticmethod
    def _build(kind: Any, options: Mapping[str, Any]) -> None:
        """Let the class check options."""
        from inspect import signature

        taken = signature(kind).parameters
        kind(
            [torch.nn.Parameter(torch.zeros(2, 2))],
            **{k: v for k, v in options.items() if k in taken and k not in ("foreach", "fused")},
        )

    def _check_groups(self, records: Mapping[str, Options], path: str) -> None:
        """Raise StateProblem where the parameters of a group have different records."""
        for group in self.named.groups:
            known = [name for name in group if name in records]
            if known and len(known) < len(group):
                missing = next(name for name in group if name not in records)
                raise StateProblem(
                    f"{path}/{missing}/(group)", "what others of its group have", "missing"
                )
            for name in known[1:]:
                if not same(records[str(name)], records[str(known[0])]):
                    raise StateProblem(
                        f"{path}/{name}/(group)",
                        f"that of `{known[0]}`, in the same group",
                        "another",
                    )

    def _check_entries(self, name: str, own: Options, path: str, partial: bool) -> None:
        """Compare the entries of a parameter with those that a step of a small one leaves."""
        if (forms := self.entries.of(name)) is None:
            return
        if partial:  # what does not fit is left out by the load: another vector of masked entries, other options
            own = {key: value for key, value in own.items() if key in forms}
        elif odd := sorted(map(str, own.keys() ^ forms.keys())):
            found = "missing" if odd[0] in forms else "there"
            raise StateProblem(
                f"{path}/{odd[0]}", f"the entries {', '.join(map(str, forms))}", found
            )
        for key, value in own.items():
            free = partial or name in self.of_any_length
            form = forms[key].of_any_length() if free else forms[key]
            form.check(value, f"{path}/{key}")

    @property
    def entries(self) -> EntryForms:
        """The forms of what the class keeps of each parameter."""
        return EntryForms(self.named, self.make)


def _check_leaf(place: str, leaf: Any) -> None:
    """Raise StateProblem for a number that is NaN, or a tensor with axes that is not finite."""
    if isinstance(leaf, float) and math.isnan(leaf):
        raise StateProblem(place, "a number", shown(leaf))
    if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
        given: Any = leaf
        own = given.to_local() if hasattr(leaf, "device_mesh") else leaf
        own = own._values() if own.is_sparse else own
        bad = own.isnan() if own.dim() == 0 else ~own.isfinite()
        if bool(bad.any()):
            raise StateProblem(
                place, "finite entries", f"{shown(leaf)} with an infinite entry or NaN"
            )
