"""The public functions: what `help()` tells of them, and torch.compile in one graph by both back ends."""

import inspect
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from trainc import functional as operators
from trainc.kernels.noise.philox import pack_key

KEY = pack_key(seed=1, step=2)
WIDTH = 6


def everything(parts: dict[str, Tensor]) -> Tensor:
    """A model of sorts out of every differentiable function; parts are parameters and probes."""
    x = operators.embedding(parts["ids"], parts["table"], 0, parts["one"])
    total, h = operators.add_layer_norm(
        x, x.sin(), [WIDTH], parts["weight"], parts["bias"], parts["two"]
    )
    total, g = operators.add_rms_norm(h, total, [WIDTH], parts["weight"], parts["three"])
    h = operators.layer_norm(total + g, [WIDTH], parts["weight"], parts["bias"], parts["two"])
    h = operators.rms_norm(h, [WIDTH], parts["weight"], parts["three"])
    sigma = torch.tensor(0.3)
    h = operators.multiplicative_noise(h, sigma, KEY, 1, 2)
    h = operators.noisy_add(h, h.cos(), sigma, KEY, 2, 2, "none")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = operators.linear(h, parts["matrix"], parts["bias"], parts["four"]).float()
    h = operators.ghost_batch_norm(
        h, parts["mean"], parts["var"], parts["weight"], parts["bias"], 2, True
    )
    loss, _, _ = operators.cross_entropy_consistency(h, parts["ids"][:2] % WIDTH, torch.tensor(0.5))
    return loss


def parts() -> dict[str, Tensor]:
    torch.manual_seed(0)
    made = {
        "table": torch.randn(9, WIDTH),
        "matrix": torch.randn(WIDTH, WIDTH),
        "weight": torch.randn(WIDTH),
        "bias": torch.randn(WIDTH),
        "one": torch.zeros(4, 1),
        "two": torch.zeros(4, 2),
        "three": torch.zeros(4, 1),
        "four": torch.zeros(4, 2),
    }
    made = {name: tensor.requires_grad_() for name, tensor in made.items()}
    buffers = {"mean": torch.zeros(WIDTH), "var": torch.ones(WIDTH)}
    return made | buffers | {"ids": torch.randint(0, 9, (4, WIDTH))}


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
        results.append(
            (loss.detach(), given["mean"], given["var"], *(p.grad for p in given.values()))
        )
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_functions_that_write_in_place_compile(backend: str) -> None:
    torch._dynamo.reset()

    def update(weight: Tensor, mean: Tensor, square: Tensor, mask: Tensor) -> Tensor:
        operators.sparse_adamw_(
            weight, weight * 2, mean, square, torch.arange(3), block=4, gathered=False,
            lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, step=1,
        )  # fmt: skip
        operators.masked_update_([weight], mask)
        return operators.multi_norm([weight, mean])

    compiled: Any = torch.compile(update, fullgraph=True, backend=backend)
    results = []
    for function in (compiled, update):
        torch.manual_seed(0)
        given = [torch.randn(5, 6), torch.zeros(12), torch.zeros(12), torch.rand(5, 6) < 0.5]
        results.append([function(*given), *given])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", operators.__all__)
def test_help_tells_the_contract(name: str) -> None:
    function = getattr(operators, name)
    text = inspect.getdoc(function) or ""
    silent = [p for p in inspect.signature(function).parameters if f"`{p}`" not in text]
    assert not silent, f"help({name}) says nothing of {silent}"
    assert len(re.findall(r"(?<!al)\.(?=\s|$)", text)) > 1, "one sentence is no contract"
    assert re.search(r"\bReturns?\b", text), "what comes out"
    assert re.search(r"\bRaises?\b", text), "what is refused, and how"
