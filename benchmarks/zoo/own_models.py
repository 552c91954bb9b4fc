"""Architectures of plain torch, each with something that a compiler of training methods may stumble over."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.zoo.architecture import Architecture, labels_of_tokens, numbers, tokens
from examples.models import LanguageModel, gpt

WORDS, WIDTH, LENGTH = 24, 16, 6


class Classifier(nn.Module):
    """An LSTM over tokens, and a head on its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * WIDTH, 5)

    def forward(self, ids: Tensor) -> Tensor:
        out, _ = self.lstm(self.embedding(ids))
        found: Tensor = self.head(out[:, -1])
        return found


class Attention(nn.Module):
    """Attention with one weight for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        found: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return found


class Block(nn.Module):
    """Attention and an mlp, each after a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.RMSNorm(WIDTH), Attention()
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        found: Tensor = x + self.mlp(self.norm2(x))
        return found


class TiedText(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(WORDS, WIDTH), blocks
        self.position = nn.Parameter(torch.zeros(LENGTH, WIDTH))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.position
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.head(x)
        return found


class Unet(nn.Module):
    """Down and up again, with the outputs on the way down beside those on the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = _convolution(3, 8), _convolution(8, 16)
        self.middle = _convolution(16, 16)
        self.up2, self.up1 = nn.ConvTranspose2d(16, 16, 2, stride=2), _convolution(32, 8)
        self.last, self.out = _convolution(16, 8), nn.Conv2d(8, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        one = self.down1(image)
        two = self.down2(functional.max_pool2d(one, 2))
        middle = self.middle(functional.max_pool2d(two, 2))
        up = self.up1(torch.cat([self.up2(middle), two], 1))
        up = functional.interpolate(up, scale_factor=2.0)
        found: Tensor = self.out(self.last(torch.cat([up, one], 1)))
        return found


def _convolution(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Spectral(nn.Module):
    """A filter of complex numbers over the frequencies, a layer that is never called, and a buffer."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, WIDTH)
        self.filter = nn.Parameter(torch.randn(WIDTH // 2 + 1, 2) * 0.5 + 0.5)
        self.unused = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("scale", torch.tensor(0.5))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        filtered = torch.fft.rfft(self.stem(x)) * torch.view_as_complex(self.filter)
        found: Tensor = self.head(functional.gelu(torch.fft.irfft(filtered, n=WIDTH)) * self.scale)
        return found


class ComplexWeights(nn.Module):
    """A layer with a complex weight, as torch keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, WIDTH, dtype=torch.complex64) * 0.3)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(
            self.norm((x.to(self.weight.dtype) @ self.weight).abs().to(x.dtype))
        )
        return found


class Experts(nn.Module):
    """Each example goes through the two experts of four that a router gives most weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.router = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate, chosen = self.router(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, which = torch.where(chosen == number)
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]) * gate[rows, which, None])
        found: Tensor = self.head(self.norm(x + out))
        return found


class Twice(nn.Module):
    """One layer under two names, called by both."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.norm, self.second = nn.LayerNorm(8), self.first
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.second(self.norm(functional.gelu(self.first(x)))))
        return found


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Dropout(0.2), nn.Linear(WIDTH, 5)
    )


def _group_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2),
        nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _curve() -> nn.Module:
    return nn.Sequential(nn.Linear(1, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))


def _weight_norm() -> nn.Module:
    normed = nn.utils.parametrizations.weight_norm
    return nn.Sequential(
        normed(nn.Linear(8, WIDTH)), nn.GELU(), nn.LayerNorm(WIDTH), normed(nn.Linear(WIDTH, 5))
    )


def _fused_text() -> nn.Module:
    return TiedText(nn.ModuleList(Block() for _ in range(2)))


def _repeated_text() -> nn.Module:
    return TiedText(nn.ModuleList([Block()] * 2))


class Answers(nn.Module):
    """A language model that is given two answers an example, one below the other."""

    def __init__(self) -> None:
        super().__init__()
        self.model = gpt(1, WIDTH, heads=2, context=LENGTH, vocabulary=WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.model(ids.flatten(0, 1)).unflatten(0, ids.shape[:2])
        return found


_TEXT, _FEATURES, _IMAGE = tokens(LENGTH, WORDS), numbers(8), numbers(3, 16, 16)


def _text_with_loss() -> nn.Module:
    return LanguageModel(gpt(1, WIDTH, heads=2, context=LENGTH, vocabulary=WORDS))


ARCHITECTURES = (
    Architecture("mlp", "torch", _mlp, _FEATURES),
    Architecture("lstm", "torch", Classifier, _TEXT),
    Architecture("cnn_group_norm", "torch", _group_norm, _IMAGE),
    Architecture("encoder", "torch", _encoder, numbers(LENGTH, WIDTH), loss="mse"),
    Architecture("curve", "torch", _curve, numbers(1), loss="mse"),
    Architecture("tied_fused_qkv", "torch", _fused_text, _TEXT),
    Architecture("repeated_block", "torch", _repeated_text, _TEXT),
    Architecture("unet", "torch", Unet, _IMAGE, loss="mse"),
    Architecture("spectral_unused", "torch", Spectral, _FEATURES),
    Architecture("complex_weight", "torch", ComplexWeights, _FEATURES),
    Architecture("experts", "torch", Experts, _FEATURES),
    Architecture("layer_twice", "torch", Twice, _FEATURES),
    Architecture("weight_norm", "torch", _weight_norm, _FEATURES),
    Architecture(
        "text_own_loss",
        "torch",
        _text_with_loss,
        tokens(LENGTH, WORDS, "input_ids"),
        loss="model",
        labels=labels_of_tokens(LENGTH, WORDS),
    ),
    Architecture(
        "text_of_answers",
        "torch",
        Answers,
        tokens(LENGTH, WORDS, answers=2),
        loss="dpo { beta = 0.1 }",
        tokens_as_targets=True,
    ),
)
