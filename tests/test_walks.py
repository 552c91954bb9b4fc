"""The walks of docs/architecture.md: every line of one is a function that runs, in the order of the page."""

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
import torch

import trainc
from trainc.compiler.driver.recorded_clauses import draw_runs
from trainc.compiler.driver.train import train
from trainc.compiler.program.program import Program

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
Stop = tuple[str, str]
SPEC = """train 1
use "more.train"
model "examples.models:gpt" { layers = 1, width = size, heads = 2, context = 16 }
data  "examples.data:stdlib" { batch = 4 samples, context = 16 }
loss  cross_entropy
run   { length = 2 steps, seed = 7 }
optimizer adamw { lr = 1e-3 }
noise_scale gns on type(LayerNorm) { smooth = 2 steps }
"""


def walk(title: str) -> list[Stop]:
    """Return the (file, function) pairs of a walk, as the page lists them."""
    section = PAGE.split(f"### {title}\n")[1].split("\n#")[0]
    return re.findall(r"^\d+\. `([\w/]+\.py): ([\w.]+)`", section, re.MULTILINE)


class Follower:
    """Watches every call, and goes one stop further along a walk when that stop's function is called."""

    def __init__(self, stops: list[Stop]) -> None:
        self.left = list(stops)

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if event != "call" or not self.left:
            return
        file, function = self.left[0]
        made = (
            function,
            f"{function}.__init__",
            f"{function}.__post_init__",
        )  # a class is called too
        if frame.f_code.co_qualname not in made:
            return
        if frame.f_code.co_filename == str(ROOT / file):
            self.left.pop(0)


@contextmanager
def followed(stops: list[Stop]) -> Iterator[None]:
    """Fail unless the stops are passed in order within the block."""
    follower = Follower(stops)
    threading.setprofile(follower)
    sys.setprofile(follower)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    assert follower.left == [], f"not reached: {follower.left[0]}"


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("walk")
    (folder / "more.train").write_text("let size = 32\n")
    (folder / "spec.train").write_text(SPEC)
    return folder / "spec.train"


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.arange(64).reshape(4, 16) % 50
    return tokens, tokens


def compiled(spec: Path) -> Program:
    from examples.models import gpt

    return trainc.compile(spec, gpt(layers=1, width=32, heads=2, context=16))


def test_from_text_to_a_spec(spec: Path) -> None:
    with followed(walk("From text to a Spec")):
        assert trainc.check(spec).spec


def test_from_a_spec_to_a_plan(spec: Path) -> None:
    with followed(walk("From a Spec to a Plan")):
        trainc.plan(spec)


def test_from_a_plan_to_a_program(spec: Path) -> None:
    with followed(walk("From a Plan to a Program")):
        compiled(spec).step(batch())


def test_a_batch(spec: Path) -> None:
    program = compiled(spec)
    program.step(batch())  # the first batch is captured
    with followed(walk("A batch")):
        program.step(batch())


def test_a_measured_signal(spec: Path, tmp_path: Path) -> None:
    with followed(walk("A measured signal, from the kernel to the screen")):
        train(spec, tmp_path / "run", plain=True)
        draw_runs([tmp_path / "run"], tmp_path / "run.png")


def test_every_walk_is_taken() -> None:
    titles = re.findall(r"^### (.+)$", PAGE, re.MULTILINE)
    assert len(titles) == 5
    assert all(len(walk(title)) >= 5 for title in titles)


@pytest.mark.parametrize(
    "stops",
    [[("compiler/catalog.py", "no_such")], [("compiler/catalog.py", "check"), ("compiler/catalog.py", "check")]],
)  # fmt: skip
def test_a_stop_that_is_not_passed_would_be_noticed(spec: Path, stops: list[Stop]) -> None:
    with pytest.raises(AssertionError, match="not reached"), followed(stops):
        trainc.check(spec)


def test_calls_in_another_order_would_be_noticed(spec: Path) -> None:
    stops = walk("From text to a Spec")
    with pytest.raises(AssertionError, match="not reached"), followed(stops[::-1]):
        trainc.check(spec)
