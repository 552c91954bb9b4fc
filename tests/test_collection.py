"""Which files a run with `-m` reads: those that have a test it selects, and no others where the text tells."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

HERE = Path(__file__).parent
MAIN = "not interpreter and not models"


@pytest.fixture
def left_out(pytestconfig: pytest.Config, tmp_path: Path) -> Any:
    """Return what says whether a file with some text is left out under an expression for `-m`."""
    conftest: Any = pytestconfig.pluginmanager.get_plugin(str(HERE / "conftest.py"))

    def ask(text: str, expression: str, name: str = "test_some.py") -> bool:
        (tmp_path / name).write_text(text)
        config = SimpleNamespace(option=SimpleNamespace(markexpr=expression))
        return bool(conftest.pytest_ignore_collect(tmp_path / name, config))

    return ask


WHOLE = "pytestmark = pytest.mark.models\n"
LISTED = "pytestmark = [\n    pytest.mark.slow,\n    pytest.mark.models,\n]\n"
SINGLE = "pytestmark = pytest.mark.slow\n\n@pytest.mark.models\ndef test_one() -> None: ...\n"


@pytest.mark.parametrize(
    ("text", "expression", "expected"),
    [
        ("def test_one() -> None: ...\n", "models", True),
        ("def test_one() -> None: ...\n", MAIN, False),
        ("def test_one() -> None: ...\n", "", False),
        (WHOLE, "models", False),
        (WHOLE, "interpreter", True),
        (WHOLE, MAIN, True),
        (WHOLE, "not models", True),
        (WHOLE, "not interpreter", False),
        (WHOLE, "not models or slow", False),
        (WHOLE, "slow or models", False),
        (LISTED, MAIN, True),
        (LISTED, "models", False),
        (SINGLE, MAIN, False),
        (SINGLE, "models", False),
    ],
)
def test_a_file_is_left_out_where_nothing_in_it_is_selected(
    left_out: Any, text: str, expression: str, expected: bool
) -> None:
    assert left_out(text, expression) is expected
    assert not left_out(text, expression, "helper.py")


def test_marks_that_select_are_written_in_the_files_of_the_tests() -> None:
    """A mark that a test had from another file would be out of sight."""
    for path in HERE.rglob("*.py"):
        if not path.name.startswith("test_"):
            text = path.read_text("utf-8")
            assert not any(f"pytest.mark.{one}" in text for one in ("models", "interpreter"))
