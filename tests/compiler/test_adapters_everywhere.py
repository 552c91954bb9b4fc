"""Adapters of replicas, of shards, and under activation checkpoints: all train as one process with plain steps."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import trainc
from tests.processes import run_processes, run_rank
from trainc.compiler.errors import SiteError

BASE = (
    "loss cross_entropy optimizer sgd { lr = 0.5, momentum = 0.9, clip = 1.0 }"
    " run { length = 9 steps, seed = 3 } adapt "
)
BLOCKS = ', checkpoint_activations = "model.layers.*"'
IDS = torch.randint(1, 24, (4, 6), generator=torch.Generator().manual_seed(1))
TARGETS = IDS.roll(-1, 1)
LINEAR = '"**.q_proj" | "**.up_proj" | "lm_head"'
CLAUSES = {
    "lora": f"lora on {LINEAR} | type(Embedding) {{ rank = 2, alpha = 4 }}",
    "dora": f"dora on {LINEAR} {{ rank = 2, alpha = 4 }}",
    "lora_mul": f"lora_mul on {LINEAR} {{ rank = 2, terms = [weight] }}",
    "parallel": 'parallel on "**.mlp" { rank = 2, init = xavier, train = "lm_head" }',
    "apt": 'apt on "**.mlp" { tokens = 2, rank = 2, init = published }',
    "deep prompts": 'prompt on "model.layers.*" { tokens = 3 }',
    "shallow prompts": 'prompt on "model.layers.*" { tokens = 3, mode = shallow }',
    "prompts in front": 'prompt on "model" { tokens = 3, mode = input }',
}


def model() -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def whole(state: Any) -> dict[str, Tensor]:
    from trainc.runtime.processes.sharded import full

    return {name: full(tensor).detach().clone() for name, tensor in state.items()}


def trained(
    clause: str,
    by: str = "",
    rows: slice = slice(None),
    run: str = "",
    executor: Any = "auto",
    reentrant: bool | None = None,
) -> Any:
    """Return losses and weights after three steps with these rows of the batch."""
    from torch.distributed.fsdp import fully_shard

    net = model()
    if reentrant is not None:
        net.activation_checkpointing_enable({"use_reentrant": reentrant})
    program = trainc.compile(
        BASE.replace("seed = 3", "seed = 3" + run) + clause, net, executor=executor
    )
    if by == "replicas":
        program.forward = DistributedDataParallel(net)
    if by == "shards":
        for block in net.model.layers:
            fully_shard(block)
        fully_shard(net)
    losses = [program.step((IDS[rows], TARGETS[rows]))["loss"] for _ in range(3)]
    return losses, whole(net.state_dict())


def wrapped_before(rows: slice) -> str:
    """Return the error of a step whose wrapper has been there before the adapters."""
    net = model()
    program = trainc.compile(BASE + CLAUSES["lora"], DistributedDataParallel(net))
    with pytest.raises(SiteError) as raised:
        program.step((IDS[rows], TARGETS[rows]))
    return str(raised.value)


def process(rank: int) -> Any:
    warnings.simplefilter("ignore")
    rows = slice(0, 3) if rank == 0 else slice(3, 4)
    found: dict[Any, Any] = {"wrapped before": wrapped_before(rows)}
    return found | {(name, way): trained(CLAUSES[name], *WAYS[way](rows)) for name, way in CASES}


WAYS: dict[str, Any] = {
    "replicas": lambda rows: ("replicas", rows),
    "shards": lambda rows: ("shards", rows),
    "shards, checkpoints": lambda rows: ("shards", rows, BLOCKS),
}
CASES = [(name, way) for name in CLAUSES for way in ("replicas", "shards")]
CASES += [(name, "shards, checkpoints") for name in ("dora", "prompts in front")]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    pytest.importorskip("transformers")
    return run_processes(__file__, 2, tmp_path_factory.mktemp("ranks"), timeout=500)


def assert_same(found: Any, wanted: Any) -> None:
    """Compare losses and weights; those of the frozen model with the first ones, bit for bit."""
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    assert found[1].keys() == wanted[1].keys()
    start, moved = model().state_dict(), 0
    for name, value in wanted[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5, msg=name)
        moved += name not in start or not torch.equal(value, start[name])
        assert torch.equal(found[1][name], value) or name not in start or name == "lm_head.weight"
    assert moved
    assert len(set(wanted[0])) == 3


@pytest.mark.parametrize(("name", "way"), CASES)
def test_two_processes_train_adapters_as_one_does(found: list[Any], name: str, way: str) -> None:
    wanted = trained(CLAUSES[name])
    one, two = (rank[name, way] for rank in found)
    assert_same(one, wanted)
    assert one[0] == two[0]
    assert all(torch.equal(one[1][key], two[1][key]) for key in one[1])


def test_a_wrapper_that_has_no_adapters_is_an_error(found: list[Any]) -> None:
    for rank in found:
        assert "a wrapper from before `compile` has none of those" in rank["wrapped before"]
        assert ".lora." in rank["wrapped before"]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", CLAUSES)
def test_activation_checkpoints_and_graphs_change_nothing(name: str) -> None:
    wanted = trained(CLAUSES[name], executor="module")
    for way in (
        {"run": BLOCKS},
        {"run": BLOCKS.replace('"model.layers', '"model" | "model.layers')},
        {"reentrant": False},
        {"reentrant": True},
        {"executor": "graph"},
    ):
        settings: dict[str, Any] = way
        assert_same(trained(CLAUSES[name], **settings), wanted)


if __name__ == "__main__":
    run_rank(process)
