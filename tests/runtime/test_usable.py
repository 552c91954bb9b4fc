"""What memory there is for a process: of the machine, its containers, and its own limit."""

import resource
from pathlib import Path

import pytest
import torch

from trainc.runtime.memory import usable
from trainc.runtime.memory.usable import Usable, peak_memory, usable_memory, used_memory

CPU, KIB, MIB = torch.device("cpu"), 2**10, 2**20
MEMINFO = "MemTotal: 4000 kB\nMemAvailable:    3000 kB\nSwapFree:  100 kB\nHugePages_Total: 0\n"
FREE = 3100 * KIB


@pytest.fixture
def _no_other_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usable, "_status", lambda: {"VmRSS": MIB, "VmSize": 3 * MIB})
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)


def machine(root: Path, files: dict[str, object]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(str(text))
    return root


def found(root: Path) -> tuple[int, str]:
    one = usable_memory(CPU, root)
    assert one is not None
    return one.bytes, one.limit.split()[-1].strip("()`") if "ulimit" not in one.limit else "ulimit"


@pytest.mark.usefixtures("_no_other_limits")
def test_it_is_what_is_free_and_what_the_process_has_already(tmp_path: Path) -> None:
    assert usable_memory(CPU, machine(tmp_path, {"proc/meminfo": MEMINFO})) == Usable(
        FREE + MIB, "free memory of the machine"
    )


@pytest.mark.usefixtures("_no_other_limits")
@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        # Version 2: the group of the process, one around it, and none.
        ("0::/a/b\n", {"a/b/memory.max": 2 * MIB, "a/b/memory.current": MIB}, 2 * MIB),
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": MIB}, 2 * MIB),
        ("0::/\n", {"memory.max": 3 * MIB, "memory.current": 2 * MIB}, 2 * MIB),
        ("0::/a\n", {"a/memory.max": "max"}, FREE + MIB),
        # Seen from inside of a container, its group may lie outside of what it sees.
        ("0::/../other\n", {"memory.max": MIB, "memory.current": 0}, 2 * MIB),
        # Pages of files that rest are given up when memory is needed.
        (
            "0::/a\n",
            {"a/memory.max": 2 * MIB, "a/memory.current": 2 * MIB, "a/memory.stat": f"anon 5\ninactive_file {MIB}"},
            2 * MIB,
        ),
        # Version 1 writes a huge number for no limit.
        ("4:cpu:/x\n5:memory:/a\n", {"memory/a/memory.limit_in_bytes": MIB}, 2 * MIB),
        ("5:memory:/a\n", {"memory/a/memory.limit_in_bytes": 9223372036854771712}, FREE + MIB),
    ],
)  # fmt: skip
def test_a_container_limits_it(
    tmp_path: Path, cgroup: str, files: dict[str, object], expected: int
) -> None:
    groups = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    root = machine(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": cgroup, **groups})
    assert found(root) == (expected, "machine" if expected > FREE else "group")


@pytest.mark.usefixtures("_no_other_limits")
def test_a_limit_of_the_process_counts_its_unused_addresses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4 * MIB, 4 * MIB))
    assert found(machine(tmp_path, {"proc/meminfo": MEMINFO})) == (2 * MIB, "ulimit")


def test_what_this_process_uses_is_measured() -> None:
    held = torch.ones(2**22)
    assert held.nbytes < peak_memory(CPU) or not Path("/proc/self/status").exists()
    assert used_memory(CPU) <= max(peak_memory(CPU), MIB)
