"""The runner checks every pass, reports what it did and leaves out what it is told to."""

import re
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from tests.compiler.passes.step_cases import (
    check_against_eager,
    gpt,
    norm_sites,
    paced,
    step_of,
    tokens,
)
from trainc.compiler.errors import PassBug, SiteMissing
from trainc.compiler.graph.forward_graph import ForwardGraph
from trainc.compiler.method.sites import Rewrite
from trainc.compiler.passes.add_noise import AddNoise
from trainc.compiler.passes.fuse_norms import FuseNorms
from trainc.compiler.passes.instrument_norms import InstrumentNorms
from trainc.compiler.passes.pass_base import Pass
from trainc.compiler.passes.pipeline import PIPELINE, check_names, check_order


@dataclass(frozen=True)
class WrongShape(FuseNorms):
    name: ClassVar[str] = "wrong_shape"

    def run(self, forward: ForwardGraph, rewrite: Rewrite) -> list[str]:
        with forward.graph.inserting_before(forward.output):
            logits = forward.result("logits")
            wide = forward.graph.call_function(torch.ops.aten.unsqueeze.default, (logits, 0))
        forward.set_results({"data_loss": forward.result("data_loss"), "logits": wide})
        return [site.module for site in rewrite.norms]


@dataclass(frozen=True)
class WrongOrder(FuseNorms):
    name: ClassVar[str] = "wrong_order"

    def run(self, forward: ForwardGraph, rewrite: Rewrite) -> list[str]:
        first = next(iter(forward.calls()))
        last = forward.result("logits")
        with forward.graph.inserting_before(first):
            early = forward.graph.call_function(torch.ops.aten.neg.default, (last,))
        forward.set_results({"data_loss": forward.result("data_loss"), "logits": early})
        return [site.module for site in rewrite.norms]


@dataclass(frozen=True)
class Forgets(FuseNorms):
    name: ClassVar[str] = "forgets"

    def run(self, forward: ForwardGraph, rewrite: Rewrite) -> list[str]:
        return [site.module for site in rewrite.norms][1:]


@dataclass(frozen=True)
class Invents(FuseNorms):
    name: ClassVar[str] = "invents"

    def run(self, forward: ForwardGraph, rewrite: Rewrite) -> list[str]:
        return [*super().run(forward, rewrite), "more"]


@dataclass(frozen=True)
class Raises(FuseNorms):
    name: ClassVar[str] = "raises"

    def run(self, forward: ForwardGraph, rewrite: Rewrite) -> list[str]:
        raise AssertionError("not today")


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (WrongShape(), r"`logits` was .*3, 8, 64.* and is .*1, 3, 8, 64"),
        (WrongOrder(), "before it has been defined|used before"),
        (Invents(), "had to serve"),
        (Raises(), "AssertionError: not today"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_broken_pass_is_caught_and_named_with_the_graph_before_it(
    broken: Pass, words: str
) -> None:
    model = gpt()
    with pytest.raises(PassBug) as bug:
        step_of(model, tokens(), Rewrite(norms=norm_sites(model)), passes=(broken,))
    assert bug.value.pass_name == broken.name
    assert re.search(words, str(bug.value))
    assert "aten.layer_norm.default" in bug.value.before
    assert bug.value.before in str(bug.value)


def test_a_pass_that_forgets_a_site_is_caught() -> None:
    model = gpt()
    with pytest.raises(SiteMissing) as missing:
        step_of(model, tokens(), Rewrite(norms=norm_sites(model)), passes=(Forgets(),))
    assert missing.value.missing == ("blocks.0.ln1",)


def test_passes_without_work_do_not_run() -> None:
    step = step_of(gpt(), tokens(), Rewrite())
    assert [(r.name, r.ran, r.diff) for r in step.reports] == [
        (p.name, False, "") for p in PIPELINE
    ]


def test_reports_tell_what_changed() -> None:
    model = gpt()
    step = step_of(model, tokens(), Rewrite(norms=norm_sites(model)))
    reports = {report.name: report for report in step.reports}
    fuse, sums = reports["fuse_norms"], reports["fuse_residual_adds"]
    instrument, pairing = reports["instrument_norms"], reports["fuse_loss"]
    head = reports["fuse_head"]
    assert len(fuse.sites) == len(instrument.sites) == 5
    assert fuse.unserved == ()
    assert not pairing.ran
    assert not head.ran
    assert (len(sums.sites), sums.diff) == (5, "")  # a CPU gains nothing
    assert fuse.seconds > 0
    removed = [line for line in fuse.diff.splitlines() if line.startswith("-")]
    assert sum("aten.layer_norm.default" in line for line in removed) == 5
    assert "+input probe_blocks_0_ln1: f64[3, 2]" in instrument.diff
    assert instrument.nodes_after == instrument.nodes_before + 5


@pytest.mark.parametrize("name", ["fuse_norms", "instrument_norms"])
def test_leaving_a_pass_out_leaves_its_sites_unserved(name: str) -> None:
    model, batch = gpt(), tokens()
    sites = norm_sites(model)
    step = step_of(model, batch, Rewrite(norms=sites), without=frozenset([name]))
    reports = {report.name: report for report in step.reports}
    assert not reports[name].ran
    assert set(reports[name].unserved) == {site.module for site in sites}
    assert set(reports["instrument_norms"].unserved) == {site.module for site in sites}
    out = step.run(batch, {})
    assert out.probes == {}
    check_against_eager(model, batch, out)


@pytest.mark.parametrize("name", ["share_dropout", "add_noise", "pair_late", "fuse_loss"])
def test_dropout_noise_and_pairing_are_left_out_one_by_one(name: str) -> None:
    model = gpt(dropout=0.1)
    rewrite, scalars = paced(model)
    step = step_of(model, tokens(), rewrite, scalars=scalars, without=frozenset([name]))
    changed = {report.name for report in step.reports if report.diff}
    assert changed == {"share_dropout", "add_noise", "pair_late", "fuse_loss"} - {name}


def test_leaving_out_a_pass_that_does_not_exist_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ValueError, match="did you mean `fuse_norms`"):
        step_of(gpt(), tokens(), Rewrite(), without=frozenset(["fuse_norm"]))
    with pytest.raises(ValueError, match="the passes are fuse_norms"):
        check_names(frozenset(["zzz"]))


def test_the_pipeline_is_in_an_order_its_passes_allow() -> None:
    check_order(PIPELINE)
    with pytest.raises(ValueError, match="must come"):
        check_order((InstrumentNorms(), FuseNorms()))
    with pytest.raises(ValueError, match="must come"):
        check_order((AddNoise(), FuseNorms()))


def test_every_pass_says_what_it_is_for() -> None:
    assert len({step.name for step in PIPELINE}) == len(PIPELINE)
    for step in PIPELINE:
        assert step.purpose
        assert step.__doc__
