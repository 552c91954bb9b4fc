"""Every operator under DistributedDataParallel and FSDP2: two processes against one on the whole batch.

One pair of processes runs everything; each test reads its part.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.processes import run_processes, run_rank
from trainc import functional as operators
from trainc.kernels.noise.philox import pack_key
from trainc.kernels.parameter.masked_update import pack

BATCH, WIDTH = 8, 6
HALF = BATCH // 2
KEY = pack_key(seed=3, step=1)
Apply = Callable[["Site", Tensor], Tensor]


def both(pair: tuple[Tensor, Tensor]) -> Tensor:
    return torch.cat(pair, -1)


def consistency(site: "Site", h: Tensor) -> Tensor:
    targets = torch.arange(h.shape[0]) % WIDTH
    logits = torch.cat([h[:, 0], h[:, 1]])
    return operators.cross_entropy_consistency(logits, targets, torch.tensor(0.5))[0]


def through_head(site: "Site", h: Tensor) -> Tensor:
    targets, hidden = torch.arange(h.shape[0]) % WIDTH, torch.cat([h[:, 0], h[:, 1]])
    return operators.linear_cross_entropy_consistency(
        hidden, site.matrix, site.bias, targets, torch.tensor(0.5)
    )[0]


def in_chunks(site: "Site", h: Tensor) -> Tensor:
    targets = torch.arange(h.shape[0]) % WIDTH
    return operators.linear_cross_entropy(h[:, 0], site.matrix, site.bias, targets, chunks=2)


# What each operator makes of h (B, 4, WIDTH), and the columns of its probe, if it has one.
SITES: dict[str, tuple[Apply, int]] = {
    "layer_norm": (
        lambda s, h: operators.layer_norm(h, [WIDTH], s.weight, s.bias, s.probe),
        2,
    ),
    "rms_norm": (lambda s, h: operators.rms_norm(h, [WIDTH], s.weight, s.probe), 1),
    "add_layer_norm": (
        lambda s, h: both(operators.add_layer_norm(h, h.sin(), [WIDTH], s.weight, s.bias, s.probe)),
        2,
    ),
    "add_rms_norm": (
        lambda s, h: both(operators.add_rms_norm(h, h.sin(), [WIDTH], s.weight, s.probe)),
        1,
    ),
    "linear": (lambda s, h: operators.linear(h, s.matrix, s.bias, s.probe), 2),
    "embedding": (
        lambda s, h: h * operators.embedding(s.ids[: h.shape[0]], s.matrix, 1, s.probe),
        1,
    ),
    "convolution": (
        lambda s, h: operators.convolution(
            h.transpose(1, 2), s.matrix.unsqueeze(2), s.bias, s.probe
        ),
        2,
    ),
    "group_norm": (
        lambda s, h: operators.group_norm(h.transpose(1, 2), 2, s.weight, s.bias, s.probe),
        2,
    ),
    "multiplicative_noise": (
        lambda s, h: operators.multiplicative_noise(
            h, torch.tensor(0.5), KEY, 1, 1, "token", torch.tensor(s.first)
        ),
        0,
    ),
    "noisy_add": (
        lambda s, h: operators.noisy_add(
            h, h @ s.matrix, torch.tensor(0.5), KEY, 1, 1, "none", torch.tensor(s.first)
        ),
        0,
    ),
    "cross_entropy_consistency": (consistency, 0),
    "linear_cross_entropy_consistency": (through_head, 0),
    "linear_cross_entropy": (in_chunks, 0),
    "ghost_batch_norm": (
        lambda s, h: operators.ghost_batch_norm(
            h.transpose(1, 2), None, None, s.weight, s.bias, 2, True
        ),
        0,
    ),
}
WRAPPERS = ["ddp", "ddp-compiled", "fsdp", "fsdp-bf16"]


class Site(nn.Module):
    """A layer and then one operator; `probe` is set before each forward."""

    weight: nn.Parameter
    bias: nn.Parameter
    matrix: nn.Parameter
    ids: Tensor
    first: int
    probe: Tensor | None

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lead = nn.Linear(WIDTH, WIDTH)
        self.weight = nn.Parameter(torch.randn(WIDTH))
        self.bias = nn.Parameter(torch.randn(WIDTH))
        self.matrix = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.apply_operator, self.columns = SITES[name]
        self.ids = torch.zeros(0, dtype=torch.int64)
        self.first = 0
        self.probe = None

    def forward(self, x: Tensor) -> Tensor:
        unused = 0.0 * (self.weight.sum() + self.bias.sum() + self.matrix.sum())
        return self.apply_operator(self, self.lead(x)).float().square().mean() + unused.float()


def differentiate(
    site: Site, model: nn.Module, examples: slice, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor | None]:
    """Gradients of all parameters, whole, and the probe's, for some of the batch."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(BATCH, 4, WIDTH, generator=generator)
    site.ids = torch.randint(0, WIDTH, (BATCH, 4), generator=generator)[examples]
    site.first = examples.start
    count = examples.stop - examples.start
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    site.probe = torch.zeros(count, site.columns, dtype=wide) if site.columns else None
    if site.probe is not None:
        site.probe.requires_grad_()
    model(x[examples].to(dtype)).backward()
    found: list[Any] = [p.grad for p in site.parameters()]
    gradients = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in found]
    return gradients, None if site.probe is None else site.probe.grad


def wrapped(site: Site, wrapper: str) -> nn.Module:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if wrapper.startswith("ddp"):
        replicated = DistributedDataParallel(site)
        if wrapper == "ddp":
            return replicated
        compiled: Any = torch.compile(replicated, backend="aot_eager")
        assert isinstance(compiled, nn.Module)
        return compiled
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = mixed if wrapper == "fsdp-bf16" else MixedPrecisionPolicy()
    sharded: Any = fully_shard(site, mp_policy=policy)
    assert isinstance(sharded, nn.Module)
    return sharded


def shards() -> list[Tensor]:
    """Operators over parameters on the local shards of an FSDP2 model, made whole again."""
    from torch.distributed.fsdp import fully_shard

    site: Any = fully_shard(Site("linear"))
    sharded = site.matrix
    local = sharded.to_local()
    sums = operators.multi_norm([local.detach()])
    dist.all_reduce(sums)
    mask = torch.arange(local.numel()).view(local.shape) % 3 > 0
    operators.masked_update_([local], pack(mask))
    index, state = torch.tensor([1, 4]), (torch.zeros(2), torch.zeros(2))
    operators.sparse_adamw_(
        local, torch.ones_like(local), *state, index,
        lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0, step=1,
    )  # fmt: skip
    return [sums, sharded.full_tensor().detach()]


def replica(rank: int) -> Any:
    """Everything on one half of the batch; run as a process of its own."""
    found: dict[Any, Any] = {"shards": shards()}
    half = slice(HALF * rank, HALF * (rank + 1))
    for name in SITES:
        for wrapper in WRAPPERS:
            dtype = torch.float32 if wrapper == "fsdp-bf16" else torch.float64
            site = Site(name).to(dtype)
            found[name, wrapper] = differentiate(site, wrapped(site, wrapper), half, dtype)
            torch._dynamo.reset()
    return found


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """Return what each of two processes found."""
    folder = tmp_path_factory.mktemp("replicas")
    return run_processes(__file__, 2, folder, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", SITES)
def test_two_processes_find_what_one_finds(
    replicas: list[dict[Any, Any]], name: str, wrapper: str
) -> None:
    site = Site(name).double()
    gradients, norms = differentiate(site, site, slice(0, BATCH), torch.float64)
    if "cross_entropy" in name:  # targets count from the half's first example
        halves = []
        for rank in range(2):
            one = Site(name).double()
            half = slice(HALF * rank, HALF * (rank + 1))
            halves.append(differentiate(one, one, half, torch.float64)[0])
        gradients = [(left + right) / 2 for left, right in zip(*halves, strict=True)]
    tolerance = 3e-2 if wrapper == "fsdp-bf16" else 1e-6
    for rank in range(2):
        got, local = replicas[rank][name, wrapper]
        for mine, want in zip(got, gradients, strict=True):
            limit = tolerance * max(1.0, want.abs().max().item())
            torch.testing.assert_close(mine.double(), want, rtol=tolerance, atol=limit)
        if norms is None:
            assert local is None
            continue
        # A mean over half the batch doubles each example's contribution: four times its square.
        mine = norms[HALF * rank : HALF * (rank + 1)] * 4
        torch.testing.assert_close(local.double(), mine, rtol=5 * tolerance, atol=tolerance)


@pytest.mark.slow
def test_operators_over_parameters_take_local_shards(replicas: list[dict[Any, Any]]) -> None:
    whole = Site("linear").matrix.detach()
    sums, updated = replicas[0]["shards"]
    torch.testing.assert_close(sums, operators.multi_norm([whole]), rtol=1e-6, atol=0)
    for want, half in zip(whole.chunk(2), updated.chunk(2), strict=True):
        mask = (torch.arange(want.numel()) % 3 > 0).view(want.shape)
        expected = want.where(mask, 0).flatten()
        expected[[1, 4]] -= 0.1  # AdamW's first step is the learning rate
        torch.testing.assert_close(half.flatten(), expected)


if __name__ == "__main__":
    run_rank(replica)
