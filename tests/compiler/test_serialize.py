"""Graphs go to JSON and back unchanged, and nothing but known operators comes back."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from examples import models
from tests.compiler.passes.step_cases import noise_site, paired, step_of
from trainc.compiler.execution.capture import capture
from trainc.compiler.graph.listing import listing
from trainc.compiler.graph.serialize import (
    GraphFormatError,
    graph_from_json,
    graph_to_json,
    step_from_json,
    step_to_json,
)
from trainc.compiler.graph.step_graph import StepGraph
from trainc.compiler.method.sites import NormSite, Rewrite
from trainc.compiler.method.term import Forward, Term
from trainc.kernels.noise.philox import pack_key
from trainc.runtime.data.batch import Batch

aten = torch.ops.aten


class SmoothedCrossEntropy:
    name = "cross_entropy"
    ignore_index = -100
    label_smoothing = 0.1

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        flat = logits.reshape(-1, logits.shape[-1])
        return F.cross_entropy(flat, targets.reshape(-1), label_smoothing=self.label_smoothing)


@pytest.fixture(scope="module")
def full() -> tuple[Callable[[], nn.Module], StepGraph, Batch, dict[str, Tensor]]:
    """A step with every kind of pass, a term with a constant, and dropout."""
    torch.set_num_threads(1)

    def make() -> nn.Module:
        torch.manual_seed(0)
        return models.gpt(1, 16, 2, 8, 32, dropout=0.1).train()

    model = make()
    names = ["blocks.0.ln1", "blocks.0.ln2", "ln_f"]
    rewrite = Rewrite(
        norms=[NormSite(n, "layer", f"{n}.weight", f"{n}.bias", 1e-5) for n in names],
        hooks=[noise_site("blocks.0.mlp.fc", 0)],
    )
    scalars = {
        "key": pack_key(1, 2),
        "loss_weight": torch.tensor(1.0),
        "sigma:blocks.0.mlp.fc": torch.tensor(0.3),
        "weight:consistency": torch.tensor(0.5),
    }
    origin = model.get_parameter("head.weight").detach() + 1

    def pull(forward: Forward) -> Tensor:
        gap: Tensor = forward.parameters["head.weight"] - origin
        return gap.square().sum()

    paired(rewrite, "kl").terms["pull"] = Term("pull", pull, "parameters")

    batch = (torch.randint(32, (2, 8)), torch.randint(32, (2, 8)))
    step = step_of(
        model,
        batch,
        rewrite,
        loss=SmoothedCrossEntropy(),
        scalars=scalars,
    )
    return make, step, batch, scalars


def test_a_step_survives_json_and_runs_bit_for_bit(full: Any) -> None:
    make, step, batch, scalars = full
    text = json.dumps(step_to_json(step))
    model = make()
    constants = step.constant_tensors()
    assert len(constants) == 1
    other = step_from_json(json.loads(text), model, constants)
    assert json.dumps(step_to_json(other)) == text
    assert other.code == step.code
    assert other.interface == step.interface
    assert other.get_parameter("head.weight") is model.head.weight
    outs = []
    for graph in (step, other):
        torch.manual_seed(3)
        outs.append(graph.run(batch, scalars))
    a, b = outs
    assert torch.equal(a.total, b.total)
    for got, want in ((a.grads, b.grads), (a.probes, b.probes)):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_step_needs_its_constants_and_its_model(full: Any) -> None:
    make, step, _, _ = full
    data = step_to_json(step)
    with pytest.raises(GraphFormatError, match="term_constant_0"):
        step_from_json(data, make(), {})
    with pytest.raises(GraphFormatError, match=r"the model has no .*`blocks\.0"):
        step_from_json(data, nn.Linear(2, 2), step.constant_tensors())
    with pytest.raises(
        GraphFormatError, match="format 99, but this version of trainc reads format 7"
    ):
        step_from_json({**data, "format": 99}, make(), step.constant_tensors())


def test_an_empty_step_has_nothing_to_save() -> None:
    with pytest.raises(RuntimeError, match="no graph to save"):
        step_to_json(StepGraph(nn.Linear(2, 2)))


def graph_with(*args: Any, target: Any = aten.full.default, **kwargs: Any) -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(target, (*args,), {"alias": x, **kwargs})
    graph.output((node, None, x))
    return graph


ARGUMENTS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.sampled_from(
        [
            torch.float32,
            torch.bfloat16,
            torch.int64,
            torch.bool,
            torch.strided,
            torch.contiguous_format,
            torch.channels_last,
            torch.device("cpu"),
            torch.device("cuda", 1),
        ]
    ),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(ARGUMENTS, max_size=4))
def test_every_argument_comes_back_as_it_was(arguments: list[Any]) -> None:
    graph = graph_with(*arguments)
    data = json.loads(json.dumps(graph_to_json(graph), allow_nan=False))
    node = next(n for n in graph_from_json(data).nodes if n.op == "call_function")
    before = next(n for n in graph.nodes if n.op == "call_function")
    assert list(node.args) == list(before.args)
    assert [type(a) for a in node.args] == [type(a) for a in before.args]
    assert node.kwargs["alias"].name == "x"


def test_nan_comes_back() -> None:
    node = next(
        n
        for n in graph_from_json(graph_to_json(graph_with(math.nan))).nodes
        if n.op == "call_function"
    )
    assert math.isnan(node.args[0])


@pytest.mark.parametrize(
    "target",
    ["os.system", "builtins.eval", "aten.from_file.default", "aten.add", "trainc.nothing.default",
     "aten.nothing.default", "aten.__init__.default", "_operator.call", "higher_order.cond.default",
     "aten.add.__class__", "trainc.__dict__.x"],
)  # fmt: skip
def test_nothing_but_known_operators_is_loaded(target: str) -> None:
    data = graph_to_json(graph_with(1))
    data["nodes"][1]["target"] = target
    with pytest.raises(GraphFormatError, match="operator"):
        graph_from_json(data)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"op": "call_module"}, "call_module"),
        ({"op": "call_method"}, "call_method"),
        ({"name": "x; import os"}, "not a node name"),
        ({"args": [{"node": "nobody"}]}, "not a saved graph"),
        ({"args": [{"dtype": "load"}]}, "'load' is not a dtype"),
        ({"args": [{"dtype": "nothing"}]}, "'nothing' is not a dtype"),
        ({"args": [{"code": "1"}]}, "'1' is not a code"),
        ({"args": [{}]}, "not a saved graph"),
        ({"kwargs": {"a=print(1), b": 1}}, "keyword argument whose name"),
        ({"name": "def"}, "not a node name"),
        ({"op": "placeholder", "target": "a.b"}, "not the name"),
        ({"op": "get_attr", "target": "__import__('os')"}, "not the name"),
        ({"op": "placeholder", "target": "a=1"}, "not the name"),
    ],
)
def test_damaged_data_is_refused(change: dict[str, Any], words: str) -> None:
    data = graph_to_json(graph_with(1))
    data["nodes"][1] |= change
    with pytest.raises(GraphFormatError, match=words):
        graph_from_json(data)


@pytest.mark.parametrize("data", [{}, {"nodes": [{}]}, {"nodes": [1]}, {"nodes": None}])
def test_other_data_is_refused(data: Any) -> None:
    with pytest.raises(GraphFormatError, match="not a saved graph"):
        graph_from_json(data)


def test_what_cannot_be_loaded_cannot_be_saved() -> None:
    with pytest.raises(GraphFormatError, match="operator"):
        graph_to_json(graph_with(1, target=F.linear))
    with pytest.raises(GraphFormatError, match="type Tensor"):
        graph_to_json(graph_with(torch.zeros(1)))
    graph = fx.Graph()
    graph.output(graph.call_module("layer", ()))
    with pytest.raises(GraphFormatError, match="call_module"):
        graph_to_json(graph)


def test_a_listing_reads_like_a_program() -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    batch = (torch.randn(4, 2), torch.randn(4, 3))
    step = capture(model, F.mse_loss, batch, rewrite=Rewrite(), scalars={})
    lines = listing(step.graph).splitlines()
    assert lines[:4] == [
        "input inputs: f32[4, 2]",
        "input targets: f32[4, 3]",
        "t: f32[2, 3] = aten.t.default(@0.weight)  # 0",
        "addmm: f32[4, 3] = aten.addmm.default(@0.bias, %inputs, %t)  # 0",
    ]
    assert lines[-1].startswith("return [%mse_loss, %mse_loss, %mse_loss, %")
    assert listing(capture(
        model, F.mse_loss, batch, rewrite=Rewrite(), scalars={}
    ).graph) == "\n".join(lines)  # fmt: skip
