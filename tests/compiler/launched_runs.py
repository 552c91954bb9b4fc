"""Runs of several processes, one after the other in the same ones: torchrun starts this file for its tests."""

import os
import shutil
import sys
from pathlib import Path

from tests.torchrun import spec
from trainc.compiler.driver.train import train
from trainc.runtime.processes.launch import end_process

MEASURED = (
    " noise_scale gns on type(LayerNorm) { smooth = 3 steps } observe calibration { bins = 4 }"
    " regularize pace on type(Linear) { sigma = 0.1, weight = 0.5 }"
)
SHARDED = 'distribute fsdp2 on "blocks.*" { timeout = 60 seconds }'
RULES = (
    " when steps >= 5 cooldown 100% { rollback, adamw.lr = adamw.lr * min(1, loss / 4) }"
    " when steps < 2 { freeze ndim(2), evaluate } when eval_loss <= best(eval_loss) { unfreeze all, save }"
)
CASES = {
    "plain": spec(),
    "measured": spec(MEASURED),
    "augmented": spec("distribute ddp { find_unused = true }", data="noisy"),
    "stream": spec("distribute ddp", data="loader"),
    "uneven": spec(batch=7, micro=1),
    "sharded": spec(SHARDED),
    "ruled": spec(RULES),
    "ruled shards": spec(SHARDED + RULES),
}
"""Specs that have the numbers of one process."""
RESUMED = {"measured": "measured", "uneven": "uneven", "sharded": "sharded", "plain": "sharded"}
"""Which runs are continued from their last but one checkpoint, by which spec."""


def cut(source: Path, target: Path) -> None:
    """Copy a run as it was before its last checkpoint."""
    shutil.copytree(source, target)
    shutil.rmtree(max((target / "checkpoints").glob("step-*")))


def thread_names() -> list[str]:
    """Return the names of the threads of this process, of libraries too; none where the system does not tell."""
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]


def main(folder: Path) -> None:
    for name, text in CASES.items():
        train(text, folder / name, quiet=True)
        if name == "plain":
            (folder / f"threads of {os.environ['RANK']}").write_text("\n".join(thread_names()))
    dropping = CASES["plain"].replace("torchrun:Net", "torchrun:Dropping")
    train(dropping.replace("length = 10", "length = 1"), folder / "dropping", quiet=True)
    for first, second in RESUMED.items():
        out = folder / f"{second} after {first}"
        if os.environ["RANK"] == "0":  # the others wait for it in the run
            cut(folder / first, out)
        train(CASES[second], out, resume=True, quiet=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end_process(0)  # torch keeps the group of the last sharded run, and threads of it
