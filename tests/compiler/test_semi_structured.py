"""2:4 weights: when sparse tensor cores compute them, what the plan says, and that values and gradients stay."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainc
from trainc.compiler.constructs.mask._semi_structured import SemiStructured
from trainc.runtime.mask.semi_structured import dense_because
from trainc.runtime.mask.zero_mask import ZeroMask

SPEC = """train 1
optimizer adamw { lr = 1e-2 }
loss cross_entropy
mask magnitude on "0.weight" { structure = n_m(2, 4) }
"""


@pytest.mark.parametrize(
    ("layer", "capability", "reason"),
    [
        (nn.Linear(64, 32), (8, 0), None),
        (nn.Linear(64, 32).bfloat16(), (9, 0), None),
        (nn.Linear(64, 32), None, "no CUDA device"),
        (nn.Linear(64, 32), (7, 5), "compute capability 7.5 is below 8.0"),
        (nn.Linear(64, 32).double(), (9, 0), "not in float64"),
        (nn.Linear(64, 40), (9, 0), "40 outputs are no multiple of 32"),
        (nn.Linear(32, 32), (9, 0), "32 inputs are no multiple of 64"),
        (nn.Conv2d(64, 32, 1), (9, 0), "Conv2d is no Linear"),
    ],
)
def test_where_sparse_tensor_cores_compute(
    layer: nn.Module, capability: tuple[int, int] | None, reason: str | None
) -> None:
    assert dense_because(layer, capability) == reason


def masked(layer: nn.Linear) -> ZeroMask:
    weight: Any = layer.weight
    mask = ZeroMask("weight", weight, "")
    groups = layer.weight.detach().abs().view(-1, 4)
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(2).indices, True)
    mask.choose(kept.view(layer.weight.shape))
    return mask


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_compressed_layer_has_the_values_and_gradients_of_the_dense_one(
    autocast: bool, bias: bool
) -> None:
    """In the place of hardware, what is compressed is the weight itself."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 32, bias=bias)
    if not autocast:
        layer.bfloat16()
    seen: list[Tensor] = []

    def compress(weight: Tensor) -> Tensor:
        seen.append(weight)
        return weight

    hook: Any = SemiStructured(masked(layer), compress, "cpu")
    x = torch.randn(3, 5, 64, dtype=layer.weight.dtype, requires_grad=True)
    found = []
    ways: list[Any] = [layer, lambda x: hook.forward(layer, layer, None, x)]
    for run in ways:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = run(x)
        leaves = [x, *layer.parameters()]
        found.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    assert len(seen) == 1
    assert (seen[0].view(-1, 4) != 0).sum(1).max() == 2
    for dense, sparse in zip(*found, strict=True):
        assert sparse.dtype == dense.dtype
        torch.testing.assert_close(sparse, dense, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("mask", "more"),
    [("magnitude", ""), ("wanda", ", batches = 1"), ("sparsegpt", ", batches = 1")],
)
def test_the_plan_says_how_a_layer_is_computed(
    mask: str, more: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = torch.randn(6, 64), torch.randint(32, (6,))
    trained = []
    for capability, said in [
        (None, "computed dense (no CUDA device)"),
        ((9, 0), "by sparse tensor cores, in 16 bits"),
    ]:
        monkeypatch.setattr(
            "trainc.runtime.mask.semi_structured.cuda_capability",
            lambda found=capability: found,
        )
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32))
        spec = SPEC.replace("magnitude", mask).replace("(2, 4)", f"(2, 4){more}")
        program = trainc.compile(spec, model)
        row = next(row for row in program.plan.parameters if row["name"] == "0.weight")
        assert row["mask"] == f"density 0.5, 2:4 {said}"
        hooks = [type(site.hook) for site in program.execution.method.rewrite.hooks]
        assert (SemiStructured in hooks) == (capability is not None)
        for _ in range(3):  # on a CPU the layer runs as it is
            program.step(batch)
        trained.append(model[0].get_parameter("weight").detach().clone())
    assert torch.equal(*trained)
    assert (trained[0].view(-1, 4) != 0).sum(1).max() == 2
