"""Noise is multiplied where its operand stands, and norms add the gradients that reach them; every bit stays."""

from functools import partial
from operator import getitem
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tests.compiler.passes.step_cases import gpt, norm_sites, paced, step_of, tokens
from trainc.compiler.execution import capture
from trainc.compiler.method.sites import Rewrite
from trainc.compiler.passes.after_differentiation import NOISE, add_in_norms, multiply_in_place
from trainc.compiler.passes.fuse_norms import FuseNorms
from trainc.compiler.passes.fuse_residual_adds import FuseResidualAdds
from trainc.compiler.passes.instrument_norms import InstrumentNorms
from trainc.kernels.noise.philox import pack_key

aten = torch.ops.aten


def test_a_step_has_the_same_bits_with_products_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt()
    batch, (rewrite, scalars) = tokens(), paced(model)
    step = step_of(model, batch, rewrite, scalars=scalars)
    monkeypatch.setattr(capture, "multiply_in_place", lambda graph: None)
    plain = step_of(model, batch, rewrite, scalars=scalars)
    written = [
        len(g.graph.find_nodes(op="call_function", target=aten.mul_.Tensor)) for g in (step, plain)
    ]
    assert written[0] > 4
    assert written[1] == 0
    one, other = (graph.run(batch, scalars) for graph in (step, plain))
    assert torch.equal(one.loss, other.loss)
    torch.testing.assert_close(one.grads, other.grads, rtol=0, atol=0)


@pytest.mark.parametrize("reader", ["nothing", "the operand", "a view of it", "the caller"])
def test_what_is_read_later_stays(reader: str) -> None:
    graph = fx.Graph()
    x, sigma, key = (graph.placeholder(name) for name in ("x", "sigma", "key"))
    made = x if reader == "the caller" else graph.call_function(aten.neg.default, (x,))
    view = graph.call_function(aten.view.default, (made, [4, 3, 2]))
    noisy = graph.call_function(NOISE, (view, sigma, key, 0, 2, "token", None))
    later = {"the operand": made, "a view of it": view}.get(reader)
    graph.output((noisy,) if later is None else (noisy, later))
    given = torch.randn(4, 6), torch.tensor(0.5), pack_key(1, 2)
    view.meta["val"] = given[0].view(4, 3, 2)
    before: tuple[Tensor, ...] = fx.GraphModule({}, graph)(*given)
    kept = given[0].clone()
    multiply_in_place(graph)
    graph.lint()
    after: tuple[Tensor, ...] = fx.GraphModule({}, graph)(*given)
    assert all(map(torch.equal, before, after))
    assert torch.equal(given[0], kept)
    assert bool(graph.find_nodes(op="call_function", target=aten.mul_.Tensor)) == (
        reader == "nothing"
    )


class Block(nn.Module):
    """Queries, keys and values of one norm, gate and up of another."""

    def __init__(self, norm: type[nn.Module], width: int = 8) -> None:
        super().__init__()
        self.before, self.behind = norm(width), norm(width)
        self.parts = nn.ModuleList(nn.Linear(width, width) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, gate, up, down = self.parts
        y = self.before(x)
        x = x + F.scaled_dot_product_attention(q(y), k(y), v(y))
        y = self.behind(x)
        return x + down(F.silu(gate(y)) * up(y))  # type: ignore[no-any-return]


class Blocks(nn.Module):
    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(64, 8), nn.Linear(8, 64)
        self.blocks = nn.Sequential(Block(norm), Block(norm))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.embedding(ids)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("added", [False, True], ids=["alone", "of a sum"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_adds_the_gradients_of_all_that_read_it(
    norm: type[nn.Module], dtype: torch.dtype, added: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, batch = Blocks(norm).to(dtype), tokens()
    passes = (FuseNorms(), *([FuseResidualAdds(always=True)] if added else []), InstrumentNorms())
    results = []
    for patched in (lambda graph: None, partial(add_in_norms, always=True)):
        monkeypatch.setattr(capture, "add_in_norms", patched)
        step = step_of(model, batch, Rewrite(norms=norm_sites(model)), passes=passes)
        step.graph.lint()
        names = [str(node.target) for node in step.graph.nodes]
        results.append((step.run(batch, {}), names))
    (plain, before), (joined, after) = results
    assert torch.equal(plain.loss, joined.loss)
    torch.testing.assert_close(plain.grads, joined.grads, rtol=0, atol=0)
    torch.testing.assert_close(plain.probes, joined.probes, rtol=0, atol=0)
    assert sum("backward_of_sum" in name for name in after) == 4
    assert not any("backward_of_sum" in name for name in before)
    # Two sums for each first norm of a block and one for each second.
    assert before.count("aten.add.Tensor") - after.count("aten.add.Tensor") == 6


class Beside(nn.Module):
    """A norm of a sum beside the sum itself: one gradient reaches both."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(64, 8), nn.LayerNorm(8)
        self.one, self.two, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 64)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = x + F.silu(x)
        x = x + self.norm(x)
        return self.head(F.silu(self.one(x)) * self.two(x))  # type: ignore[no-any-return]


def test_a_sum_that_a_norm_reads_twice_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, batch = Beside(), tokens()
    passes = (FuseNorms(), FuseResidualAdds(always=True), InstrumentNorms())
    results = []
    for patched in (lambda graph: None, partial(add_in_norms, always=True)):
        monkeypatch.setattr(capture, "add_in_norms", patched)
        step = step_of(model, batch, Rewrite(norms=norm_sites(model)), passes=passes)
        (node,) = [one for one in step.graph.nodes if "norm_backward" in str(one.target)]
        results.append((step.run(batch, {}), node))
    (plain, before), (joined, after) = results
    assert before.args[0] is before.args[1]  # of the sum and of the norm
    assert before.target is after.target
    torch.testing.assert_close(plain.grads, joined.grads, rtol=0, atol=0)


def test_on_a_cpu_the_graph_stays_as_it_is() -> None:
    model, batch = Blocks(nn.LayerNorm), tokens()
    step = step_of(model, batch, Rewrite(norms=norm_sites(model)))
    assert not any("of_sum" in str(node.target) for node in step.graph.nodes)


BACKWARD = torch.ops.trainc.rms_norm_backward.default


@pytest.mark.parametrize(
    ("case", "taken"),
    [
        ("left", 3), ("right", 3), ("four", 3), ("two", 2), ("one", 1), ("scaled", 1), ("broadcast", 1),
        ("twice", 1), ("read", 1), ("inner read", 2), ("written", 1),
    ],
)  # fmt: skip
def test_which_sums_a_norm_takes(case: str, taken: int) -> None:
    """Those of two tensors like itself that nothing else reads, where nothing writes to memory in between."""
    graph, add, inputs = fx.Graph(), torch.ops.aten.add.Tensor, torch.randn(6, 2, 3, 4)
    places = [graph.placeholder(f"in{i}") for i in range(7)]
    a, b, c, d, x, row, rstd = places
    for place, value in zip(
        places, (*inputs[:5], torch.randn(4), torch.rand(2, 3, 1)), strict=True
    ):
        place.meta["val"] = value

    def call(*arguments: Any, **options: Any) -> fx.Node:
        node = graph.call_function(add, arguments, options)
        node.meta["val"] = inputs[0]
        return node

    inner = call(a, b)
    dy = {
        "left": lambda: call(inner, c), "right": lambda: call(c, inner), "four": lambda: call(inner, call(c, d)),
        "two": lambda: inner, "one": lambda: a, "scaled": lambda: call(a, b, alpha=2),
        "broadcast": lambda: call(a, row), "twice": lambda: call(a, a), "read": lambda: inner,
        "inner read": lambda: call(inner, c), "written": lambda: inner,
    }[case]()  # fmt: skip
    if case == "written":
        graph.call_function(torch.ops.aten.mul_.Tensor, (a, 2.0))
    found = graph.call_function(BACKWARD, (dy, x, [4], rstd, None, "none", [True, False], True))
    dx = graph.call_function(getitem, (found, 0))
    found.meta["val"] = inputs[0]
    graph.output((dx, inner if "read" in case else dx))
    values = [place.meta["val"] for place in places]
    before = fx.GraphModule({}, graph)(*(value.clone() for value in values))
    add_in_norms(graph, always=True)
    graph.eliminate_dead_code()
    graph.lint()
    after = fx.GraphModule({}, graph)(*(value.clone() for value in values))
    assert all(map(torch.equal, before, after))
    several = graph.find_nodes(
        op="call_function", target=torch.ops.trainc.rms_norm_backward_of_sum.default
    )
    terms = [1 + sum(part is not None for part in node.args[1:3]) for node in several] or [1]
    assert terms == [taken]
