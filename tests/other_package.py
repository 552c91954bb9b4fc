"""The constructs of tests/third_party, installed as the package of somebody else."""

import importlib
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tests.conformance import Setup
from trainc.compiler.catalog import GROUP, catalog

PACKAGE = "othermethods"
FILES = {
    "loss": "absolute",
    "optimizer": "plain",
    "lr": "slow",
    "mask": "still",
    "noise_scale": "influence",
    "observe": "length",
    "perturb": "shifted",
    "regularize": "pull",
    "distribute": "greeting",
    "normalize": "rescaled",
    "adapt": "gain",
}
"""The construct of each kind: the name of its file in tests/third_party."""


@contextmanager
def installed(site: Path) -> Iterator[None]:
    """Install the package in an empty folder, as pip would, and take it out of the catalog afterwards."""
    shutil.copytree(Path(__file__).parent / "third_party", site / PACKAGE)
    info = site / f"{PACKAGE}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 1.0\n")
    lines = [f"{kind}.{name} = {PACKAGE}.{name}\n" for kind, name in FILES.items()]
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n" + "".join(lines))
    sys.path.insert(0, str(site))
    importlib.invalidate_caches()
    catalog.cache_clear()
    try:
        yield
    finally:
        sys.path.remove(str(site))
        catalog.cache_clear()
        for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
            del sys.modules[name]


def setup() -> Setup:
    """Return what the conformance suite trains these constructs on."""
    task = importlib.import_module(f"{PACKAGE}.task")

    def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        found: tuple[torch.Tensor, torch.Tensor] = task.data().train.batch(range(seed, seed + 6))
        return found

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        made: torch.nn.Module = task.net()
        return made

    rest = "loss mse optimizer sgd { lr = 0.1, momentum = 0.5 } run { length = 40 steps, seed = 3 }"
    return Setup(model, batch, rest)
