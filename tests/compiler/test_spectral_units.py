"""The matrices that weights divide into: of layers, and of models of other libraries, against cuts by hand."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import trainc
from tests.compiler.image_models import import_library
from trainc.compiler.model.inventory import build_inventory
from trainc.compiler.structure.weights import find_units, read_units
from trainc.kernels.parameter.figures import measure

Expected = dict[str, Tensor]
Made = tuple[nn.Module, Expected]


def blocks_of(weight: Tensor, *sizes: int) -> list[Tensor]:
    return list(weight.split(sizes))


def attention(by_head: bool) -> Made:
    layer = nn.MultiheadAttention(12, 3)
    parts = dict(zip("qkv", layer.in_proj_weight.chunk(3), strict=True))
    out = layer.out_proj.weight
    if not by_head:
        return layer, {f"in_proj_weight[{n}]": p for n, p in parts.items()} | {
            "out_proj.weight": out
        }
    heads = {
        f"in_proj_weight[{n} head {i}]": p[4 * i : 4 * i + 4]
        for n, p in parts.items()
        for i in range(3)
    }
    return layer, heads | {
        f"out_proj.weight[head {i}]": out[:, 4 * i : 4 * i + 4] for i in range(3)
    }


def apart() -> Made:
    layer = nn.MultiheadAttention(12, 3, kdim=8, vdim=6)
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    return layer, {n: getattr(layer, n) for n in names} | {"out_proj.weight": layer.out_proj.weight}


def convolutions() -> Made:
    model: Any = nn.ModuleDict(
        {
            "plain": nn.Conv2d(3, 5, (2, 3)),
            "groups": nn.Conv1d(6, 8, 3, groups=2),
            "turned": nn.ConvTranspose2d(6, 4, 2, groups=2),
        }
    )
    plain, groups, turned = (model[n].weight for n in ("plain", "groups", "turned"))
    scale = math.sqrt(0.5)
    return model, {
        "plain.weight": torch.stack([plain[:, :, i, j] for i in range(2) for j in range(3)])
        * scale,
        "groups.weight": torch.stack([h[..., i] for i in range(3) for h in groups.split(4)])
        * scale,
        "turned.weight": torch.stack(
            [h[..., i, j].T for i in range(2) for j in range(2) for h in turned.split(3)]
        )
        * scale,
    }


def recurrent() -> Made:
    layer = nn.LSTM(5, 4)
    return layer, {
        f"{name}[{gate}]": part
        for name in ("weight_ih_l0", "weight_hh_l0")
        for gate, part in zip("ifgo", getattr(layer, name).chunk(4), strict=True)
    }


class Experts(nn.Module):
    """Fused experts as models of transformers hold them."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        sizes = [(3, 6, 10), (3, 5, 6)] if turned else [(3, 10, 6), (3, 6, 5)]
        self.gate_up_proj, self.down_proj = (nn.Parameter(torch.randn(s)) for s in sizes)


def experts(turned: bool) -> Made:
    layer = Experts(turned)
    found: Expected = {}
    for i, both in enumerate(layer.gate_up_proj):
        gate, up = (both.T if turned else both).split(5)
        found |= {f"gate_up_proj[expert {i} gate]": gate, f"gate_up_proj[expert {i} up]": up}
    for i, down in enumerate(layer.down_proj):
        found[f"down_proj[expert {i}]"] = down.T if turned else down
    return layer, found


def computed() -> Made:
    model: Any = nn.ModuleDict(
        {
            "norm": weight_norm(nn.Linear(4, 6)),
            "largest": spectral_norm(nn.Linear(4, 6)),
            "pruned": prune.l1_unstructured(nn.Linear(4, 6), "weight", amount=0.5),
        }
    )
    before = {n: b.clone() for n, b in model.named_buffers()}
    model.eval()
    used = {f"{n}.weight": model[n].weight.detach().clone() for n in ("norm", "largest")}
    model.train()
    layer = model["pruned"]
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    return model, used | {"pruned.weight": layer.weight_orig * layer.weight_mask}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9)
        self.head.weight = self.embed.weight


def tied() -> Made:
    model = Tied()
    return model, {"embed.weight": model.embed.weight.T, "block.weight": model.block.weight}


def grouped_queries() -> Made:
    """A fused projection in the order of Megatron: for each head of keys its queries, then keys, then values."""
    holder: Any = nn.Module()
    holder.num_heads, holder.num_kv_heads = 4, 2
    holder.query_key_value, holder.dense = nn.Linear(12, 24), nn.Linear(12, 12)
    grouped = holder.query_key_value.weight.view(2, 4, 3, 12)
    cuts = {"q": grouped[:, :2], "k": grouped[:, 2:3], "v": grouped[:, 3:]}
    found = {f"query_key_value.weight[{n}]": cut.reshape(-1, 12) for n, cut in cuts.items()}
    return holder, found | {"dense.weight": holder.dense.weight}


def unknown_order() -> Made:
    holder: Any = type("CodeGenAttention", (nn.Module,), {})()
    holder.qkv_proj = nn.Linear(6, 18)
    return holder, {"qkv_proj.weight": holder.qkv_proj.weight}


LAYERS = {
    "attention": lambda: attention(False),
    "separate projections": apart,
    "convolutions": convolutions,
    "recurrent": recurrent,
    "experts": lambda: experts(False),
    "experts with inputs first": lambda: experts(True),
    "computed weights": computed,
    "tied": tied,
    "grouped queries": grouped_queries,
    "unknown order": unknown_order,
}


def check(model: nn.Module, expected: Expected, by: Any = "part") -> None:
    """Compare units and their figures with matrices cut by hand, and singular values of these in float64."""
    units = find_units(build_inventory(model).weights, by)
    found = read_units(model, units)
    assert list(found) == list(expected)
    figures = measure(found)
    for unit in units:
        by_hand = expected[unit.name].detach()
        stack = by_hand if by_hand.dim() == 3 else by_hand[None]
        torch.testing.assert_close(found[unit.name], stack, rtol=1e-5, atol=1e-6)
        assert (unit.count, unit.outputs, unit.inputs) == tuple(stack.shape)
        known = torch.linalg.svdvals(stack.double()).square().flatten().sort().values
        values = figures[unit.name].spectrum.values
        torch.testing.assert_close(values, known, rtol=1e-4, atol=1e-6 * float(known[-1]))
        n, i = len(known), len(known) // 2
        if known[i] > 1e-6 * known[-1] and n > 2:
            alpha = 1 + (n - i) / float((known[i:] / known[i]).log().sum())
            assert figures[unit.name].alpha == pytest.approx(alpha, rel=1e-3), unit.name


@pytest.mark.parametrize("name", LAYERS)
def test_layers_divide_as_they_compute(name: str) -> None:
    torch.manual_seed(0)
    check(*LAYERS[name]())


def test_attention_divides_by_head() -> None:
    torch.manual_seed(0)
    check(*attention(True), by="head")


def test_a_weight_with_a_lora_adapter_is_measured_with_its_update() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5))
    spec = 'train 1\nadapt lora on "0" { rank = 2, alpha = 6 }\noptimizer adamw on "**.lora.**" { lr = 1e-3 }\n'
    trainc.compile(spec, model)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    first = model[0]
    adapter = first.lora
    update = 3 * adapter.b.weight @ adapter.a.weight
    check(model, {"0.weight": first.weight + update, "1.weight": model[1].weight})
    (unit, _) = build_inventory(model).weights
    assert unit.parameters == ("0.weight", "0.lora.a.weight", "0.lora.b.weight")


def transformer(name: str, config: str, **sizes: Any) -> nn.Module:
    library = import_library("transformers")
    common = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model: nn.Module = getattr(library, name)(getattr(library, config)(**common, **sizes))
    return model


def gpt2() -> Made:
    model = transformer(
        "GPT2LMHeadModel", "GPT2Config", n_layer=1, n_embd=12, n_head=3, n_positions=8
    )
    w = {n: p.T for n, p in model.named_parameters() if p.dim() == 2}
    qkv = w.pop("transformer.h.0.attn.c_attn.weight")
    found: Expected = {}
    for name, weight in w.items():
        if name.endswith("attn.c_proj.weight"):
            fused = "transformer.h.0.attn.c_attn.weight"
            found |= {f"{fused}[{n}]": p for n, p in zip("qkv", qkv.split(12), strict=True)}
        found[name] = weight
    return model, found


DECODER = {
    "hidden_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 10,
}


def decoder(model: nn.Module, fused: Callable[[str, Tensor], Expected | None]) -> Made:
    found: Expected = {}
    for name, p in model.named_parameters():
        if p.dim() < 2:
            continue
        cut = fused(name, p)
        whole = p.T if "embed_tokens" in name else p
        found |= {name: whole} if cut is None else {f"{name}[{n}]": c for n, c in cut.items()}
    return model, found


def llama_by_head() -> Made:
    def cut(name: str, p: Tensor) -> Expected | None:
        if "self_attn" not in name:
            return None
        parts = p.split(3, 1) if "o_proj" in name else p.split(3)
        return {f"head {i}": part for i, part in enumerate(parts)}

    return decoder(transformer("LlamaForCausalLM", "LlamaConfig", **DECODER), cut)


def phi3() -> Made:
    def cut(name: str, p: Tensor) -> Expected | None:
        if "qkv_proj" in name:
            return dict(zip("qkv", p.split([12, 6, 6]), strict=True))
        return dict(zip(("gate", "up"), p.split(10), strict=True)) if "gate_up" in name else None

    return decoder(transformer("Phi3ForCausalLM", "Phi3Config", **DECODER), cut)


def mixtral() -> Made:
    def cut(name: str, p: Tensor) -> Expected | None:
        if p.dim() == 2:
            return None
        halves = ("gate", "up") if "gate_up" in name else ("",)
        return {
            f"expert {i} {h}".strip(): part
            for i, one in enumerate(p)
            for h, part in zip(halves, one.chunk(len(halves)), strict=True)
        }

    sizes = {**DECODER, "num_local_experts": 3}
    return decoder(transformer("MixtralForCausalLM", "MixtralConfig", **sizes), cut)


def falcon() -> Made:
    sizes = {
        k: v for k, v in DECODER.items() if k not in ("num_key_value_heads", "intermediate_size")
    }
    model = transformer(
        "FalconForCausalLM", "FalconConfig", num_kv_heads=2, new_decoder_architecture=True, **sizes
    )

    def cut(name: str, p: Tensor) -> Expected | None:
        if "query_key_value" not in name:
            return {"": p.T} if "word_embeddings" in name else None
        grouped = p.view(2, 4, 3, 12)
        cuts = {"q": grouped[:, :2], "k": grouped[:, 2], "v": grouped[:, 3]}
        return {n: c.reshape(-1, 12) for n, c in cuts.items()}

    model, found = decoder(model, cut)
    return model, {n.removesuffix("[]"): w for n, w in found.items()}


@pytest.mark.models
@pytest.mark.parametrize("made", [gpt2, phi3, mixtral, falcon])
def test_models_of_transformers_divide_as_they_compute(made: Callable[[], Made]) -> None:
    torch.manual_seed(0)
    check(*made())


@pytest.mark.models
def test_heads_of_grouped_queries_are_as_many_as_the_model_has() -> None:
    torch.manual_seed(0)
    check(*llama_by_head(), by="head")


@pytest.mark.models
@pytest.mark.parametrize("dora", [False, True])
def test_a_weight_that_peft_adapts_is_measured_with_its_update(dora: bool) -> None:
    peft = import_library("peft")
    torch.manual_seed(0)
    model, expected = gpt2()
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["c_attn"], fan_in_fan_out=True, use_dora=dora
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft calls what transformers has renamed
        adapted = peft.get_peft_model(model, config)
    layer = adapted.base_model.model.transformer.h[0].attn.c_attn
    nn.init.normal_(layer.lora_B["default"].weight)
    update = 3 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    used = layer.base_layer.weight.T + update
    if dora:
        sizes = layer.lora_magnitude_vector["default"].weight
        nn.init.uniform_(sizes, 1, 2)
        used = sizes[:, None] * used / used.norm(dim=1, keepdim=True)
    parts = dict(zip("qkv", used.split(12), strict=True))
    found: Expected = {}
    for name, weight in expected.items():
        fused = name.partition("[")[2].removesuffix("]")
        name = name.replace("c_attn", "c_attn.base_layer")
        found[f"base_model.model.{name}"] = parts[fused] if fused else weight
    kept = [dict(m._caches) for m in adapted.modules() if hasattr(m, "_caches")]
    check(adapted, found)
    assert kept == [m._caches for m in adapted.modules() if hasattr(m, "_caches")]


def test_a_masked_weight_is_measured_as_it_is_used() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 12))
    spec = """
    train 1
    loss mse
    mask magnitude on "0.weight" { density = 50%, structure = row }
    optimizer sgd { lr = 0.01 }
    """
    program = trainc.compile(spec, model)
    program.step((torch.randn(4, 24), torch.randn(4, 12)))
    units = find_units(build_inventory(model).weights)
    found = measure(read_units(model, units))["0.weight"]
    kept = model[0].weight.detach()
    kept = kept[kept.any(1)]
    assert tuple(kept.shape) == (found.spectrum.rows, found.spectrum.columns) == (8, 24)
    known = torch.linalg.svdvals(kept.double()).square().flip(0)
    torch.testing.assert_close(found.spectrum.values, known, rtol=1e-5, atol=0)
    assert found.alpha == pytest.approx(1 + 4 / float((known[4:] / known[4]).log().sum()))
