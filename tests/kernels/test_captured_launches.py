"""A CUDA graph can keep what operators launch on CUDA: nothing in it waits for the device, forward or backward."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The operators' CUDA path, on CPU tensors and by a driver that launches nothing, where the host may read nothing.
RUN = """
import torch
from benchmarks.offline import recorder
from tests.stand_in_recorder import HostReads

path = recorder.Recorder(90)  # before any operator is imported
from benchmarks.offline import cases
recorder._Counted = lambda launches: HostReads()
cases._stand_in(90)
for name, build, sizes, dtype in cases.CASES:
    if name.startswith("sparse_adamw_"):
        continue  # it reads numbers of the host, which all are here
    found = "nothing is read"
    try:
        problem = build(sizes[0], dtype, "cpu")
        with path.listen() as launched:
            ends = cases._ends(problem)
            if leaves := problem.leaves():
                torch.autograd.grad(ends, leaves, [torch.empty_like(one) for one in ends], allow_unused=True)
        found = found if launched.triton else "nothing was launched"
    except RuntimeError as error:
        found = str(error)
    print(f"{name} {dtype}: {found}")
"""


@pytest.mark.offline
def test_no_operator_reads_on_the_host_what_it_computes() -> None:
    command = [sys.executable, "-W", "ignore", "-c", RUN]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) > 12
    assert [line for line in lines if not line.endswith(": nothing is read")] == []
