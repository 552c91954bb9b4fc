"""What each construct takes of memory beyond weights, gradients and optimizer state, at 100M parameters.

Each case is a process of its own, on the CPU: a GPT and the construct's own example beside AdamW, three steps of two
micro-batches. The plan's figure is made on the meta device. `--gpt2` trains a GPT of 124M parameters with the noise
scale and `lr temp_balance` at full length, under a limit of 8 GiB of address space. `--head` trains one block under a
head of 50257 classes, with all logits and with `chunks`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks/results/memory.json"
if str(ROOT) not in sys.path:  # `python -P` leaves it out
    sys.path.append(str(ROOT))

from benchmarks.measure import machine  # noqa: E402

GIB, MIB = 2**30, 2**20
LIMIT = 8 * GIB
SIZES = {"layers": 14, "width": 736, "heads": 8, "context": 64, "vocabulary": 8192}
GPT2 = {"layers": 12, "width": 768, "heads": 12, "context": 1024, "vocabulary": 50257, "tied": True}
HEAD = {"layers": 1, "width": 512, "heads": 8, "context": 2048, "vocabulary": 50257}
CHUNKS = ("off", "auto", "16")
BASE = """train 1
data "examples.data:stdlib" { batch = 2 samples, micro = 1 samples }
run { length = 500 steps }
"""
ADAMW = "optimizer adamw { lr = 1e-4 } "
GNS = "noise_scale gns on type(LayerNorm) "
# The cases whose own example acts too seldom, or on other layers than a GPT has.
OTHERS = {
    "lr temp_balance": 'lr temp_balance on "blocks.**" & ndim(2) every 1 steps { range = 0.5..1.5 }',
    "mask magnitude": "mask magnitude on ndim(2) every 1 steps { density = 50% }",
}
WHOLE = ("model", "data", "run", "loss", "normalize")


def spec(case: str) -> str:
    """Return the text of a case, which may have a loss of its own."""
    return BASE + ("" if case.startswith("loss ") else "loss cross_entropy\n") + case


def clauses() -> dict[str, str]:
    """Return the clauses of each case, by name."""
    from trainc.compiler.catalog import catalog

    found = {"none": ADAMW}
    for (kind, name), construct in catalog().items():
        if kind not in WHOLE and (kind, name) != ("optimizer", "adamw"):
            usage = OTHERS.get(f"{kind} {name}", str(construct.usage))
            found[f"{kind} {name}"] = usage if kind == "optimizer" else ADAMW + usage
    return found


def main() -> int:
    """Measure the cases, or one of them in this process, and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="one case, such as `perturb sam`, in its row")
    parser.add_argument("--gpt2", action="store_true", help="the GPT of 124M parameters alone")
    parser.add_argument("--head", action="store_true", help="the head of 50257 classes alone")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        sizes = GPT2 if options.gpt2 else HEAD if options.head else SIZES
        print(json.dumps(measured(options.case, sizes, limited=options.gpt2)))
        return 0
    before = json.loads(OUT.read_text()) if OUT.exists() else {"rows": [], "gpt2": {}}
    if options.head:
        taken = {"taken": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine(), "sizes": HEAD}
        cases = {n: f"loss cross_entropy {{ chunks = {n} }}\n{ADAMW}" for n in CHUNKS}
        rows = {n: in_process(f"chunks = {n}", text, "--head") for n, text in cases.items()}
        OUT.write_text(json.dumps({**before, "head": {**taken, "chunks": rows}}, indent=1) + "\n")
        return 0
    big = before["gpt2"]
    if not options.only:
        big = in_process("gpt2", ADAMW + GNS + OTHERS["lr temp_balance"], "--gpt2")
    cases = {} if options.gpt2 else clauses()
    taken = {
        name: in_process(name, text) for name, text in cases.items() if options.only in (None, name)
    }
    rows = {row.pop("construct"): row for row in before["rows"]} | taken
    where = {"taken": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine()}
    named = [{"construct": name, **rows[name]} for name in clauses() if name in rows]
    found = {**before, **where, "sizes": SIZES, "limit": LIMIT, "gpt2": big, "rows": named}
    OUT.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def in_process(name: str, text: str, *more: str) -> dict[str, Any]:
    """Return what a case takes, in a process whose large blocks of memory go back when they are freed."""
    command = [sys.executable, "-P", __file__, "--case", text, *more]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(f"{name}: {done.stderr.strip().splitlines()[-1]}", flush=True)
        return {"failed": done.stderr.strip().splitlines()[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    shown = ", ".join(f"{key} {value / MIB:.0f}" for key, value in found.items() if value > MIB)
    print(f"{name}: {shown} MiB in {time.monotonic() - started:.0f} s", flush=True)
    return found


def measured(clauses: str, sizes: dict[str, Any], *, limited: bool) -> dict[str, int]:
    """Return bytes: what the plan says, what is held after a step, and the peak of the first and of later steps.

    `plan` is what it says beyond the weights of the model, gradients and optimizer state, adapters among it.
    """
    if limited:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    import torch

    import trainc
    from examples.models import gpt
    from trainc.compiler.plan.needs import needs_of

    torch.manual_seed(0)
    with torch.device("meta"):
        shape = gpt(**sizes)
    needs = needs_of(trainc.plan(spec(clauses), shape))
    weights, gradients, *others = (need.bytes for need in needs.memory)
    model = gpt(**sizes)
    before = sum(p.nbytes for p in model.parameters())
    program = trainc.compile(spec(clauses), model)
    ids = torch.randint(0, sizes["vocabulary"], (2, sizes["context"]))
    samples = torch.arange(2) if program.reads_sample_ids else None
    peaks = []
    for _ in range(3):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        program.step((ids, ids.roll(-1, 1)), sample_ids=samples)
        peaks.append(status("VmHWM"))
    return {
        "parameters": before // 4,
        "plan": sum(others) - needs.state + weights - before,
        "gradients": gradients,
        "state": needs.state,
        "held": status("VmRSS"),
        "first": peaks[0],
        "peak": max(peaks[1:]),
        "addresses": status("VmPeak"),
    }


def status(name: str) -> int:
    """Return a number of this process's memory, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"this system does not tell {name}")


if __name__ == "__main__":
    sys.exit(main())
