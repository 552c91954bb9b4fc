"""Set-up shared by all tests; it runs before anything imports torch or triton."""

import gc
import importlib.util
import os
import re
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parents[1]

# `python -m pytest` puts the checkout on sys.path, where our folders would shadow other
# people's packages (Hugging Face ships a top-level `kernels`) and hide a broken installation.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]

# Specs name `examples.models:gpt`, which resolves from the checkout, and tables of the benchmarks are
# held by tests. Tests get these two packages and not their neighbours.
for _name in ("examples", "benchmarks"):
    _spec = importlib.util.spec_from_file_location(_name, ROOT / _name / "__init__.py")
    assert _spec
    assert _spec.loader
    sys.modules[_name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_name])

# Captured graphs are very many objects: to walk through the young ones after every 700 took a tenth of the time.
gc.set_threshold(20_000, 20, 20)

# Results must not depend on the number of cores, and the workers share them.
os.environ["OMP_NUM_THREADS"] = "1"

settings.register_profile("trainc", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("trainc")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite expected output")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave a file unread where `-m` selects none of its tests: each worker would import what these import.

    That is where `-m` is one mark and the file does not write it, or where `-m` excludes marks and `pytestmark` sets
    one of them for the whole file.
    """
    asked = config.option.markexpr.split()
    if not asked or not collection_path.name.startswith("test_"):
        return None
    text = collection_path.read_text("utf-8")
    if len(asked) == 1:
        return True if f"pytest.mark.{asked[0]}" not in text else None
    if not {*asked[::3], *asked[2::3]} <= {"not", "and"}:
        return None
    whole = re.search(r"^pytestmark = (\[.*?\]|[^\n]*)$", text, re.MULTILINE | re.DOTALL)
    excluded = (f"pytest.mark.{mark}" for mark in asked[1::3])
    return True if whole and any(mark in whole[1] for mark in excluded) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this process cannot run.

    Triton reads TRITON_INTERPRET when it is first imported, and its interpreter and its compiler
    exclude each other, so `interpreter` and `offline` tests need two processes: `make test`
    starts both.
    """
    triton = importlib.util.find_spec("triton") is not None
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    models = importlib.util.find_spec("transformers") is not None
    reasons = {
        "interpreter": (triton and interpreting, "needs triton and TRITON_INTERPRET=1"),
        "offline": (triton and not interpreting, "needs triton and its compiler"),
        "models": (models, "needs transformers"),
    }
    for item in items:
        for marker, (able, reason) in reasons.items():
            if not able and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


_file = [Path()]
"""The file of the test that ran last."""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let each test draw numbers of its own: one that fails by them fails again, alone and in any order."""
    if item.path != _file[0]:
        _file[0] = item.path
        keep_for_good()
    if torch := sys.modules.get("torch"):
        torch.manual_seed(zlib.crc32(item.nodeid.encode()))


def pytest_collection_finish() -> None:
    """Do so with what is collected."""
    keep_for_good()


def keep_for_good() -> None:
    """Keep what there is out of the garbage collector, which else walks through it again and again.

    That is what stays for all tests, and between two files what libraries keep of the tests before: a collection took
    a second in the end.
    """
    gc.collect()
    gc.freeze()
