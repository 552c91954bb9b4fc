"""Each snippet of the page "In your loop" runs as it stands."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compiler.image_models import import_library
from tests.processes import run_processes, run_rank

PAGE = Path(__file__).parents[1] / "docs/in-your-loop.md"
_BLOCK = re.compile(r"^## (.+?)$|^(?:<!-- (.+?) -->\n)?```python\n(.*?)^```", re.M | re.S)
LIBRARIES = ("lightning", "accelerate", "transformers", "peft", "tensorboard")


def snippets() -> tuple[str, dict[str, tuple[str, str]]]:
    """Return the lines that all begin with, and by its heading and number where each runs, and its text."""
    section, first = "", ""
    found: dict[str, tuple[str, str]] = {}
    for heading, where, text in _BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if heading:
            section = heading
        elif not first:
            first = text
        else:
            number = sum(name.startswith(section) for name in found)
            found[f"{section} {number + 1}"] = (where, text)
    return first, found


FIRST, SNIPPETS = snippets()


def run(name: str) -> dict[str, Any]:
    """Run a snippet after what all begin with, and return its names; inductor would take 20 seconds."""
    torch.manual_seed(0)
    text = SNIPPETS[name][1].replace(
        "torch.compile(model)", 'torch.compile(model, backend="eager")'
    )
    names: dict[str, Any] = {"__name__": "snippet"}
    exec(compile(f"{FIRST}\n\n{text}", f"in-your-loop.md: {name}", "exec"), names)
    return names


def of(where: str) -> list[str]:
    return [name for name, (own, _) in SNIPPETS.items() if own == where]


def trained(names: dict[str, Any]) -> None:
    """Hold that the program of a snippet has trained, and its model has moved."""
    program = (
        names["program"] if "program" in names else getattr(names["optimizer"], "program", None)
    )
    if program is None:  # wrapped by a framework
        return
    assert program.clock.steps >= 1
    assert all(torch.isfinite(p).all() for p in program.module.parameters())


@pytest.mark.parametrize("name", of(""))
def test_a_snippet_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trained(run(name))


@pytest.mark.models
@pytest.mark.filterwarnings("ignore")  # advice of the frameworks
@pytest.mark.parametrize("name", of("models"))
def test_a_snippet_of_a_framework_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for library in LIBRARIES:
        if library in SNIPPETS[name][1]:
            import_library(library)
    names = run(name)
    if "optimizer" in names or "program" in names:
        trained(names)


def work(rank: int) -> list[int]:
    warnings.simplefilter("ignore")
    return [run(name)["program"].clock.steps for name in of("two processes")]


def test_the_snippets_of_several_processes_run(tmp_path: Path) -> None:
    assert run_processes(Path(__file__), 2, tmp_path) == [[4, 4], [4, 4]]


def test_the_page_leads_to_each_of_its_sections() -> None:
    text = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"\]\(#(.+?)\)", text))
    headings = re.findall(r"^## (.+)$", text, re.M)
    anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
    assert named <= anchors
    assert anchors <= named


if __name__ == "__main__":
    run_rank(work)
