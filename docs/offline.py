"""The section of the measured figures on kernels that were compiled and launched for GPUs that are not there."""

from collections.abc import Callable
from typing import Any

Json = dict[str, Any]
Table = Callable[[list[str], list[list[str]]], list[str]]
FIGURES = ("instructions an element", "registers", "programs a processor")


def offline_section(found: Json, where: Callable[[Json], str], table: Table) -> list[str]:
    """Return what the offline report says, before and after."""
    judged = [
        [one["what"], one["bound"], str(one["found"]), "yes" if one["reached"] else "NO"]
        for one in found["goals"]
    ]
    return [
        "## Kernels without a GPU",
        "",
        f"`python -m benchmarks.offline_kernels`: {where(found)}, Triton {found['triton']}. Launches are recorded by",
        f"a driver that launches nothing; before is commit {found['before']['commit'][:7]}. **No time of a device is",
        "here.** Goals are of sm_80, sm_90 and sm_100:",
        "",
        *table(["goal", "bound", "found", "reached"], judged),
        "",
        "On sm_90, before to after where they differ. Launches are Triton's and ATen's. Bytes count each tensor of a",
        "launch once, so tables of addresses hide what lists hold. The other figures are of a pass's first",
        "kernel of Triton's that works by elements: instructions of its main loop, registers a thread, programs that a",
        "processor holds.",
        "",
        *table(
            [
                "operator",
                "size",
                "pass",
                "launches",
                "MB",
                "instructions an element",
                "registers",
                "programs",
            ],
            _launches(found),
        ),
        "",
        "Host time of a call, microseconds of processor time: the operator's dispatch, its autograd and Triton's own",
        "Python, without the driver's call; what ATen computes for it on tensors of a few rows is counted, too.",
        "",
        *table(["operator", "forward", "backward"], _host(found)),
        "",
        "One `multi_norm` of all weights of a model, microseconds; the device's by reading them once at 4.3 TB/s:",
        "",
        *table(["model", "tensors", "host, before", "host, after", "device"], _tables(found)),
        "",
    ]


def _launches(found: Json) -> list[list[str]]:
    before = {_case(one): one for one in found["before"]["launches"]}
    rows = []
    for one in found["after"]["launches"]:
        if one["target"] != "sm_90" or not one["kernels"]:
            continue
        old = before.get(_case(one))
        size = "x".join(map(str, one["size"])) + (" fp32" if one["dtype"] == "float32" else "")
        rows.append(
            [
                one["operator"],
                size,
                one["phase"],
                _change(one, old, lambda row: str(row["launches"])),
                _change(one, old, lambda row: f"{row['bytes'] / 1e6:.1f}"),
                *(_change(one, old, lambda row, f=figure: _main(row, f)) for figure in FIGURES),
            ]
        )
    return rows


def _host(found: Json) -> list[list[str]]:
    earlier = {one["operator"]: one for one in found["before"]["host"]}
    return [
        [
            one["operator"],
            *(
                _change(one, earlier.get(one["operator"]), lambda row, p=phase: f"{row[p]:.0f}")
                if phase in one
                else ""
                for phase in ("forward", "backward")
            ),
        ]
        for one in found["after"]["host"]
    ]


def _tables(found: Json) -> list[list[str]]:
    return [
        [
            new["model"],
            str(new["tensors"]),
            *(f"{one:.0f}" for one in (old["host us"], new["host us"], new["device us"])),
        ]
        for old, new in zip(found["before"]["tables"], found["after"]["tables"], strict=True)
    ]


def _case(row: Json) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in ("operator", "size", "dtype", "phase", "target"))


def _main(row: Json, figure: str) -> str:
    known = row["kernels"]
    counted = [one for one in known if one["instructions an element"] is not None]
    value = (counted or known)[0][figure] if known else None
    return "-" if value is None else str(value)


def _change(new: Json, old: Json | None, show: Callable[[Json], str]) -> str:
    """Return a figure, after what it was where that was another."""
    if old is None or show(old) == show(new):
        return show(new)
    return f"{show(old)} to {show(new)}"
