"""Batches of several shapes: a graph for the first shape, then one graph for the others."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainc
from examples import models
from tests.compiler.passes.step_cases import gpt, norm_sites, paced, step_of, tokens
from trainc.compiler.driver.saved_program import LoadError
from trainc.compiler.errors import GraphRefused
from trainc.compiler.execution.capture import CaptureFailed, capture
from trainc.compiler.execution.execution import Execution
from trainc.compiler.graph.interface import describe_batch, shapes_of
from trainc.compiler.graph.listing import listing
from trainc.compiler.graph.sizes import changing_axes, condition
from trainc.compiler.graph.step_graph import StepGraph
from trainc.compiler.method.sites import Rewrite
from trainc.compiler.method.term import Term
from trainc.compiler.passes.add_noise import AddNoise
from trainc.compiler.passes.fuse_head import FuseHead
from trainc.compiler.passes.fuse_loss import FuseLoss
from trainc.compiler.passes.fuse_norms import FuseNorms
from trainc.compiler.passes.fuse_residual_adds import FuseResidualAdds
from trainc.compiler.passes.instrument_norms import InstrumentNorms
from trainc.compiler.per_example.micro_batch import MicroBatchSlice
from trainc.compiler.program.save import FORMAT
from trainc.runtime.data.batch import Batch
from trainc.runtime.storage.foreign_files import MANIFEST, write_manifest

BASE = "train 1\nloss cross_entropy\noptimizer sgd { lr = 0.1 }\n"
MICRO_BATCHES = BASE + "noise_scale gns on %s { smooth = 2 steps, method = micro_batch }\n"
NOISE_SCALE = BASE + "noise_scale gns on %s { smooth = 2 steps }\n"
PACE = BASE + 'regularize pace on "%s" { sigma = 0.2, weight = 0.5 }\n'


LORA = BASE + 'adapt lora on "blocks.*.attn.**" & type(Linear) { rank = 2, alpha = 4 }\n'


def ids(examples: int, length: int) -> Batch:
    return torch.randint(32, (examples, length)), torch.randint(32, (examples, length))


def images(examples: int, _: int) -> Batch:
    return torch.randn(examples, 1, 8, 8), torch.randint(10, (examples,))


def compiled(spec: str, make: Callable[[], nn.Module], **options: Any) -> trainc.Program:
    torch.manual_seed(0)
    return trainc.compile(spec, make().train(), **options)


def graphs_of(program: trainc.Program) -> list[tuple[int, int]]:
    """Count the graphs of one shape and those of many, for each state of the program."""
    kept = program.execution.graphs._graphs.values()
    return [(len(graphs.static), len(graphs.open)) for graphs in kept]


def step_both(program: trainc.Program, modules: trainc.Program, batch: Batch) -> None:
    """Step by both executors, and check that weights and signals are the same."""
    found = []
    for one in (program, modules):
        torch.manual_seed(1)
        one.step(batch)
        found.append(dict(one.signals))
    assert program.graph_refused is None
    for got, want in zip(program.module.parameters(), modules.module.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-7, nan_ok=True)


# the axes and the conditions


def test_axes_that_changed_together_share_a_name() -> None:
    seen: list[Any] = [
        {"inputs": (4, 7, 16), "mask": (4, 1, 7), "positions": (7,), "targets": (4,)},
        {"inputs": (4, 9, 16), "mask": (4, 1, 9), "positions": (9,), "targets": (4,)},
    ]
    assert changing_axes(seen) == {
        "inputs": {0: "B", 1: "S1"},
        "mask": {0: "B", 2: "S1"},
        "positions": {0: "S1"},
        "targets": {0: "B"},
    }


def test_a_size_of_one_and_sizes_that_are_equal_now_stay_numbers() -> None:
    first = {"inputs": (4, 7), "targets": (4, 7)}
    assert changing_axes([first, {"inputs": (1, 8), "targets": (1, 8)}]) == {
        "inputs": {1: "S1"},
        "targets": {1: "S1"},
    }
    assert changing_axes([first, {"inputs": (8, 8), "targets": (8, 8)}]) == {}


def test_a_condition_is_read_without_running_code() -> None:
    sizes = {"B": 4, "S1": 6}
    for text in (
        "B*S1 <= 24 and not (S1 % 4 == 0)",
        "max(B, S1) - B // 3 == 5",
        "-B + S1 > 1 or B != 4",
    ):
        assert condition(text)(sizes) is True
    assert condition("B < S1 and S1 < 6")(sizes) is False
    for text in (
        "print(B)",
        "B.real",
        "B ** 9",
        "B if B else S1",
        "[B]",
        "B <",
        "1.5 < B",
        "B < S1 < 9",
        "'a' < B",
    ):
        with pytest.raises(ValueError, match="is not a condition on sizes"):
            condition(text)


# one graph for many shapes


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    inner = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(32, 16), inner, nn.Linear(16, 32))


def masked() -> nn.Module:
    inner = nn.Linear(16, 16), nn.Dropout(0.3), nn.Linear(16, 32)
    return nn.Sequential(nn.Embedding(32, 16), *inner)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Batch]]] = {
    "gpt": (lambda: models.gpt(1, 16, 2, 16, 32), ids),
    "dropout": (lambda: models.gpt(1, 16, 2, 16, 32, dropout=0.2), ids),
    "masks": (masked, ids),
    "tied": (lambda: models.gpt(1, 16, 2, 16, 32, tied=True), ids),
    "rms": (lambda: models.gpt(1, 16, 2, 16, 32, norm="rms"), ids),
    "vit": (lambda: models.vit(8, 4, 1, 10, 1, 16, 2), images),
    "resnet": (lambda: models.resnet(width=4, stages=1), images),
    "encoder": (encoder, ids),
}
CASES = {
    "gpt": (LORA, BASE, NOISE_SCALE % "all", PACE % "blocks.*.attn.proj"),
    "dropout": (BASE + "regularize r_drop { weight = 0.5 }\n",),
    "masks": (PACE % "1",),
    "tied": (NOISE_SCALE % "type(LayerNorm)", BASE + "regularize distill { weight = 0.5 }\n"),
    "rms": (NOISE_SCALE % "type(RMSNorm)" + "regularize r_drop { weight = 0.5 }\n",),
    "vit": (BASE, NOISE_SCALE % "all", PACE % "blocks.*.attn.proj"),
    "resnet": (BASE, MICRO_BATCHES % "type(Linear)"),
    "encoder": (BASE, NOISE_SCALE % "type(LayerNorm)"),
}


@pytest.mark.parametrize(("name", "spec"), [(n, spec) for n, all in CASES.items() for spec in all])
def test_two_captures_serve_every_shape(name: str, spec: str) -> None:
    make, data = MODELS[name]
    program, modules = (compiled(spec, make, executor=e) for e in ("graph", "module"))
    for examples, length in ((4, 5), (3, 6), (6, 7), (2, 9), (7, 7), (4, 8)):
        step_both(program, modules, data(examples, length))
    assert graphs_of(program) == [(1, 1)]


def test_the_first_shape_keeps_a_graph_without_open_sizes() -> None:
    program = compiled(BASE, MODELS["gpt"][0], executor="graph")
    first = ids(4, 5)
    for batch in (first, ids(4, 6), ids(4, 7), first):
        program.step(batch)
    graph = program.execution.capture(first)
    assert not graph.is_open
    assert "sym_size" not in listing(graph.graph)
    assert graphs_of(program) == [(1, 1)]


def test_the_last_micro_batch_of_a_step_may_be_smaller() -> None:
    make, data = MODELS["gpt"]
    program = compiled(NOISE_SCALE % "all", make)
    modules = compiled(NOISE_SCALE % "all", make, executor="module")
    for sizes in ((4, 3), (4, 4, 2), (4, 3)):
        parts = [data(size, 6) for size in sizes]
        for one in (program, modules):
            one.step(parts)
        assert program.graph_refused is None
        for got, want in zip(program.module.parameters(), modules.module.parameters(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    assert graphs_of(program) == [(1, 1)]


def test_one_example_and_equal_sizes_take_graphs_of_their_own() -> None:
    make, data = MODELS["gpt"]
    program, modules = (compiled(BASE, make, executor=e) for e in ("graph", "module"))
    for shape, graphs in (
        ((4, 5), (1, 0)),
        ((8, 8), (2, 0)),  # equal at a capture: it would take the two for one
        ((3, 7), (2, 1)),
        ((9, 9), (2, 1)),
        ((1, 7), (2, 2)),  # one example, any length
        ((1, 9), (2, 2)),
        ((5, 6), (2, 2)),
    ):
        step_both(program, modules, data(*shape))
        assert graphs_of(program) == [graphs]


@pytest.mark.parametrize("packing", [dict, list, tuple])
def test_inputs_of_several_tensors_share_their_sizes(packing: Any) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.position = nn.Embedding(32, 8), nn.Embedding(16, 8)
            self.head = nn.Linear(8, 32)

        def forward(self, ids: Tensor, at: Tensor, mask: Tensor) -> Tensor:
            out: Tensor = self.head(self.embed(ids) * mask.unsqueeze(-1) + self.position(at))
            return out

    def data(examples: int, length: int) -> Batch:
        x, y = ids(examples, length)
        given = {"ids": x, "at": torch.arange(length), "mask": torch.rand(x.shape)}
        return (given if packing is dict else packing(given.values())), y

    spec = NOISE_SCALE % "type(Linear)"
    program, modules = (compiled(spec, Two, executor=e) for e in ("graph", "module"))
    for shape in ((4, 5), (4, 6), (3, 7)):
        step_both(program, modules, data(*shape))
    assert graphs_of(program) == [(1, 1)]


# conditions


class Branches(nn.Module):
    """Does something else for long inputs, and takes at most 12 positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 8), nn.Linear(8, 32)
        self.position = nn.Parameter(torch.randn(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x) + self.position[: x.shape[1]]
        out: Tensor = self.head(y if x.shape[1] <= 8 else 2 * y)
        return out


def test_a_batch_that_breaks_a_condition_takes_another_graph(tmp_path: Path) -> None:
    program, modules = (compiled(BASE, Branches, executor=e) for e in ("graph", "module"))
    for length, graphs in (
        (5, (1, 0)),
        (6, (1, 1)),
        (8, (1, 1)),
        (9, (1, 2)),
        (10, (1, 2)),
        (7, (1, 2)),
    ):
        step_both(program, modules, ids(4, length))
        assert graphs_of(program) == [graphs]
    (kept,) = program.execution.graphs._graphs.values()
    short, long = kept.open
    assert short.accepts(ids(2, 8))
    assert not short.accepts(ids(2, 9))
    assert long.accepts(ids(2, 12))
    assert not long.accepts(ids(2, 13))
    with pytest.raises(ValueError, match=r"expected S1 <= 12, got \{'B': 2, 'S1': 13\}"):
        long.run(ids(2, 13), {})
    with pytest.raises(
        ValueError, match=r"expected inputs int64\[B, S1\] on cpu, got inputs int64\[1, 9\]"
    ):
        long.run(ids(1, 9), {})


def test_ghost_batches_keep_their_condition() -> None:
    make, data = MODELS["resnet"]
    spec = BASE + "normalize ghost_batch on type(BatchNorm2d) { size = 2 }\n"
    program, modules = (compiled(spec, make, executor=e) for e in ("graph", "module"))
    for examples in (4, 6, 8, 10):
        step_both(program, modules, data(examples, 0))
    assert graphs_of(program) == [(1, 1)]
    (kept,) = program.execution.graphs._graphs.values()
    assert [kept.open[0].accepts(data(n, 0)) for n in (12, 7, 2)] == [True, False, False]


def test_conditions_that_come_up_after_export_are_kept() -> None:
    model, batches = gpt(), [tokens(3, 5), tokens(4, 7)]

    def value(forward: Any) -> Tensor:
        rows = forward.targets.shape[0]
        square: Tensor = forward.logits.square().mean()
        return square if rows > 3 else 3 * square

    rewrite = Rewrite()
    rewrite.terms["size"] = Term("size", value, "examples")
    step = step_of(model, batches[1], rewrite, axes=axes_of(*batches))
    assert step.accepts(tokens(5, 6))
    assert not step.accepts(tokens(3, 5))


def axes_of(*batches: Batch) -> Any:
    return changing_axes([shapes_of(describe_batch(batch)[1]) for batch in batches])


def test_a_size_that_is_fixed_after_export_is_refused() -> None:
    model, batches = gpt(), [tokens(3, 5), tokens(4, 7)]
    rewrite = Rewrite()
    rewrite.terms["size"] = Term(
        "size", lambda f: f.logits.sum() / int(f.targets.shape[0]), "examples"
    )
    with pytest.raises(CaptureFailed, match="the size `B` is fixed to 4"):
        step_of(model, batches[1], rewrite, axes=axes_of(*batches))


# what takes one shape only


class Fixed(nn.Module):
    """Asks for the length as a number, which fixes it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 8), nn.Linear(8, 32)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.ones(int(x.shape[1]), 1)
        out: Tensor = self.head(self.embed(x) * scale)
        return out / int(x.shape[0])


def test_a_model_that_fixes_its_sizes_has_a_graph_for_each_shape(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = count_captures(monkeypatch)
    program, modules = (compiled(BASE, Fixed, executor=e) for e in ("graph", "module"))
    for length in (5, 6, 7, 8):
        step_both(program, modules, ids(4, length))
    assert graphs_of(program) == [(4, 0)]
    assert tried == [False, True, False, True, False, False]
    (graphs,) = program.execution.graphs._graphs.values()
    notes = [graph.notes for graph in graphs.static.values()]
    assert ["cannot be captured" in " ".join(found) for found in notes] == [
        False,
        True,
        True,
        False,
    ]


def count_captures(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Record of each capture whether it leaves axes open."""
    tried: list[bool] = []

    def counted(*args: Any, **kwargs: Any) -> StepGraph:
        tried.append(bool(kwargs["axes"]))
        return capture(*args, **kwargs)

    monkeypatch.setattr("trainc.compiler.execution.graph_cache.capture", counted)
    return tried


def test_a_graph_of_the_second_front_end_is_for_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    class Picky(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
                raise TypeError("not like this")
            return super().forward(x)

    tried = count_captures(monkeypatch)
    program = compiled(BASE, lambda: Picky(4, 3), executor="graph")
    for examples in (3, 4, 5):
        program.step((torch.randn(examples, 4), torch.randint(3, (examples,))))
    assert graphs_of(program) == [(3, 0)]
    assert tried == [False] * 3


def test_a_graph_for_many_shapes_that_fails_its_trial_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attempt = Execution._try

    def refuse(self: Execution, batch: Batch, where: MicroBatchSlice, graph: StepGraph) -> None:
        if graph.is_open:
            raise GraphRefused("no")
        attempt(self, batch, where, graph)

    monkeypatch.setattr(Execution, "_try", refuse)
    tried = count_captures(monkeypatch)
    program = compiled(NOISE_SCALE % "all", MODELS["gpt"][0])
    for length in (5, 6, 7):
        program.step(ids(4, length))
        assert program.graph_refused is None
    assert graphs_of(program) == [(3, 0)]
    assert tried == [False, True, False, False]


# saving


def test_a_saved_graph_for_many_shapes_takes_them_when_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = NOISE_SCALE % "type(Linear)"
    program = compiled(spec, Branches, executor="graph")
    for length in (5, 6, 5):
        program.step(ids(4, length))
    program.save(tmp_path)
    loaded = trainc.load(tmp_path, Branches(), executor="graph")
    modules = trainc.load(tmp_path, Branches(), executor="module")
    tried = count_captures(monkeypatch)
    for shape in ((4, 7), (3, 8), (2, 5)):
        step_both(loaded, modules, ids(*shape))
    assert tried == []
    step_both(loaded, modules, ids(4, 9))
    assert tried == [True]  # it does something else for 9 positions


def test_a_damaged_condition_is_an_error(tmp_path: Path) -> None:
    program = compiled(BASE, Branches, executor="graph")
    for length in (5, 6):
        program.step(ids(4, length))
    program.save(tmp_path)
    file = tmp_path / "graph.json"
    data = json.loads(file.read_text())
    assert data["conditions"] == ["S1 <= 12", "S1 <= 8"]
    for text in ("S2 <= 8", "open('x')"):
        file.write_text(json.dumps({**data, "conditions": [text]}))
        names = json.loads((tmp_path / MANIFEST).read_text())["files"]
        write_manifest(tmp_path, names, {"format": FORMAT})
        with pytest.raises(LoadError, match="is not a condition on the sizes"):
            trainc.load(tmp_path, Branches())


# passes that a CPU leaves out, and what they say


def test_fused_heads_and_residual_sums_take_open_sizes() -> None:
    model, batches = gpt(), [tokens(3, 5), tokens(4, 7), tokens(2, 3)]
    rewrite, scalars = paced(model)
    rewrite.hooks = rewrite.hooks[:1]
    passes = (AddNoise(), FuseLoss(), FuseHead(always=True))
    options: dict[str, Any] = {"scalars": scalars, "passes": passes}
    norms = (FuseNorms(), FuseResidualAdds(always=True), InstrumentNorms())
    for changes, given in (
        ((rewrite,), options),
        ((Rewrite(norms=norm_sites(model)),), {"passes": norms}),
    ):
        step = step_of(model, batches[1], *changes, axes=axes_of(*batches[:2]), **given)
        for batch in batches[1:]:
            want = step_of(model, batch, *changes, **given).run(batch, scalars)
            got = step.run(batch, scalars)
            torch.testing.assert_close(got.grads, want.grads, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(got.probes, want.probes, rtol=1e-12, atol=1e-14)
        names = [str(node.target) for node in step.graph.nodes]
        assert any("linear_cross_entropy" in n or "add_layer_norm" in n for n in names)


def test_what_a_pass_did_names_the_open_sizes() -> None:
    model, batches = gpt(), [tokens(3, 5), tokens(4, 7)]
    step = step_of(model, batches[1], Rewrite(norms=norm_sites(model)), axes=axes_of(*batches))
    diff = next(report.diff for report in step.reports if report.name == "fuse_norms")
    assert "f64[B, S1, 16] = aten.layer_norm.default" in diff
