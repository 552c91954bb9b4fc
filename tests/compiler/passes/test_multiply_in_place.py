"""Noise is multiplied where its operand stands, if nothing reads that afterwards; every bit stays."""

import pytest
import torch
from torch import Tensor, fx

from tests.compiler.passes.step_cases import gpt, paced, step_of, tokens
from trainc.compiler.execution import capture
from trainc.compiler.passes.multiply_in_place import NOISE, multiply_in_place
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
