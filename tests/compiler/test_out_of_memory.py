"""A step that runs out of memory: the samples that fit are counted, and nothing of the failed passes is left."""

from __future__ import annotations

import copy
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import trainc
from tests.compiler.test_loss_sums import RUN as SGD_RUN
from tests.compiler.test_loss_sums import SUM, made
from trainc.compiler.driver.train import train
from trainc.compiler.program.program import Program
from trainc.dsl.text.errors import SpecError
from trainc.runtime.memory.failure import OutOfMemory, ran_out_of_memory
from trainc.runtime.run.summary import Summary
from trainc.runtime.storage import checkpoint

CUDA, CPU, NUMPY = "CUDA out of memory", "DefaultCPUAllocator: can't allocate memory", "numpy"
WIDTH, CLASSES, BATCH = 6, 5, 8


class Allocator:
    """Fails as an allocator does, for passes of more than `limit` examples, in the passes numbered by `only`."""

    limit: int | None = None
    error = CUDA
    backward = False
    only: range | None = None
    calls = 0

    @classmethod
    def allocate(cls, examples: int) -> None:
        cls.calls += 1
        if cls.limit is None or examples <= cls.limit:
            return
        if cls.only is not None and cls.calls not in cls.only:
            return
        if cls.error == NUMPY:
            raise MemoryError("Unable to allocate 2.00 EiB")
        if cls.error == CPU:
            raise RuntimeError(f"[enforce fail at alloc_cpu.cpp:127] err == 0. {CPU}: 8 bytes")
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    Allocator.limit, Allocator.error, Allocator.backward, Allocator.only = None, CUDA, False, None


@torch.library.custom_op("trainc_tests::limited", mutates_args=())
def limited(x: Tensor) -> Tensor:
    """Return a copy; it needs memory in its forward pass."""
    if not Allocator.backward:
        Allocator.allocate(len(x))
    return x.clone()


@torch.library.custom_op("trainc_tests::limited_backward", mutates_args=())
def limited_backward(g: Tensor) -> Tensor:
    """Return a copy of the gradient; it needs memory, too."""
    if Allocator.backward:
        Allocator.allocate(len(g))
    return g.clone()


limited.register_fake(torch.empty_like)
limited_backward.register_fake(torch.empty_like)
limited.register_autograd(lambda ctx, g: limited_backward(g))


class Model(nn.Module):
    """Layers with running statistics on request, dropout, and random numbers from everywhere."""

    def __init__(self, norm: type[nn.Module], dropout: float) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(WIDTH, 7), norm(7)
        self.drop, self.head = nn.Dropout(dropout), nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.drop(limited(self.norm(self.first(x)).tanh())))
        return found


GNS = "noise_scale gns on type(LayerNorm) { smooth = 2 steps }"
SAM = "perturb sam { rho = 0.1 }"
PACE = "regularize pace on type(Linear) { sigma = 0.3, weight = 0.5 }"


def compiled(
    micro: str | int, clauses: str, executor: Any = "auto", norm: type[nn.Module] = nn.LayerNorm, dropout: float = 0.3,
) -> Program:  # fmt: skip
    torch.manual_seed(0)
    micro = f"{micro} samples" if isinstance(micro, int) else micro
    spec = f"""train 1
    data "examples.data:stdlib" {{ batch = {BATCH} samples{micro and f", micro = {micro}"} }}
    loss cross_entropy
    optimizer adamw {{ lr = 1e-2 }}
    run {{ length = 20 steps, seed = 3 }}
    {clauses}"""
    return trainc.compile(spec, Model(norm, dropout), executor=executor)


def batch(step: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(step)
    targets = torch.randint(0, CLASSES, (BATCH,), generator=draw)
    targets[step % BATCH] = -100
    return torch.randn(BATCH, WIDTH, generator=draw), targets


def seed(step: int) -> None:
    torch.manual_seed(step)
    np.random.seed(step)
    random.seed(step)


def trained(program: Program, steps: int = 3, first: int = 0) -> list[dict[str, float]]:
    metrics = []
    for step in range(first, first + steps):
        seed(step)
        metrics.append(program.step(batch(step)))
    return metrics


def states(program: Program) -> dict[str, Any]:
    """Return everything of a state but what it says of memory, and the plan."""
    state = copy.deepcopy(program.state_dict())
    del state["made_by"], state["fitting"], state["signals"]["micro_batch"]
    return state


def flat(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [leaf for key in sorted(tree, key=str) for leaf in flat(tree[key])]
    if isinstance(tree, list | tuple):
        return [leaf for one in tree for leaf in flat(one)]
    return [tree.tolist() if isinstance(tree, Tensor) else tree]


def loaded(program: Program, other: Program) -> Program:
    """Return a program with the state of one whose spec divides steps otherwise."""
    program.load_state_dict({**other.state_dict(), "made_by": program.state_dict()["made_by"]})
    return program


def same(one: Program, two: Program) -> bool:
    return repr(flat(states(one))) == repr(flat(states(two)))


@pytest.mark.parametrize("executor", ["graph", "module"])
@pytest.mark.parametrize(("clauses", "limit"), [("", 3), (f"{GNS} {SAM}", 3), (f"{GNS} {PACE}", 6)])
def test_micro_auto_goes_on_as_if_the_number_that_fits_had_been_written(
    clauses: str, limit: int, executor: Literal["graph", "module"]
) -> None:
    fixed = compiled(2, clauses, executor)
    auto = compiled("auto", clauses, executor)
    expected = trained(fixed)
    Allocator.limit = limit
    found = trained(auto)
    assert repr(found) == repr(expected)
    assert same(auto, fixed)
    assert auto.fitting_size == 2
    assert auto.micro_size == BATCH


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_a_failure_in_the_middle_of_accumulation_repeats_the_whole_step(
    executor: Literal["graph", "module"],
) -> None:
    auto = compiled("auto", f"{GNS} {SAM}", executor)
    Allocator.limit = 4
    trained(auto, 1)
    assert auto.fitting_size == 4
    # SAM has two passes of each of two micro-batches: the last of the four fails.
    Allocator.limit, Allocator.calls, Allocator.only = 2, 0, range(4, 5)
    trained(auto, 1, first=1)
    assert auto.fitting_size == 2
    assert [note for note in auto.report().notes if "a pass of 4 samples ran out of memory" in note]
    Allocator.limit = None
    fixed = compiled(4, f"{GNS} {SAM}", executor)
    trained(fixed, 1)
    halves = loaded(compiled(2, f"{GNS} {SAM}", executor), fixed)
    trained(halves, 1, first=1)
    assert same(auto, halves)


@pytest.mark.parametrize("error", [CUDA, CPU, NUMPY])
@pytest.mark.parametrize("backward", [False, True])
def test_without_auto_the_error_names_the_number_that_fits_and_nothing_has_changed(
    error: str, backward: bool
) -> None:
    program, untouched = compiled("", f"{GNS} {SAM}"), compiled("", f"{GNS} {SAM}")
    trained(program, 2)
    trained(untouched, 2)
    Allocator.limit, Allocator.error, Allocator.backward = 2, error, backward
    with pytest.raises(
        OutOfMemory, match=r"a pass of 8 samples .* Passes of 2 samples fit"
    ) as found:
        trained(program, 1, first=2)
    assert found.value.fits == 2
    assert "`micro = 2 samples`" in str(found.value)
    assert ran_out_of_memory(found.value)
    assert isinstance(found.value, torch.OutOfMemoryError)  # whoever catches that still does
    Allocator.limit = None
    assert program.fitting_size is None
    assert same(program, untouched)
    assert trained(program, 2, first=2) == trained(untouched, 2, first=2)


def test_running_statistics_are_those_of_the_passes_that_count() -> None:
    fixed, auto = (compiled(m, "", norm=nn.BatchNorm1d) for m in (4, "auto"))
    trained(fixed)
    Allocator.limit = 4
    trained(auto, 1)
    assert [note for note in auto.report().notes if "`norm` normalizes over" in note]
    trained(auto, 2, first=1)
    assert same(auto, fixed)


def test_a_step_that_never_fits_says_so() -> None:
    program = compiled("auto", "")
    Allocator.limit = 0
    with pytest.raises(OutOfMemory, match="Nor does a pass of one sample fit") as found:
        trained(program)
    assert found.value.fits is None
    assert program.clock.steps == 0
    Allocator.limit = None
    fixed = compiled("", "")
    assert trained(program) == trained(fixed)


def test_a_resumed_program_begins_with_the_number_that_was_found() -> None:
    auto = compiled("auto", GNS)
    Allocator.limit = 4
    trained(auto, 2)
    resumed = compiled("auto", GNS)
    resumed.load_state_dict(auto.state_dict())
    assert resumed.fitting_size == 4
    Allocator.limit = None  # nothing fails any more, and the numbers are the same
    assert trained(resumed, 2, first=2) == trained(auto, 2, first=2)
    assert same(resumed, auto)
    line = [line for line in resumed.summary() if line.startswith("micro = auto")]
    assert line == ["micro = auto: 4 samples in a pass since step 1, because 8 ran out of memory"]


def test_it_halves_again_where_that_number_fails_later() -> None:
    auto = compiled("auto", "")
    Allocator.limit = 4
    trained(auto, 1)
    Allocator.limit = 1
    trained(auto, 1, first=1)
    assert auto.fitting_size == 1


def test_an_evaluation_has_passes_of_that_number_too() -> None:
    auto, whole = compiled("auto", ""), compiled("", "")
    Allocator.limit = 3
    trained(auto, 1)
    loaded(whole, auto)
    found = auto.evaluate(*batch(9))
    Allocator.limit = None
    expected = whole.evaluate(*batch(9))
    assert found[1:] == expected[1:]
    assert found[0] == pytest.approx(expected[0], rel=1e-6)


def test_an_evaluation_that_runs_out_of_memory_is_repeated_in_halves() -> None:
    auto, whole = (compiled("auto", "observe calibration { bins = 3 }") for _ in range(2))
    trained(auto, 1)
    loaded(whole, auto)
    expected, measured = whole.evaluate(*batch(9)), whole.evaluation_metrics()
    Allocator.limit, Allocator.calls, Allocator.only = 4, 0, range(1, 2)
    auto.evaluate(*batch(9))  # a first half was seen before the pass of the second half fails
    auto.evaluation_metrics()
    Allocator.limit, Allocator.calls, Allocator.only = 3, 0, range(2, 3)
    found = auto.evaluate(*batch(9))
    assert found[1:] == expected[1:]
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert auto.evaluation_metrics() == pytest.approx(measured)
    assert auto.fitting_size is None
    Allocator.limit = Allocator.only = None
    trained(auto, 1, first=1)
    notes = [note for note in auto.report().notes if "of an evaluation ran out of memory" in note]
    assert [("repeated with 4" in note, "repeated with 2" in note) for note in notes] == [
        (True, False),
        (False, True),
    ]
    resumed = compiled("auto", "observe calibration { bins = 3 }")
    resumed.load_state_dict(auto.state_dict())
    assert resumed.evaluate(*batch(9)) == auto.evaluate(*batch(9))
    line = "micro = auto: 2 samples in a pass of an evaluation since step 1, because 4 ran out of memory"
    assert [one for one in resumed.summary() if "of an evaluation" in one] == [line]


def test_without_auto_an_evaluation_that_does_not_fit_says_what_does() -> None:
    program = compiled("", "")
    Allocator.limit = 3
    with pytest.raises(
        OutOfMemory, match=r"`micro = 2 samples`.*evaluate` with 2 samples"
    ) as found:
        program.evaluate(*batch(9))
    assert "a pass of an evaluation of 8 samples ran out of memory" in str(found.value)
    assert program.clock.steps == 0


def test_an_evaluation_in_parts_has_the_losses_of_a_sum_of_the_whole() -> None:
    data = 'data "examples.data:stdlib" { batch = 6 samples, micro = auto } '
    (model, batch_), whole = made(), made()[0]
    auto, plain = (trainc.compile(data + SUM + SGD_RUN, one) for one in (model, whole))
    auto._runner.fitting.size = 4
    found, expected = (one.evaluate(*batch_) for one in (auto, plain))
    assert found[:2] == pytest.approx(expected[:2], rel=1e-12)
    assert found[2].keys() == expected[2].keys()
    for name, pair in expected[2].items():
        assert found[2][name] == pytest.approx(pair, rel=1e-12)


def test_other_errors_are_left_as_they_are() -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("an error of the model")

    program = compiled("auto", "")
    hook = program.module.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="an error of the model"):
        trained(program)
    hook.remove()
    trained(program)


def test_an_update_that_runs_out_of_memory_says_that_smaller_passes_do_not_help(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    program = compiled("auto", "")
    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    with pytest.raises(OutOfMemory, match="the update ran out of memory"):
        trained(program)
    assert program.fitting_size is None


def test_what_a_failed_pass_held_is_given_back() -> None:
    class Held(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            counted.append(copied := x * 1.0)
            alive.append(_watch(copied))
            found: Tensor = limited(copied)
            return found

    counted: list[Tensor] = []
    alive: list[Callable[[], object]] = []
    program = compiled("auto", "", "module")
    program.module.drop = Held()
    Allocator.limit = 4
    before: list[bool] = []

    def look(*_: Any) -> None:
        counted.clear()
        before.append(any(one() is not None for one in alive[:1]))

    program.module.get_submodule("first").register_forward_pre_hook(look)
    trained(program, 1)
    assert before == [False, False, False]


def _watch(tensor: Tensor) -> Callable[[], object]:
    import weakref

    return weakref.ref(tensor)


# in a run


class Points:
    """Fixed random points and classes."""

    def __init__(self, samples: int) -> None:
        draw = torch.Generator().manual_seed(samples)
        self.x = torch.randn(samples, WIDTH, generator=draw)
        self.y = torch.randint(0, CLASSES, (samples,), generator=draw)

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        noise = 0.1 * torch.randn(len(indices), WIDTH)  # as an augmentation draws it
        return self.x[list(indices)] + noise, self.y[list(indices)]


def model() -> Model:
    return Model(nn.LayerNorm, 0.3)


def data() -> tuple[Points, Points]:
    return Points(40), Points(13)


RUN = """train 1
model "tests.compiler.test_out_of_memory:model"
data "tests.compiler.test_out_of_memory:data" { batch = 8 samples, micro = MICRO }
loss cross_entropy
optimizer adamw { lr = 1e-2 }
noise_scale gns on type(LayerNorm) { smooth = 2 steps }
run { length = 6 steps, seed = 3, eval = 2 steps, checkpoint = 3 steps }
"""


def run(out: Path, micro: str, **options: Any) -> Summary:
    return train(RUN.replace("MICRO", micro), out, quiet=True, **options)


def weights(out: Path) -> list[Any]:
    return flat(checkpoint.load_checkpoint(out / "checkpoints/step-00000006")["program"]["model"])


def test_a_run_goes_on_and_a_resumed_one_remembers(tmp_path: Path) -> None:
    Allocator.limit = 3
    summary = run(tmp_path / "whole", "auto")
    assert summary.reason == "finished"
    assert [line for line in summary.lines if line.startswith("micro = auto: 2 samples in a pass")]
    events = (tmp_path / "whole/events.jsonl").read_text()
    assert events.count("a pass of 4 samples ran out of memory") == 1
    after, metrics = weights(tmp_path / "whole"), (tmp_path / "whole/metrics.jsonl").read_text()
    shutil.rmtree(tmp_path / "whole/checkpoints/step-00000006")  # as if it had been killed
    Allocator.limit = None  # and resumed where there is more memory
    assert run(tmp_path / "whole", "auto", resume=True).lines == summary.lines
    assert weights(tmp_path / "whole") == after
    assert (tmp_path / "whole/metrics.jsonl").read_text() == metrics


def test_a_run_without_auto_ends_at_the_field_and_names_the_number(tmp_path: Path) -> None:
    Allocator.limit = 3
    with pytest.raises(SpecError) as found:
        run(tmp_path / "out", "4 samples")
    text = str(found.value)
    assert "error[out-of-memory]: a pass of 4 samples ran out of memory" in text
    assert "Write `micro = 2 samples`" in text
    assert "micro = 4 samples }\n" in text


LIMITED = """
import resource
from pathlib import Path
import torch
from torch import nn
import trainc


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.repeat(1, 2**21).view(len(x), -1, 8).tanh()  # 64 MiB for each sample, and as much again
        return self.head(x) + wide.mean((1, 2)).unsqueeze(1)


lines = Path("/proc/self/status").read_text().splitlines()
spec = 'train 1 data "examples.data:stdlib" { batch = 8 samples, micro = auto } loss cross_entropy '
program = trainc.compile(spec + "optimizer sgd { lr = 0.1 }", Wide())
used = next(int(line.split()[1]) for line in lines if line.startswith("VmSize")) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 700 * 2**20,) * 2)
program.step((torch.randn(8, 8), torch.randint(0, 4, (8,))))
print(program.fitting_size)
"""


def test_a_real_allocator_that_fails_is_understood() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", LIMITED], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )  # fmt: skip
    assert done.stdout.split() in (["4"], ["2"]), done.stderr
