"""Fixtures shared by the tests of the runtime."""

from pathlib import Path

import pytest

from tests.runtime.runs import run


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    summary = run(out)
    assert summary.reason == "finished"
    return out
