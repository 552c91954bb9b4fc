"""The page of measured figures, made from benchmarks/results so that no table is typed by hand."""

import json
from pathlib import Path
from runpy import run_path
from typing import Any

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
Json = dict[str, Any]
NOT_ON_A_GPU = (
    "Not measured: no GPU was at hand. `python -m benchmarks.gpu --out` writes the figures."
)


def measured_page() -> str:
    """Return docs/measured.md."""
    return "\n".join(
        [
            "# Measured figures",
            "",
            "Written by `make docs` from `benchmarks/results/`; what the figures mean is in [kernels.md](kernels.md).",
            "",
            *_gpu(RESULTS / "gpu.json"),
            *_whole_steps(RESULTS / "gpu.json"),
            *run_path(str(Path(__file__).with_name("offline.py")))["offline_section"](
                _read("offline_kernels.json"), _where, _table
            ),
            *_cpu(_read("kernels_cpu.json")),
            *_accuracy(_read("accuracy_cpu.json")),
            *_memory(RESULTS / "memory.json"),
            *_observers(_read("observers.json")),
        ]
    )


def _read(name: str) -> Json:
    found: Json = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return found


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _gpu(path: Path) -> list[str]:
    title = ["## Operators on a GPU", ""]
    if not path.exists():
        return [*title, NOT_ON_A_GPU, ""]
    found = json.loads(path.read_text(encoding="utf-8"))
    versions = ("ours", "one graph", "inductor", "aten", "by hand", "liger")
    rows = [
        [
            one["name"],
            *(_phases(one["times"].get(version, {})) for version in versions),
            one["times"]["ours"]["forward"]["how"],
            "yes" if one["passed"] else "NO",
        ]
        for one in found["rows"]
        if one["part"] == "operators" and "failed" not in one
    ]
    rates = ", ".join(f"{one['copy TB/s']} at {one['when']}" for one in found["conditions"])
    judged = [
        [one["what"], one["kind"], _bounds(one), str(one["measured"]), one["verdict"]]
        for one in found["predictions"]
    ]
    return [
        *title,
        f"{found['device']}, {found['versions']}, commit {found['commit']}, {found['taken']}; copy, TB/s: {rates}.",
        "Microseconds forward + backward. `one graph` is backward with the norms as one function under inductor.",
        "",
        *_table(["operator", *versions, "run", "right"], rows),
        "",
        "What was predicted before any GPU was at hand, and what the kernels were built to reach:",
        "",
        *_table(["figure", "kind", "bound", "measured", "verdict"], judged),
        "",
    ]


def _phases(times: Json) -> str:
    return " + ".join(str(one["median"]) for one in times.values() if isinstance(one, dict))


def _bounds(prediction: Json) -> str:
    return " ".join(f"at {n} {prediction[n]}" for n in ("least", "most") if n in prediction)


def _whole_steps(path: Path) -> list[str]:
    title = ["## Whole steps on a GPU", ""]
    about = [
        "A GPT of 124M parameters and one of 1.0B, bf16: plain `torch.compile` beside `compile = inductor` with the",
        "noise scale on norms, with PACE, and with a SIFT mask; `graphs` has the passes replayed as CUDA graphs.",
        "",
    ]
    found = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    steps = [one for one in found if one["part"] == "steps" and "not measured" not in one]
    if not steps:
        return [*title, *about, NOT_ON_A_GPU, ""]
    head = ["case", "tokens a second", "ms a step", "peak GiB", "first 3 steps, s", "right"]
    rows = []
    for row in steps:
        failed, peak = row.get("failed") or row.get("does not fit"), row.get("peak bytes")
        figures = (
            [
                f"{row['tokens/s']:.0f}",
                f"{row['seconds a step']['median'] * 1e3:.1f}",
                f"{peak / 2**30:.2f}" if peak else "",
                f"{row['seconds of the first steps']:.0f}",
            ]
            if not failed
            else [failed, "", "", ""]
        )
        rows.append([row["name"], *figures, "yes" if row.get("passed") else "NO"])
    return [*title, *about, *_table(head, rows), ""]


def _where(found: Json) -> str:
    machine = found["machine"]
    return f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, {found['taken']}"


def _cpu(found: Json) -> list[str]:
    rows = []
    for one in found["measured"]["cases"]:
        ratio = one["ratio"]
        low, high = ratio["aten"]["quartiles"]
        rows.append(
            [
                one["operator"],
                one["size"],
                f"{one['seconds']['ours']['median'] * 1e3:.2f}",
                f"{ratio['aten']['median']:.2f} ({low:.2f} to {high:.2f})",
                *(f"{ratio[o]['median']:.2f}" if o in ratio else "" for o in ("plain", "inductor")),
                f"{one['bytes'] / 1e6:.1f}",
            ]
        )
    dispatch = ", ".join(
        f"{one['operator']} {one['microseconds']:.0f}" for one in found["measured"]["dispatch"]
    )
    load = found["load average"]
    return [
        "## Operators on a CPU",
        "",
        f"`python -m benchmarks.kernels`: {_where(found)}, one thread, load average {load['before'][0]}",
        f"before and {load['after'][0]} after. Versions take turns in one process; processor time, float32, forward",
        "and backward. Ratios are ours to theirs, so below 1 is faster: the median and, for ATen, quartiles. With a",
        "probe, the ATen composition works out the same per-example norms by hand; `plain` is the same layer without",
        "them. Sizes are (examples, rows, width): for the loss (1, targets, classes), for noise two views of them,",
        "for batch norm (examples, pixels, channels), for multi_norm pairs of (rows, width) tensors.",
        "",
        *_table(["operator", "size", "ours, ms", "to ATen", "to plain", "to inductor", "MB"], rows),
        "",
        f"Above 1.02 by the 95% interval of the median: {'; '.join(found['measured']['missed']) or 'none'}.",
        "",
        f"What a call costs beyond the function it runs, in microseconds, without gradients: {dispatch}.",
        "",
    ]


def _accuracy(found: Json) -> list[str]:
    worst = found["worst"]["max"]
    families = list(dict.fromkeys(family for line in worst.values() for family in line))
    rows = [
        [name, *(f"{line[f]:.2g}" if f in line else "" for f in families)]
        for name, line in worst.items()
    ]
    column = found["columns"].index("ratio max")
    ratios = [one[column] for one in found["rows"]]
    share = {most: sum(r <= most for r in ratios) / len(ratios) for most in (1.0, 2.0)}
    lost = sum(one[found["columns"].index("lost")] for one in found["rows"])
    return [
        "## Accuracy on a CPU",
        "",
        f"`python -m benchmarks.accuracy`: {_where(found)}, {found['draws']} draws.",
        "The largest error of any result and dtype (float32, bfloat16, float16) against float64, as a ratio to the",
        "ATen composition's in the same dtype, which counts as half a unit in the last place where it is less.",
        f"Of {len(ratios)} results {share[1.0]:.0%} are at most 1 and {share[2.0]:.0%} at most 2; entries that only",
        f"ATen kept finite: {lost}.",
        "",
        *_table(["operator", *families], rows),
        "",
    ]


def _memory(path: Path) -> list[str]:
    title = ["## Memory", ""]
    if not path.exists():
        return [*title, "Not measured: `python -m benchmarks.memory` writes the figures.", ""]
    found = json.loads(path.read_text(encoding="utf-8"))
    base = next(row for row in found["rows"] if row["construct"] == "none")
    weights = base["parameters"]

    def beyond(row: Json, when: str) -> str:
        needed = row["state"] + (0 if when == "held" else row["gradients"])
        plain = base[when] - base["state"] - (0 if when == "held" else base["gradients"])
        return f"{(row[when] - needed - plain) / weights:.1f}"

    rows = [
        [
            row["construct"],
            f"{row['plan'] / weights:.1f}",
            *(beyond(row, when) for when in ("held", "peak", "first")),
        ]
        for row in found["rows"]
        if row is not base and "failed" not in row
    ]
    big, limit = found["gpt2"], found["limit"] / 2**30
    return [
        *title,
        f"`python -m benchmarks.memory`: {_where(found)}. A GPT of {weights / 1e6:.0f}M float32 parameters, each",
        "construct's own example beside AdamW, two micro-batches of one sequence, a process for each. In bytes for",
        "each weight, so that one number for each is 4.0; beyond weights, gradients and optimizer state, and beyond",
        "what the same spec takes without the construct, for activations and for Python: what the plan says (on the",
        "meta device), what the process holds after a step, and the peaks of a step and of the first one. With",
        "accumulation a graph has the gradients of one micro-batch beside their sum. In its first step it is compared",
        "with the modules; what capturing it loads of torch, about 60 MiB, is 0.6 here.",
        "",
        *_table(["construct", "plan", "held", "peak of a step", "peak of the first"], rows),
        "",
        f"A GPT of {big['parameters'] / 1e6:.0f}M parameters, two micro-batches of 1024 tokens, with `noise_scale gns`",
        f"and `lr temp_balance` in every step: {big['first'] / 2**30:.1f} GiB at the peak of the first step, and",
        f"{big['peak'] / 2**30:.1f} GiB at that of the next ones. It may have {limit:.0f} GiB of",
        f"addresses (`ulimit -v`), and took {big['addresses'] / 2**30:.1f}.",
        "",
        *(_head(found["head"]) if "head" in found else []),
    ]


def _head(found: Json) -> list[str]:
    """Return the table of a loss of many classes, whole and in chunks."""
    sizes, rows = found["sizes"], found["chunks"]
    logits = 4 * sizes["context"] * sizes["vocabulary"]
    return [
        f"`python -m benchmarks.memory --head`: {_where(found)}. {sizes['layers']} block of width {sizes['width']}",
        f"under a head of {sizes['vocabulary']} classes, micro-batches of {sizes['context']} tokens, whose logits are",
        f"{logits / 2**20:.0f} MiB; MiB in all, by `chunks` of `loss cross_entropy`. The first step compares the graph",
        "with the modules, which hold all logits.",
        "",
        *_table(
            ["chunks", "peak of a step", "peak of the first"],
            [
                [name, *(f"{row[when] / 2**20:.0f}" for when in ("peak", "first"))]
                for name, row in rows.items()
            ],
        ),
        "",
    ]


def _observers(found: Json) -> list[str]:
    """Return the table of what observers of training steps cost at their default intervals."""
    measured = found["measured"]
    size = measured["size"]
    rows = [
        [
            name,
            f"{one['one observation, in steps']:.2f}",
            f"{one['every']} steps",
            f"{one['share of the time']:.2%}",
        ]
        for name, one in measured["steps"].items()
    ]
    return [
        "## Observers of training steps",
        "",
        f"`python -m benchmarks.run observers`: {_where(found)}. Processor time of one",
        f"thread, beside steps of a GPT of {size['layers']} layers of width {size['width']} on",
        f"{size['samples']} x {size['context']} tokens; what reads no text is beside steps of one hidden layer on 64",
        "points. Without `every` an observer measures at its interval.",
        f"Expected: {found['expected']}.",
        "",
        *_table(["observer", "one observation, in steps", "interval", "share of the time"], rows),
        "",
    ]
