"""Fused norms: the operators and the sums before them, on either executor, with the numbers of the layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainc
from examples.models import gpt
from tests.conformance import in_double, tokens
from trainc.compiler.constructs.normalize.fuse import Fuse
from trainc.compiler.execution import capture
from trainc.compiler.execution.compiled import Compiler
from trainc.compiler.passes import fuse_norms, pipeline
from trainc.compiler.passes.fuse_residual_adds import FuseResidualAdds

BASE = "loss cross_entropy optimizer sgd { lr = 0.2 } run { length = 40 steps, seed = 3 } "


def model(norm: Any = "layer") -> nn.Module:
    torch.manual_seed(0)
    return gpt(1, 16, 2, 8, 24, norm=norm).double()


def targets(program: Any) -> list[str]:
    """Return the operators of trainc in a program's graph, by the order in which they stand."""
    nodes = program.graph.graph.nodes
    return [str(n.target) for n in nodes if str(n.target).startswith("trainc.")]


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_both_executors_compute_what_the_layers_do(norm: str) -> None:
    programs = [
        trainc.compile(BASE + clause, model(norm), executor=executor)  # type: ignore[arg-type]
        for clause, executor in (("", "module"), ("normalize fuse", "graph"), ("normalize fuse", "module"))
    ]  # fmt: skip
    for seed in range(2):
        losses = [program.step(in_double(tokens(seed)))["loss"] for program in programs]
        assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-12)
    found = targets(programs[1])
    assert found.count(f"trainc.{norm}_norm.default") == 3


def test_compiled_for_cuda_only_norms_that_are_measured_are_operators(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A compiler cannot look into operators; here it is one for a CPU."""
    monkeypatch.setattr(fuse_norms, "COMPILED_ON", "cpu")
    monkeypatch.setattr(Compiler, "backend", "eager")
    compiled = BASE.replace("seed = 3", "seed = 3, compile = inductor")
    gns = 'noise_scale gns on "blocks.0.ln1" { smooth = 2 steps }'
    texts = [compiled + "normalize fuse", compiled + "normalize fuse " + gns, BASE]
    programs = [trainc.compile(text, model(), executor="graph") for text in texts]
    losses = [program.step(in_double(tokens(0)))["loss"] for program in programs]
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-12)
    assert targets(programs[0]) == []
    assert targets(programs[1]) == [
        "trainc.layer_norm.default",
        "trainc.layer_norm_backward.default",
    ]
    notes = [" ".join(program.graph.notes) for program in programs]
    assert "the compiler fuses 3 norms itself, which nothing measures: `blocks.0.ln1`" in notes[0]
    assert "the compiler fuses 2 norms itself, which nothing measures: `blocks.0.ln2`" in notes[1]
    assert "compiler" not in notes[2]


def test_the_sum_before_a_norm_is_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the graph stays as it is, unless the pass is told that it may not."""
    always = tuple(
        FuseResidualAdds(always=True) if isinstance(one, FuseResidualAdds) else one
        for one in pipeline.PIPELINE
    )
    known: Any = capture.capture.__kwdefaults__
    monkeypatch.setattr(capture.capture, "__kwdefaults__", {**known, "passes": always})
    programs = [trainc.compile(BASE + c, model()) for c in ("normalize fuse", "")]
    losses = [program.step(in_double(tokens(0)))["loss"] for program in programs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert targets(programs[0]).count("trainc.add_layer_norm.default") == 2
    notes = " ".join(programs[0].graph.notes)
    assert "2 residual sums are computed by the norms that read them: `blocks.0.ln2`" in notes


def test_norms_that_are_measured_stay_measured() -> None:
    gns = "noise_scale gns on type(LayerNorm) { smooth = 2 steps } "
    programs = [trainc.compile(BASE + c, model()) for c in (gns + "normalize fuse", gns)]
    for seed in range(2):
        one, two = (program.step(in_double(tokens(seed))) for program in programs)
        assert one == two
    assert programs[0].signals == programs[1].signals


def test_the_plan_lists_what_is_fused() -> None:
    rows = trainc.plan(BASE + 'normalize fuse on "blocks.*.ln1"', model()).to_json()["sites"]
    assert [(r["site"], r["operator"], r["pass"]) for r in rows] == [
        ("blocks.0.ln1", "layer_norm", "fuse_norms")
    ]


class Other(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_what_is_no_such_norm_is_an_error() -> None:
    plain = nn.Sequential(nn.Linear(4, 4), Other(4), nn.BatchNorm1d(4))
    with pytest.raises(trainc.SpecError, match=r"`1` \(Other\) does not compute what LayerNorm"):
        trainc.plan(BASE + 'normalize fuse on "1"', plain)
    with pytest.raises(trainc.SpecError, match="`2` is a BatchNorm1d; operators are for"):
        trainc.plan(BASE + 'normalize fuse on "2"', plain)
    with pytest.raises(trainc.SpecError, match="norms are fused in the whole run"):
        trainc.plan(BASE + "normalize fuse from 3 steps", model())


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return sums and their norms, by a captured graph and by definition."""
    torch.manual_seed(0)
    rows = torch.randn(6, 5, 4, dtype=torch.float64)
    text = BASE.replace("cross_entropy", "mse") + 'normalize fuse on "1"'
    found, wanted = {}, {}
    norms: tuple[tuple[Any, bool], ...] = (nn.LayerNorm(4), False), (nn.RMSNorm(4, eps=1e-6), True)
    for layer, rms in norms:
        for p in layer.double().parameters():
            p.data.add_(torch.randn_like(p))
        linear = nn.Linear(4, 4).double()
        x, bias = linear(rows).detach(), None if rms else layer.bias.detach()
        own = layer.weight.detach(), bias, layer.eps
        _, want = Fuse.reference(x, torch.zeros_like(x), *own, rms=rms)
        taken: list[Tensor] = []
        layer.register_forward_hook(lambda *given, taken=taken: taken.append(given[2].detach()))
        program = trainc.compile(text, nn.Sequential(linear, layer), executor="module")
        program.step((rows, torch.zeros_like(rows)))
        name = type(layer).__name__
        found[name], wanted[name] = taken[-1], want
    return found, wanted
