"""`adapt lora` with `parts`: which outputs of a fused projection are queries, keys and values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainc
from tests.compiler.constructs.test_lora import BATCH, IDS, logits, spec, with_peft

SIZES: dict[str, Any] = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
    "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False,
}  # fmt: skip


def build(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        found: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**settings))
        return found.double()

    return make


def heads(rows: Tensor, part: str) -> Tensor:
    """Return the queries, keys or values (heads, 4) of outputs in which each of four heads has its own three."""
    return rows.view(4, 3, 4)[:, "qkv".index(part)]


def grouped(rows: Tensor, part: str) -> Tensor:
    """The same of two groups, each of two heads of queries, one of keys and one of values."""
    return rows.view(2, 4, 4)[:, {"q": slice(0, 2), "k": slice(2, 3), "v": slice(3, 4)}[part]]


def in_turn(rows: Tensor, part: str) -> Tensor:
    """The same of all queries, all keys and all values, of fewer heads than the queries."""
    return rows[{"q": slice(0, 16), "k": slice(16, 24), "v": slice(24, 32)}[part]]


def single(rows: Tensor, part: str) -> Tensor:
    """The same where all heads of queries share one of keys and one of values."""
    return rows[{"q": slice(0, 16), "k": slice(16, 20), "v": slice(20, 24)}[part]]


CASES: dict[str, tuple[Callable[[], nn.Module], str, Callable[[Tensor, str], Tensor]]] = {
    "heads": (
        build("GPTNeoXForCausalLM", "GPTNeoXConfig", **SIZES),
        "gpt_neox.layers.0.attention.query_key_value",
        heads,
    ),
    "groups": (
        build(
            "FalconForCausalLM", "FalconConfig", new_decoder_architecture=True, num_kv_heads=2, alibi=False,
            **{n: v for n, v in SIZES.items() if n not in ("intermediate_size", "max_position_embeddings")},
        ),
        "transformer.h.0.self_attention.query_key_value",
        grouped,
    ),
    "fewer keys": (
        build(
            "Phi3ForCausalLM", "Phi3Config", num_key_value_heads=2, resid_pdrop=0.0, embd_pdrop=0.0, **SIZES
        ),
        "model.layers.0.self_attn.qkv_proj",
        in_turn,
    ),
    "one key": (
        build(
            "GPTBigCodeForCausalLM", "GPTBigCodeConfig", vocab_size=24, n_positions=16, n_embd=16, n_layer=1, n_head=4,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2, use_cache=False,
        ),
        "transformer.h.0.attn.c_attn",
        single,
    ),
}  # fmt: skip
each_case = pytest.mark.parametrize(("make", "name", "part_of"), CASES.values(), ids=CASES)


@each_case
@pytest.mark.parametrize("parts", ["v", "q, k", "v, q"])
def test_the_parts_of_a_fused_projection_are_those_that_attention_reads(
    make: Any, name: str, part_of: Any, parts: str
) -> None:
    """The change of the weight is zero for all outputs but those that the model itself reads as these parts."""
    clause = f'adapt lora on "{name}" {{ rank = 2, alpha = 4, parts = [{parts}] }}'
    runs = []
    for executor in ("graph", "module"):
        program = trainc.compile(spec(clause), make(), executor=executor)
        runs.append([program.step(BATCH)["loss"] for _ in range(3)])
    assert runs[0] == pytest.approx(runs[1], rel=1e-10)
    layer: Any = program.module.get_submodule(name)
    rule = layer.lora.rule
    moved = rule.weight_change(layer, layer.lora).abs().sum(1) > 0
    for part in "qkv":
        assert bool(part_of(moved, part).all()) == (part in parts), part
        assert bool(part_of(moved, part).any()) == (part in parts), part
    x = torch.linspace(-1, 1, 48, dtype=torch.float64).view(3, 16)
    with torch.no_grad():
        by_weight = x @ (layer.weight + rule.weight_change(layer, layer.lora)).T
        bias = 0 if layer.bias is None else layer.bias
        torch.testing.assert_close(layer(x), by_weight + bias, rtol=1e-12, atol=1e-12)
        if type(layer).forward is nn.Linear.forward:  # not Falcon's
            out = logits(program.module.eval())
            torch.testing.assert_close(logits(program.merge()), out, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@each_case
def test_peft_has_the_parts_in_one_adapter(
    make: Any, name: str, part_of: Any, tmp_path: Path
) -> None:
    text = spec(f'adapt lora on "{name}" {{ rank = 2, alpha = 4, parts = [q, v] }}')
    program = trainc.compile(text, make())
    for _ in range(2):
        program.step(BATCH)
    program.save_adapters(tmp_path)
    theirs, want = with_peft(make(), tmp_path).eval(), logits(program.module.eval())
    torch.testing.assert_close(logits(theirs, IDS), want, rtol=1e-12, atol=1e-12)
    again = trainc.compile(text, make())
    again.load_adapters(tmp_path)
    assert torch.equal(logits(again.module.eval()), want)


def test_an_order_that_is_not_known_is_refused() -> None:
    make = build(
        "CodeGenForCausalLM", "CodeGenConfig", vocab_size=24, n_positions=16, n_embd=16, n_layer=1, n_head=4,
        rotary_dim=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    text = spec('adapt lora on "**.qkv_proj" { rank = 2, alpha = 4, parts = [q] }')
    with pytest.raises(
        trainc.SpecError, match=r"qkv_proj` has 48 outputs, of which it is not known"
    ):
        trainc.plan(text, make())


def test_a_part_that_is_not_there_is_refused() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.kv = nn.Linear(8, 8), nn.Linear(8, 16)

    net = nn.Sequential(Attention())
    clause = 'adapt lora on "**.kv" { rank = 2, alpha = 4, parts = [q, v] }'
    with pytest.raises(trainc.SpecError, match=r"`0\.kv` has k and v alone, and no q"):
        trainc.plan(spec(clause), net)
    trainc.plan(spec(clause.replace("q, v", "k, v")), net)


def test_the_rank_of_a_small_part_is_what_is_warned_of() -> None:
    make, name, _ = CASES["one key"]
    clause = f'adapt lora on "{name}" {{ rank = 5, alpha = 4, parts = [PARTS] }}'
    (warning,) = trainc.plan(spec(clause.replace("PARTS", "v")), make()).warnings
    assert "ranks above 4" in warning.message
    assert not trainc.plan(spec(clause.replace("PARTS", "q")), make()).warnings
