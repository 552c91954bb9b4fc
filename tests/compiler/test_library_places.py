"""Levels and roles of models from other libraries: timm's own levels, and the parts of transformers' models."""

import re
from typing import Any

import pytest
import torch
from torch import nn

from tests.compiler.image_models import import_library
from trainc.compiler.model.inventory import Inventory, build_inventory
from trainc.compiler.model.select import select
from trainc.dsl.reading.field_types import node_of
from trainc.dsl.reading.selectors import selector

pytestmark = pytest.mark.models

IMAGE_MODELS = {
    "vit_tiny_patch16_224": 14, "convnext_atto": 14, "swin_tiny_patch4_window7_224": 14, "resnet18": 10,
    "efficientnet_b0": 18, "mobilenetv3_small_050": 14, "mixer_s32_224": 10,
}  # fmt: skip


def image_model(name: str) -> Any:
    timm = import_library("timm")
    with torch.device("meta"):
        return timm.create_model(name, num_classes=5)


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_levels_are_those_of_timm(name: str) -> None:
    model = image_model(name)
    from timm.models import group_parameters

    expected = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    found = {p.name: p.place.level for p in build_inventory(model).parameters}
    assert found == expected
    assert len(set(found.values())) == IMAGE_MODELS[name]


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_structure_alone_gives_the_same_levels_but_for_what_follows_the_last_block(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = image_model(name)
    told = {p.name: p.place.level for p in build_inventory(model).parameters}
    monkeypatch.setattr(type(model), "group_matcher", None)
    found = {p.name: p.place.level for p in build_inventory(model).parameters}
    top = max(told.values())
    assert max(found.values()) == top
    different = {n: (told[n], found[n]) for n in told if told[n] != found[n]}
    assert set(different.values()) <= {(top - 1, top)}
    assert all(re.match(r"norm|conv_head|bn2|fc_norm", n) for n in different)


def test_norms_with_an_activation_are_norms() -> None:
    inventory = build_inventory(image_model("efficientnet_b0"))
    norms = {m.name for m in inventory.modules if "BatchNormAct2d" in m.types}
    assert norms <= set(select(selector(node_of("role(norm)")), inventory, "modules"))
    assert norms


def language_model(name: str, **config: Any) -> Inventory:
    transformers = import_library("transformers")
    made = getattr(transformers, f"{name.partition('For')[0]}Config")(vocab_size=40, **config)
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, name)(made)
    return build_inventory(model)


SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
HALVES = {f"{half}_{what}": n for half in ("encoder", "decoder") for what, n in
          (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def kinds(inventory: Inventory, role: str) -> set[str]:
    """Return the names with this role, without the numbers of blocks; biases are left out."""
    names = select(selector(node_of(f"{role} - role(bias)")), inventory, "parameters")
    return {re.sub(r"\.\d+", "", name).removesuffix(".weight") for name in names}


def test_t5() -> None:
    found = language_model(
        "T5ForConditionalGeneration", d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    halves = ("encoder", "decoder")
    assert kinds(found, "role(mlp)") == {
        f"{half}.block.layer.DenseReluDense.{w}" for half in halves for w in ("wi", "wo")
    }
    assert kinds(found, "role(norm)") == {f"{half}.final_layer_norm" for half in halves} | {
        f"{half}.block.layer.layer_norm" for half in halves
    }
    assert {"shared"} == kinds(found, "role(head)") < kinds(found, "role(embedding)")
    attention = kinds(found, "role(attention) - role(norm) - role(embedding)")
    assert {"SelfAttention", "EncDecAttention"} == {name.split(".")[-2] for name in attention}
    blocks = [
        found.parameter[f"{half}.block.{i}.layer.0.layer_norm.weight"]
        for half in halves
        for i in (0, 1)
    ]
    assert [p.place.level for p in blocks] == [1, 2, 3, 4]


def test_whisper() -> None:
    found = language_model(
        "WhisperForConditionalGeneration", d_model=16, num_mel_bins=8, max_source_positions=10,
        max_target_positions=10, decoder_start_token_id=1, **HALVES, **TOKENS,
    )  # fmt: skip
    halves = ("model.encoder", "model.decoder")
    assert kinds(found, "role(mlp)") == {f"{h}.layers.{w}" for h in halves for w in ("fc1", "fc2")}
    assert kinds(found, "role(head)") == {"model.decoder.embed_tokens"}
    assert kinds(found, "role(embedding)") == {
        "model.decoder.embed_tokens", *(f"{half}.embed_positions" for half in halves),
    }  # fmt: skip
    assert found.parameter["model.encoder.conv2.weight"].place.level == 0


def test_mamba() -> None:
    found = language_model("MambaForCausalLM", hidden_size=16, num_hidden_layers=2, state_size=4)
    assert kinds(found, "role(norm)") == {"backbone.layers.norm", "backbone.norm_f"}
    mixer = {"conv1d", "in_proj", "x_proj", "dt_proj", "out_proj"}
    assert kinds(found, "matrices") == {"backbone.embeddings"} | {
        f"backbone.layers.mixer.{w}" for w in mixer
    }


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "Qwen2MoeForCausalLM", "GptOssForCausalLM"])
def test_experts_are_matrices_and_most_of_the_weights(name: str) -> None:
    more = {"num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 32, "head_dim": 8}
    found = language_model(name, num_key_value_heads=2, **SIZES, **TOKENS, **more)
    experts = {f"model.layers.mlp.experts.{w}" for w in ("gate_up_proj", "down_proj")}
    assert experts <= kinds(found, "matrices") & kinds(found, "role(mlp)")
    reached = sum(
        found.parameter[n].numel for n in select(selector(node_of("matrices")), found, "parameters")
    )
    assert reached > 0.9 * sum(p.numel for p in found.parameters)
    assert not kinds(found, "matrices") & kinds(found, "role(norm)")


def test_bert() -> None:
    found = language_model("BertForSequenceClassification", **SIZES)
    assert kinds(found, "role(mlp)") == {
        "bert.encoder.layer.intermediate.dense", "bert.encoder.layer.output.dense",
    }  # fmt: skip
    assert kinds(found, "role(head)") == {"bert.pooler.dense", "classifier"}
    assert [
        found.parameter[n].place.level
        for n in ("bert.embeddings.LayerNorm.bias", "classifier.bias")
    ] == [0, 3]


@pytest.mark.parametrize(
    ("name", "config", "blocks"),
    [("SwinForImageClassification", {"image_size": 56, "embed_dim": 8, "depths": [2, 2, 2], "num_heads": [1, 1, 2]}, 6),
     ("ConvNextForImageClassification", {"hidden_sizes": [8, 8, 16], "depths": [1, 2, 3], "num_stages": 3}, 6),
     ("ResNetForImageClassification", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2]}, 3),
     ("ViTForImageClassification", {"image_size": 32, **SIZES}, 2)],
)  # fmt: skip
def test_image_models(name: str, config: dict[str, Any], blocks: int) -> None:
    found = language_model(name, **config)
    levels = {p.place.level for p in found.parameters}
    assert levels == set(range(blocks + 2))
    assert kinds(found, "role(head)") == {"classifier"}
    assert {p.place.level for p in found.parameters if "classifier" in p.name} == {blocks + 1}
