"""`graphs = true`: bit for bit the numbers without, under every construct, by a stand-in for CUDA graphs on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trainc
from tests.conformance import Trained, train_double
from tests.stand_in_recorder import Launch, StandIn
from tests.test_constructs import COMPUTING, OWN, setup_of, spec_around, trained_clause
from trainc.compiler.execution.compiled import Compiler
from trainc.compiler.execution.execution import Executor
from trainc.compiler.replay import replayed as replayed_file
from trainc.compiler.replay.recorded_pass import RecordedPass, launch_settings
from trainc.compiler.replay.recorder import Recording, Run
from trainc.compiler.replay.replayed import Replays
from trainc.dsl.resolve.spec import Spec

IN_PASSES = {"forward", "backward", "undo", "perturb"}
EACH = [
    key
    for key in COMPUTING
    if key in OWN and any(e.phase in IN_PASSES for e in trainc.catalog()[key].effects)
]
RECORDED = "a CUDA graph of a pass was recorded"


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Replays, "recorder", StandIn)


def replaying(spec: Spec) -> Spec:
    """Return a spec whose passes are replayed."""
    (run,) = (clause for clause in spec.clauses if clause.kind == "run")
    length = run.construct.length  # type: ignore[attr-defined]
    checked = trainc.check(f"run {{ length = {length}, seed = 3, graphs = true }}")
    assert checked.spec is not None, checked.diagnostics
    return Spec((*(c for c in spec.clauses if c.kind != "run"), *checked.spec.of_kind("run")))


@pytest.mark.parametrize("key", EACH, ids=map(" ".join, EACH))
def test_steps_are_bit_equal_and_the_host_reads_nothing_in_a_pass(key: tuple[str, str]) -> None:
    construct = trainc.catalog()[key]
    setup = setup_of(construct)
    spec = spec_around(trained_clause(construct), setup)

    def trained(spec: Spec, executor: Executor) -> Trained:
        torch.manual_seed(0)
        return train_double(spec, setup, steps=3, sizes=(3, 3), executor=executor)

    got = trained(replaying(spec), "auto")
    replays, reasons = got.program.execution.replays, got.program.execution.reasons
    assert replays.refused is None
    assert not [text for text in replays._told if "the host reads" in text]
    recorded = [one for one in replays._passes.values() if one.recording is not None]
    assert recorded or reasons, replays._told
    assert_equal_steps(got, trained(spec, "auto" if reasons else "graph"))


def assert_equal_steps(one: Trained, two: Trained) -> None:
    assert str(one.metrics) == str(two.metrics)  # nan is as nan
    for mine, theirs in zip(one.gradients, two.gradients, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert_equal(one.program.module, two.program.module)


def assert_equal(one: nn.Module, two: nn.Module) -> None:
    for name, value in two.state_dict().items():
        assert torch.equal(one.state_dict()[name], value), name


# small models

HEAD = """train 1
loss cross_entropy
optimizer sgd { lr = 0.1 * cosine(to = 10%) }
"""
OFF = "run { length = 9 steps }\n"
ON = "run { length = 9 steps, graphs = true }\n"
GNS = "noise_scale gns on type(LayerNorm) { smooth = 2 steps }\n"
PACE = 'regularize pace on "first" { sigma = 0.1 * linear(to = 5), weight = 0.5 }\n'


class Small(nn.Module):
    """Draws random numbers, and has buffers that change."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.drop(self.first(x).relu())))
        return out


class Normed(Small):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)  # type: ignore[assignment]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.norm = nn.Embedding(7, 6), nn.LayerNorm(6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.words(ids)))
        return out


def batch(seed: int = 0, rows: int = 4) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, generator=source), torch.randint(3, (rows,), generator=source)


def words(seed: int = 0, rows: int = 4) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    first, second = torch.randint(7, (2, rows, 3), generator=source)
    return first, second


Change = Callable[[int, trainc.Program], Any]


def trained(
    text: str,
    steps: int = 6,
    model: Callable[[], nn.Module] = Small,
    change: Change | None = None,
    given: Callable[[int], Any] = batch,
    executor: Executor = "graph",
) -> tuple[trainc.Program, list[str]]:
    """Return the program after some steps, with `change(step, program)` before each, and all notes."""
    program = trainc.compile(HEAD + text, model(), executor=executor)
    notes: list[str] = []
    for seed in range(steps):
        if change is not None:
            change(seed, program)
        torch.manual_seed(seed)
        program.step(given(seed))
        notes += program.report().notes
    return program, notes


def assert_replayed(program: trainc.Program, recordings: int = 1) -> None:
    replays = program.execution.replays
    assert replays.refused is None
    found = [one for one in replays._passes.values() if one.recording is not None]
    assert len(found) == recordings


def two(seed: int) -> Sequence[tuple[Tensor, Tensor]]:
    return [batch(seed), batch(seed + 50)]


def uneven(seed: int) -> Sequence[tuple[Tensor, Tensor]]:
    return [batch(seed, 4), batch(seed + 50, 2), batch(seed + 90, 4)]


SAME: dict[str, tuple[str, Callable[[], nn.Module], Callable[[int], Any], int]] = {
    "plain": ("", Small, batch, 1),
    "accumulated": (GNS, Small, two, 1),
    "uneven micro-batches": (GNS, Small, uneven, 2),
    "views and statistics": (GNS + PACE, Small, two, 1),
    "batch norm": ("", Normed, two, 1),
    "tied weights": (GNS, Tied, words, 1),
    "several passes of one batch": ("perturb sam { rho = 0.05 }\n", Small, batch, 1),
    "a companion": ("regularize consistency { target = ema, weight = 0.3 }\n", Small, batch, 1),
    "constants as large as weights": ("regularize l2_sp on all { weight = 0.1 }\n", Small, two, 1),
    "a mask": ('mask magnitude on "first.weight" every 2 steps { density = 0.5 }\n', Small, two, 1),
    "observed logits": ('observe consistency on "first" every 2 steps { sigma = 0.5 }\n', Small, two, 2),
    "a rule that freezes": ('when step == 3 { freeze "first.*" }\n', Small, batch, 1),
    "a clause that begins": (PACE.replace("{", "from 2 steps {"), Small, batch, 2),
}  # fmt: skip


@pytest.mark.parametrize("what", SAME)
def test_numbers_are_bit_equal(what: str) -> None:
    text, model, given, recordings = SAME[what]
    want, _ = trained(OFF + text, model=model, given=given)
    got, notes = trained(ON + text, model=model, given=given)
    assert_equal(got.module, want.module)
    assert_replayed(got, recordings)
    assert len([note for note in notes if note.startswith(RECORDED)]) == recordings


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["whole", "autocast"])
def test_compiled_passes_are_replayed(
    dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Compiler, "backend", "aot_eager")
    monkeypatch.setattr(
        StandIn, "watches", False
    )  # torch's compiler compiles anew under what watches
    compiled = OFF.replace("9 steps", "9 steps, compile = inductor")
    found = []
    for text in (compiled, compiled.replace("inductor", "inductor, graphs = true")):
        torch._dynamo.reset()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            found.append(trained(text + GNS, 4, given=two)[0])
    assert_equal(found[1].module, found[0].module)
    assert_replayed(found[1])
    compiler = found[1].execution.compiler
    assert compiler is not None
    assert compiler.refused is None


def test_autocast_is_another_kind_of_pass() -> None:
    def casting(seed: int) -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=seed % 2 == 0)

    found = []
    for text in (OFF, ON):
        program = trainc.compile(HEAD + text, Small(), executor="graph")
        for seed in range(8):
            torch.manual_seed(seed)
            with casting(seed):
                program.step(two(seed))
        found.append(program)
    assert_equal(found[1].module, found[0].module)
    assert_replayed(found[1], 2)


def test_a_resumed_run_is_bit_equal() -> None:
    straight, later = (
        trainc.compile(HEAD + ON + GNS + PACE, Small(), executor="graph") for _ in range(2)
    )
    for seed in range(3):
        straight.step(two(seed))
    state, drawn = copy.deepcopy(straight.state_dict()), torch.get_rng_state()
    for program in (straight, later):
        if program is later:
            later.load_state_dict(state)
        torch.set_rng_state(drawn)
        for seed in range(3, 7):
            program.step(two(seed))
    assert_equal(later.module, straight.module)
    assert_replayed(later)
    assert_replayed(straight)


def test_evaluations_between_change_nothing() -> None:
    def evaluate(step: int, program: trainc.Program) -> None:
        program.evaluate(*batch(step + 30, rows=5))

    got, _ = trained(ON, model=Normed, change=evaluate)
    assert_equal(got.module, trained(OFF, model=Normed)[0].module)
    assert_replayed(got)


def test_what_a_pass_gave_is_not_written_over() -> None:
    kept: list[tuple[Tensor, Tensor]] = []
    program = trainc.compile(HEAD + ON + PACE, Small(), executor="graph")
    for seed in range(5):
        loss = program.graph(batch(seed))
        gradient = program.module.get_parameter("first.weight").grad
        assert gradient is not None
        kept += [(loss, loss.clone()), (gradient, gradient.clone())]
        program.update()
        program.module.zero_grad(set_to_none=True)
    assert_replayed(program)
    assert all(torch.equal(one, value) for one, value in kept)


def test_random_numbers_go_on_as_without() -> None:
    drawn = []
    for text in (OFF, ON):
        program = trainc.compile(HEAD + text, Small(), executor="graph")
        torch.manual_seed(0)
        for seed in range(4):
            program.step(batch(seed))
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_versions_of_buffers_count_what_replays_write() -> None:
    program, _ = trained(ON, model=Normed)
    mean = program.module.get_buffer("norm.running_mean")
    before = mean._version
    program.step(batch(9))
    assert mean._version > before


# what is recorded again, and what is not


def test_weights_that_moved_are_recorded_again() -> None:
    def move(step: int, program: trainc.Program) -> None:
        weight = program.module.get_parameter("first.weight")
        if step == 3:
            weight.data = weight.data.clone()

    got, notes = trained(ON, 7, Normed, change=move)
    assert_equal(got.module, trained(OFF, 7, Normed)[0].module)
    assert_replayed(got)
    (again,) = [note for note in notes if "is recorded again" in note]
    assert "moved in memory (1 of at most 8 times)" in again


def test_weights_that_move_again_and_again_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replayed_file, "LIMIT", 3)

    def move(step: int, program: trainc.Program) -> None:
        weight = program.module.get_parameter("first.weight")
        weight.data = weight.data.clone()

    got, notes = trained(ON, 7, change=move)
    assert_equal(got.module, trained(OFF, 7)[0].module)
    (note,) = notes
    assert "move in memory again and again. Write `graphs = false`" in note


def test_a_replaced_module_is_recorded_anew() -> None:
    def replace(step: int, program: trainc.Program) -> None:
        if step == 3:
            drop = nn.Dropout(0.5)
            program.module.drop = drop

    got, notes = trained(ON, 7, change=replace)
    assert_equal(got.module, trained(OFF, 7, change=replace)[0].module)
    assert_replayed(got)
    assert len([note for note in notes if note.startswith(RECORDED)]) == 2


def test_a_setting_of_torch_is_another_kind_of_pass() -> None:
    def switch(step: int, program: trainc.Program) -> None:
        torch.use_deterministic_algorithms(step >= 3)
        torch.backends.cudnn.allow_tf32 = step < 6

    allowed = torch.backends.cudnn.allow_tf32
    try:
        got, _ = trained(ON, 9, change=switch)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.allow_tf32 = allowed
    assert_replayed(got, 3)


BACKENDS: Any = torch.backends
SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Any]] = {
    "16-bit sums": (
        lambda: torch.backends.cuda.matmul.allow_fp16_accumulation,
        lambda value: setattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", value), True,
    ),
    "16-bit sums in attention": (
        torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed,
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp, True,
    ),
    "the precision of everything": (
        lambda: BACKENDS.fp32_precision, lambda value: setattr(BACKENDS, "fp32_precision", value), "tf32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SETTINGS)
def test_every_setting_that_chooses_kernels_is_told_from_others(what: str) -> None:
    get, change, other = SETTINGS[what]
    before, own = launch_settings(), get()
    try:
        change(other)
        assert launch_settings() != before
    finally:
        change(own)
    assert launch_settings() == before


def test_the_library_of_products_is_one_of_these_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    before = launch_settings()
    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", lambda: "another")
    assert launch_settings() != before


def test_further_kinds_than_the_limit_run_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replayed_file, "LIMIT", 2)

    def growing(seed: int) -> tuple[Tensor, Tensor]:
        return batch(seed, 2 + seed // 2)

    got, notes = trained(ON, 8, given=growing)
    assert_equal(got.module, trained(OFF, 8, given=growing)[0].module)
    assert_replayed(got, 2)
    (note,) = [note for note in notes if "for 2 kinds of passes" in note]
    assert "Pad batches to fewer lengths" in note


def test_a_loss_that_is_not_finite_is_recorded_later() -> None:
    def given(seed: int) -> tuple[Tensor, Tensor]:
        x, y = batch(seed)
        return (x * float("nan"), y) if seed == 1 else (x, y)

    run = ON.replace("graphs", "on_nan = skip, graphs")
    got, notes = trained(run, 5, given=given)
    want = trained(run.replace("true", "false"), 5, given=given)[0]
    assert_equal(got.module, want.module)
    assert_replayed(got)
    assert any(note.startswith(RECORDED) for note in notes)


# what fails


class Fails(StandIn):
    def record(self, run: Run) -> Recording:
        run()  # a capture that fails has called some of it
        torch.rand(3)
        raise RuntimeError("operation would make the legacy stream depend on a capturing one")


class NoMemory(StandIn):
    def record(self, run: Run) -> Recording:
        raise torch.OutOfMemoryError("CUDA out of memory")


class Stale(StandIn):
    """Replays what one number was while it recorded."""

    def replay_of(
        self, run: Run, outputs: Sequence[Tensor | None], recorded: Sequence[Launch]
    ) -> Callable[[], None]:
        def replay() -> None:
            torch.manual_seed(99)
            super(Stale, self).replay_of(run, outputs, recorded)()

        return replay


class DrawsNothing(StandIn):
    """Leaves the state of random numbers as it is."""

    def replay_of(
        self, run: Run, outputs: Sequence[Tensor | None], recorded: Sequence[Launch]
    ) -> Callable[[], None]:
        def replay() -> None:
            state = torch.get_rng_state()
            super(DrawsNothing, self).replay_of(run, outputs, recorded)()
            torch.set_rng_state(state)

        return replay


@pytest.mark.parametrize(
    ("recorder", "why"),
    [
        (Fails, "a pass cannot be recorded: operation would make"),
        (NoMemory, "a pass cannot be recorded: no memory is left for it"),
        (Stale, "a replay gives something else than the pass, "),
        (DrawsNothing, "a replay gives something else than the pass, the state of random numbers"),
    ],
)
def test_what_cannot_be_replayed_runs_as_usual_and_says_so_once(
    recorder: type[StandIn], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Replays, "recorder", recorder)
    got, notes = trained(ON, model=Normed, given=two)
    want, _ = trained(OFF, model=Normed, given=two)
    assert_equal(got.module, want.module)
    (note,) = notes
    assert note.startswith(f"no CUDA graph replays passes from now on: {why}")
    assert note.endswith("Write `graphs = false`")


def test_an_interrupt_while_a_pass_is_recorded_drops_all_recordings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They may draw from a generator's state that the device has no longer."""

    class Interrupted(StandIn):
        def record(self, run: Run) -> Recording:
            run()
            raise KeyboardInterrupt

    program, _ = trained(ON, 3, Normed)
    replays = program.execution.replays
    assert replays.recorded == 1
    program.step(batch(3, 5))
    assert replays._recorder is not None
    record = partial(Interrupted.record, Interrupted(torch.device("cpu")))
    with monkeypatch.context() as patch:
        patch.setattr(replays._recorder, "record", record)
        with pytest.raises(KeyboardInterrupt):
            program.step(batch(4, 5))
    assert replays.refused is None
    assert not replays._passes
    assert replays._recorder is None
    for seed in range(4):
        program.step(batch(seed))
    assert_replayed(program)


def test_memory_that_runs_out_beside_recordings_ends_them() -> None:
    program, _ = trained(ON, 3)
    (found,) = program.execution.replays._passes.values()

    def fails() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    found.recording = Recording(fails, ())
    with pytest.raises(torch.OutOfMemoryError):
        program.step(batch(3))
    program.step(batch(3))
    assert "memory ran out" in str(program.execution.replays.refused)
    assert not program.execution.replays._passes


def test_memory_that_runs_out_before_anything_is_recorded_ends_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program, _ = trained(ON, 1)

    def fails(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(RecordedPass, "place", fails)
        with pytest.raises(torch.OutOfMemoryError):
            program.step(batch(1))
    program.step(batch(1))
    assert_replayed(program)


class OwnGenerator(Small):
    def __init__(self) -> None:
        super().__init__()
        self.source = torch.Generator()


class Writes(Small):
    """Writes to what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(1.5))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (OwnGenerator, "the model has random generators of its own"),
        (Writes, "the pass writes to its input `inputs`"),
    ],
)
def test_what_stands_against_it_is_said_once(model: Callable[[], nn.Module], why: str) -> None:
    def fresh(seed: int) -> tuple[Tensor, Tensor]:
        return batch(seed)

    got, notes = trained(ON, model=model, given=fresh)
    assert_equal(got.module, trained(OFF, model=model, given=fresh)[0].module)
    (note,) = notes
    assert note.startswith(f"no CUDA graph replays these passes: {why}")
    assert not got.execution.replays._passes


# what is told


def test_on_the_cpu_a_note_says_that_there_are_no_cuda_graphs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    executors: tuple[Executor, ...] = ("auto", "graph")
    for executor in executors:
        got, (note,) = trained(ON, executor=executor)
        assert (
            note
            == "`graphs = true` has no effect: the model is on cpu, and only CUDA has CUDA graphs"
        )
        assert_equal(got.module, trained(OFF, executor=executor)[0].module)


def test_plain_specs_run_as_graphs_where_these_are_replayed() -> None:
    got, _ = trained(ON, executor="auto")
    assert_replayed(got)
    assert_equal(got.module, trained(OFF, executor="graph")[0].module)


def test_modules_that_run_are_said_with_the_reason() -> None:
    hooked: list[Any] = []

    def hook(step: int, program: trainc.Program) -> None:
        if not hooked:
            hooked.append(
                program.module.get_submodule("norm").register_forward_hook(lambda *_: None)
            )

    by = 'the program was compiled with `executor = "module"`'
    for change, executor, why in (
        (None, "module", by),
        (hook, "auto", "and a graph does not call hooks"),
    ):
        _, notes = trained(ON, change=change, executor=executor)  # type: ignore[arg-type]
        (note,) = [one for one in notes if one.startswith("no CUDA graph replays a pass")]
        assert why in note


def test_a_scaler_and_loops_of_ones_own_are_said() -> None:
    program, x = trainc.compile(HEAD + ON, Small()), batch()
    program.step(x, scaler=torch.amp.GradScaler("cpu"))
    assert "a GradScaler scales the loss" in program.report().notes[-1]
    program = trainc.compile(HEAD + ON, Small())
    program.loss(x).backward()
    program.update()
    assert "Call `program.step(batch)`" in program.report().notes[-1]
    program = trainc.compile(HEAD + ON, Small())
    with program.micro_batch(len(x[0])):
        loss = F.cross_entropy(program.module(x[0]), x[1])
    program.backward(loss)
    program.update()
    assert "Call `program.step(batch)`" in program.report().notes[-1]


def test_the_plan_says_what_is_replayed() -> None:
    text = str(trainc.compile(HEAD + ON + GNS, Small()).plan)
    assert "CUDA graphs replay the passes of the step graph on CUDA" in text
    assert "masks keep" not in text
    mask = 'mask sift on "first.weight" { density = 0.5 }\n'
    assert "gradients of which masks keep a part" in str(
        trainc.compile(HEAD + ON + mask, Small()).plan
    )
    assert "graphs" not in trainc.compile(HEAD + OFF, Small()).plan.settings


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ("device = cpu", "`graphs` has no effect with `device = cpu`"),
        ("device = mps", "`graphs` has no effect with `device = mps`"),
        ("precision = fp16", "`graphs` has no effect with `precision = fp16`"),
        (
            'checkpoint_activations = "norm"',
            "and none runs: activation checkpoints run modules again",
        ),
    ],
)
def test_what_the_spec_itself_keeps_from_it_is_a_warning_at_the_field(
    fields: str, why: str
) -> None:
    text = HEAD + ON.replace("graphs = true", f"{fields}, graphs = true")
    (warning,) = trainc.plan(text, Small()).warnings
    assert why in warning.message
    assert warning.severity == "warning"
    assert warning.span is not None
    assert text[warning.span.start : warning.span.end] == "true"


def test_a_run_warns_where_the_machine_has_no_cuda_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from trainc.compiler.driver.train import train

    path = tmp_path / "spec.train"
    path.write_text(
        """train 1
model "examples.models:gpt" { layers = 1, width = 16, heads = 2, context = 16 }
data "examples.data:stdlib" { batch = 4 samples, context = 16, limit_bytes = 30_000 }
loss cross_entropy
optimizer sgd { lr = 0.1 }
run { length = 2 steps, eval_batches = 1, graphs = true }
"""
    )
    train(path, tmp_path / "run", plain=True, device="cpu")
    assert (
        "`graphs` has no effect: the run is on cpu, and only CUDA has CUDA graphs"
        in capsys.readouterr().err
    )
