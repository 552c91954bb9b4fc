"""Convolutions, group norms and tied weights through torch.compile in one graph, by both back ends."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from trainc import functional as operators

WIDTH = 6
SHAPES = {
    "table": (9, WIDTH), "weight": (WIDTH,), "bias": (WIDTH,), "kernel": (WIDTH, 3, 3),
    "square": (WIDTH, WIDTH, 3, 1), "one": (4, 1), "two": (4, 2), "three": (4, 2),
    "four": (4, 1), "five": (4, 1),
}  # fmt: skip
PROBES = ("one", "two", "three", "four", "five")


def everything(parts: dict[str, Tensor]) -> Tensor:
    """A tied language model of sorts; parts are parameters and probes."""
    y, rows = operators.tied_embedding(parts["table"], parts["ids"], 0, parts["one"])
    h = operators.group_norm(y.mT, 2, parts["weight"], parts["bias"], parts["two"])
    h = operators.convolution(h, parts["kernel"], parts["bias"], parts["three"], 1, 1, 1, 2)
    image = h.unsqueeze(3).contiguous(memory_format=torch.channels_last)
    seen = operators.convolution(image, parts["square"], None, parts["four"], 1, [1, 0])
    h = (h + seen.squeeze(3)).mT
    logits = operators.tied_linear(h, parts["table"], None, parts["five"], rows, parts["ids"])
    return functional.cross_entropy(logits.flatten(0, 1), parts["ids"].roll(1, 1).flatten())


def parts() -> dict[str, Tensor]:
    torch.manual_seed(0)
    made = {
        name: torch.zeros(shape) if name in PROBES else torch.randn(shape)
        for name, shape in SHAPES.items()
    }
    leaves = {name: tensor.requires_grad_() for name, tensor in made.items()}
    return leaves | {"ids": torch.randint(0, 9, (4, 8))}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_functions_compile_to_one_graph_with_the_same_gradients(backend: str) -> None:
    torch._dynamo.reset()
    compiled: Any = torch.compile(everything, fullgraph=True, backend=backend)
    results = []
    for function in (compiled, everything):
        given = parts()
        loss = function(given)
        loss.backward()
        results.append((loss.detach(), *(given[name].grad for name in SHAPES)))
    for got, want in zip(*results, strict=True):
        assert got is not None
        assert want is not None
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert all(want is not None and want.all() for want in results[1][-len(PROBES) :])
