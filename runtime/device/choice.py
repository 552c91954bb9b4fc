"""Choose the device that a run trains on among those that torch finds on this machine."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch

PREFERRED = ("cuda", "mps", "cpu")
"""The order in which `auto` looks for a device."""
_WORDS = {"cuda": "CUDA", "mps": "MPS", "cpu": "CPU"}


class NoDevice(ValueError):
    """The device that is asked for is not on this machine."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A device, and what it is and why it was chosen."""

    device: torch.device
    about: str


def available() -> dict[str, str]:
    """Return the devices of this machine that a run can train on: the type of each, and its name."""
    found = {}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        found["mps"] = platform.processor() or "Apple"
    return {**found, "cpu": platform.machine()}


def choose(wanted: str) -> Choice:
    """Return the device for `auto`, `cuda`, `mps` or `cpu`; raises NoDevice, which says what there is."""
    found = available()
    if wanted == "auto":
        first = next(one for one in PREFERRED if one in found)
        absent = [_WORDS[one] for one in PREFERRED[: PREFERRED.index(first)]]
        why = f"auto: no {' and no '.join(absent)} here" if absent else "auto"
        return Choice(torch.device(first), why if first == "cpu" else f"{found[first]}, {why}")
    if wanted not in PREFERRED:
        raise NoDevice(
            f"`device = {wanted}`: a run trains on {', '.join(PREFERRED)}, or `auto` for the first that there is"
        )
    if wanted not in found:
        there = ", ".join(f"`{one}` ({name})" for one, name in found.items())
        raise NoDevice(
            f"`device = {wanted}`: torch {torch.__version__} finds no {_WORDS[wanted]} device here. There is {there}"
        )
    return Choice(torch.device(wanted), "" if wanted == "cpu" else found[wanted])
