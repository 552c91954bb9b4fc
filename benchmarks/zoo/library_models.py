"""Architectures of transformers and timm, with random weights and few of them."""

import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.architecture import (
    Architecture,
    Inputs,
    classes,
    labels_of_tokens,
    numbers,
    together,
    tokens,
)

WORDS, LENGTH = 40, 6
_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []


def import_library(name: str) -> Any:
    """Return timm, transformers or a module of theirs, also where torchvision's binary does not fit torch.

    Raises ImportError where it is not installed.
    """
    installed = find_spec("torchvision") is not None
    if name.startswith("timm") and not installed:
        raise ImportError("timm needs torchvision, which is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision warns of each binary that does not fit
        if installed and "torchvision" not in sys.modules:
            _import_torchvision()
        return import_module(name)


def _import_torchvision() -> None:
    try:
        import_module("torchvision")
    except (ImportError, RuntimeError):
        # The import describes these to torch, and fails if no binary has defined them.
        if not _declared:
            _declared.append(torch.library.Library("torchvision", "DEF"))
            for operator in _OPERATORS:
                _declared[0].define(operator)
        for half in [module for module in sys.modules if module.split(".")[0] == "torchvision"]:
            del sys.modules[half]
        import_module("torchvision")


def _hugging_face(model: str, config: str, **settings: Any) -> nn.Module:
    transformers = import_library("transformers")
    found: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**settings))
    return found


def _timm(model: str, **settings: Any) -> nn.Module:
    found: nn.Module = import_library("timm").create_model(model, num_classes=5, **settings)
    return found


def _mixer() -> nn.Module:
    mixer = import_library("timm.models.mlp_mixer").MlpMixer  # its makers fix the sizes
    found: nn.Module = mixer(num_classes=5, img_size=16, patch_size=8, num_blocks=2, embed_dim=16)
    return found


class TwoTowers(nn.Module):
    """CLIP, whose logits are those of each image for the texts of the batch."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, **inputs: Tensor) -> Tensor:
        found: Tensor = self.clip(**inputs).logits_per_image
        return found


_SIZES: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
_HALVES = {f"{half}_{what}": n for half in ("encoder", "decoder") for what, n in
           (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
_GROUPED = _SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}


def _two_towers() -> nn.Module:
    text = _SIZES | _ENDS | {"vocab_size": WORDS, "max_position_embeddings": LENGTH}
    image = _SIZES | {"image_size": 16, "patch_size": 8}
    return TwoTowers(
        _hugging_face("CLIPModel", "CLIPConfig", text_config=text, vision_config=image,
                      projection_dim=16)
    )  # fmt: skip


def _language(
    name: str, model: str, config: str, *, rounds: bool = False, **settings: Any
) -> Architecture:
    build = partial(_hugging_face, model, config, vocab_size=WORDS, use_cache=False, **settings)
    return Architecture(
        name, "transformers", build, tokens(LENGTH, WORDS, "input_ids"), rounds=rounds
    )


_IDS, _DECODER_IDS = tokens(LENGTH, WORDS, "input_ids"), tokens(LENGTH, WORDS, "decoder_input_ids")
_PIXELS = "pixel_values"


def _images(name: str, model: str, config: str, size: int, **settings: Any) -> Architecture:
    build = partial(_hugging_face, model, config, num_labels=5, **settings)
    return Architecture(name, "transformers", build, numbers(3, size, size, name=_PIXELS))


def _timm_images(name: str, model: str, size: int, **settings: Any) -> Architecture:
    return Architecture(name, "timm", partial(_timm, model, **settings), numbers(3, size, size))


def _encoder_decoder(name: str, build: Callable[[], nn.Module], **inputs: Any) -> Architecture:
    return Architecture(name, "transformers", build, rounds=True, **inputs)


def _classifier(name: str, model: str, labels: Inputs, **settings: Any) -> Architecture:
    """Return a BERT with another head, under its own loss."""
    build = partial(_hugging_face, model, "BertConfig", vocab_size=WORDS,
                    max_position_embeddings=LENGTH, **_SIZES, **settings)  # fmt: skip
    return Architecture(name, "transformers", build, _IDS, loss="model", labels=labels)


_WITH_LOGITS = (
    _language("gpt2", "GPT2LMHeadModel", "GPT2Config", n_layer=2, n_embd=16, n_head=2,
              n_positions=LENGTH, bos_token_id=1, eos_token_id=1),
    _language("llama_grouped", "LlamaForCausalLM", "LlamaConfig", rounds=True, **_GROUPED, **_ENDS),
    _language("gemma", "GemmaForCausalLM", "GemmaConfig", rounds=True, **_GROUPED, **_ENDS),
    _language("qwen3", "Qwen3ForCausalLM", "Qwen3Config", rounds=True, **_GROUPED, **_ENDS),
    _language("mixtral", "MixtralForCausalLM", "MixtralConfig", rounds=True, num_local_experts=4,
              **_GROUPED, **_ENDS),
    _language("bert", "BertForMaskedLM", "BertConfig", max_position_embeddings=LENGTH, **_SIZES),
    _language("mamba", "MambaForCausalLM", "MambaConfig", rounds=True, hidden_size=16,
              num_hidden_layers=2, state_size=4, **_ENDS),
    _encoder_decoder(
        "t5",
        partial(_hugging_face, "T5ForConditionalGeneration", "T5Config", vocab_size=WORDS,
                d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, use_cache=False,
                decoder_start_token_id=0),
        inputs=together(_IDS, _DECODER_IDS),
    ),
    _encoder_decoder(
        "whisper",
        partial(_hugging_face, "WhisperForConditionalGeneration", "WhisperConfig",
                vocab_size=WORDS, d_model=16, num_mel_bins=8, max_source_positions=10,
                max_target_positions=LENGTH, decoder_start_token_id=1, use_cache=False,
                **_HALVES, **_ENDS),
        inputs=together(numbers(8, 20, name="input_features", rounds=True), _DECODER_IDS),
    ),
    _images("vit", "ViTForImageClassification", "ViTConfig", 16, image_size=16, patch_size=8,
            **_SIZES),
    _images("convnext", "ConvNextForImageClassification", "ConvNextConfig", 32,
            hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
    _images("swin", "SwinForImageClassification", "SwinConfig", 32, image_size=32, embed_dim=8,
            depths=[2, 1], num_heads=[1, 2], window_size=4),
    Architecture("clip", "transformers", _two_towers,
                 together(_IDS, numbers(3, 16, 16, name=_PIXELS)), example_targets=True),
    _timm_images("timm_resnet", "test_resnet", 32),
    _timm_images("timm_efficientnet", "test_efficientnet", 32),
    _timm_images("timm_convnext", "convnext_atto", 32, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
    _timm_images("timm_swin", "swin_tiny_patch4_window7_224", 32, img_size=32, embed_dim=8,
                 depths=(2, 1), num_heads=(1, 2), window_size=4),
    _timm_images("timm_vit_registers", "vit_tiny_patch16_224", 16, img_size=16, patch_size=8,
                 embed_dim=16, num_heads=2, depth=2, reg_tokens=2),
    _timm_images("timm_beit", "beit_base_patch16_224", 16, img_size=16, patch_size=8,
                 embed_dim=16, num_heads=2, depth=2),
    Architecture("timm_mixer", "timm", _mixer, numbers(3, 16, 16)),
)  # fmt: skip

_OF_TOKENS = (
    "gpt2",
    "llama_grouped",
    "gemma",
    "qwen3",
    "mixtral",
    "bert",
    "mamba",
    "t5",
    "whisper",
)
_OF_CLASSES = ("vit", "convnext", "swin")


def _under_its_own_loss(architecture: Architecture) -> Architecture:
    """Return an architecture that is given labels and trains by its own loss."""
    of_tokens = architecture.name in _OF_TOKENS
    labels = labels_of_tokens(LENGTH, WORDS) if of_tokens else classes(5)
    inputs = {"t5": _IDS, "whisper": numbers(8, 20, name="input_features", rounds=True)}
    return replace(
        architecture,
        name=f"{architecture.name}_own_loss",
        inputs=inputs.get(architecture.name, architecture.inputs),
        loss="model",
        labels=labels,
    )


_OWN = (
    *(_under_its_own_loss(one) for one in _WITH_LOGITS if one.name in (*_OF_TOKENS, *_OF_CLASSES)),
    _classifier(
        "bert_sentences_own_loss", "BertForSequenceClassification", classes(3), num_labels=3
    ),
    _classifier(
        "bert_answers_own_loss",
        "BertForQuestionAnswering",
        together(classes(LENGTH, "start_positions"), classes(LENGTH, "end_positions")),
    ),
    _classifier(
        "bert_numbers_own_loss",
        "BertForSequenceClassification",
        numbers(name="labels"),
        num_labels=1,
    ),
)
ARCHITECTURES = (*_WITH_LOGITS, *_OWN)
