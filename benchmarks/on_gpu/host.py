"""Rows on what a call costs the host, at sizes that cost the device nothing."""

import torch

from benchmarks.device import Cuda
from benchmarks.measure import Json
from benchmarks.on_gpu.record import Row
from benchmarks.on_gpu.timed import Build
from benchmarks.operators import Forward, Problem, Size, outputs

SECONDS = 5.0


def host(name: str, build: Build, size: Size) -> Row:
    """Return the row of an operator."""
    return Row("host", name, SECONDS, lambda device, until: measure(device, build, size))


def measure(device: Cuda, build: Build, size: Size) -> Json:
    """Microseconds of ours and of ATen's composition, run eagerly."""
    calls = 50 if device.large else 2
    problem = build(size, torch.bfloat16, device.kind)
    found: Json = {"passed": True}
    for version, forward in (("ours", problem.ours), ("aten", problem.aten)):
        found[version] = _phases(device, problem, forward, calls)
    return found


def _phases(device: Cuda, problem: Problem, forward: Forward, calls: int) -> Json:
    found: Json = {"forward": device.host(lambda: outputs(forward, problem.arguments), calls)}
    leaves = problem.leaves()
    if not leaves:
        return found
    ends = [one for one in outputs(forward, problem.arguments) if one.requires_grad]
    slopes = [torch.randn_like(one) for one in ends]
    found["backward"] = device.host(
        lambda: torch.autograd.grad(ends, leaves, slopes, retain_graph=True, allow_unused=True),
        calls,
    )
    return found
