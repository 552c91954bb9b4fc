"""The bytes that torch allocates, counted by its own allocator: everything inside of operators as well."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Allocated:
    """What a call added to the memory that torch holds: at its end, and at its highest."""

    kept: int
    peak: int


def allocated(call: Callable[[], object]) -> Allocated:
    """Return what a call allocates on the CPU, freed memory taken off; what nobody holds any more is freed before."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found:
        call()
    results = found.profiler.kineto_results
    events = [one for one in results.events() if one.name() == "[memory]"]
    now = peak = 0
    for one in sorted(events, key=lambda event: event.start_ns()):
        now += one.nbytes()
        peak = max(peak, now)
    return Allocated(now, peak)


def check_of_tensors() -> Allocated:
    """Return what is known to be allocated: one tensor of 4 MiB that stays, and one of 8 MiB that goes."""
    kept: list[torch.Tensor] = []

    def call() -> None:
        kept.append(torch.zeros(2**20))
        torch.zeros(2**21).add_(1)

    return allocated(call)
