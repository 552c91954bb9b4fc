"""Models small enough to train on a laptop, with the names and shapes of the large ones.

Shapes: B examples, T positions, D width, V vocabulary, C channels, K classes.
"""

from dataclasses import dataclass
from math import sqrt
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["layer", "rms"]
NORMS: dict[str, type[nn.LayerNorm] | type[nn.RMSNorm]] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int, dropout: float, causal: bool) -> None:
        super().__init__()
        self.heads, self.dropout, self.causal = heads, dropout, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Mix the positions of each example."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x_BTD).chunk(3, dim=-1)
        )
        p = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=self.causal)
        return F.dropout(self.proj(mixed.transpose(1, 2).flatten(2)), self.dropout, self.training)


class Feedforward(nn.Module):
    """Two linear layers around a GELU, four times as wide inside."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc = nn.Linear(width, 4 * width)
        self.proj = nn.Linear(4 * width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Transform each position on its own."""
        return F.dropout(self.proj(F.gelu(self.fc(x_BTD))), self.dropout, self.training)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, norm: Norm, dropout: float, causal: bool) -> None:
        super().__init__()
        self.ln1 = NORMS[norm](width)
        self.attn = Attention(width, heads, dropout, causal)
        self.ln2 = NORMS[norm](width)
        self.mlp = Feedforward(width, dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Add what attention and the feedforward layers find."""
        x_BTD = x_BTD + self.attn(self.ln1(x_BTD))
        y_BTD: Tensor = x_BTD + self.mlp(self.ln2(x_BTD))
        return y_BTD


def _initialise(model: nn.Module, layers: int) -> None:
    """Initialise as GPT-2 does: Normal(0, 0.02), residual projections smaller by sqrt(2 layers)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            shrink = sqrt(2 * layers) if name.endswith(".proj") else 1.0
            nn.init.normal_(module.weight, std=0.02 / shrink)
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)


class TokenEmbedding(nn.Module):
    """A vector per token plus a vector per position."""

    def __init__(self, vocabulary: int, context: int, width: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Look the ids up."""
        positions_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        x_BTD = self.token(ids_BT) + self.position(positions_T)
        return F.dropout(x_BTD, self.dropout, self.training)


class GPT(nn.Module):
    """A decoder-only transformer: ids (B, T) to logits (B, T, V)."""

    def __init__(
        self,
        layers: int,
        width: int,
        heads: int,
        context: int,
        vocabulary: int,
        norm: Norm,
        dropout: float,
        tied: bool,
    ) -> None:
        super().__init__()
        self.embed = TokenEmbedding(vocabulary, context, width, dropout)
        self.blocks = nn.ModuleList(
            Block(width, heads, norm, dropout, causal=True) for _ in range(layers)
        )
        self.ln_f = NORMS[norm](width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        _initialise(self, layers)
        if tied:
            self.head.weight = self.embed.token.weight

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return the logits of the next token at every position."""
        x_BTD = self.embed(ids_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits_BTV: Tensor = self.head(self.ln_f(x_BTD))
        return logits_BTV


def gpt(
    layers: int = 4,
    width: int = 128,
    heads: int = 4,
    context: int = 128,
    vocabulary: int = 256,
    norm: Norm = "layer",
    dropout: float = 0.0,
    tied: bool = False,
) -> GPT:
    """Build a small GPT; `tied` shares the token embedding with the head."""
    return GPT(layers, width, heads, context, vocabulary, norm, dropout, tied)


@dataclass
class LanguageModelOutput:
    """What a language model returns that is given labels: its loss, and the logits it is of."""

    loss: Tensor | None
    logits: Tensor


class LanguageModel(nn.Module):
    """A GPT that computes its own loss, with the names and the return value of those in transformers."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> LanguageModelOutput:
        """Return logits and, of labels, the mean loss of the next tokens that are not -100."""
        logits_BTV = self.model(input_ids)
        if labels is None:
            return LanguageModelOutput(None, logits_BTV)
        rows_NV = logits_BTV[:, :-1].flatten(0, 1)
        return LanguageModelOutput(F.cross_entropy(rows_NV, labels[:, 1:].flatten()), logits_BTV)


def language_model(
    layers: int = 2, width: int = 64, heads: int = 4, context: int = 24
) -> LanguageModel:
    """Build a small language model with a loss of its own."""
    return LanguageModel(gpt(layers, width, heads, context))


class PatchEmbedding(nn.Module):
    """A vector per image patch plus a vector per position."""

    def __init__(self, image: int, patch: int, channels: int, width: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(channels, width, patch, stride=patch)
        self.position = nn.Embedding((image // patch) ** 2, width)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Cut the images into a row of patches."""
        x_BTD: Tensor = self.patch(images_BCHW).flatten(2).transpose(1, 2)
        y_BTD: Tensor = x_BTD + self.position(torch.arange(x_BTD.shape[1], device=x_BTD.device))
        return y_BTD


class ViT(nn.Module):
    """A vision transformer with mean pooling: images (B, C, H, W) to logits (B, K)."""

    def __init__(
        self,
        image: int,
        patch: int,
        channels: int,
        classes: int,
        layers: int,
        width: int,
        heads: int,
        norm: Norm,
        dropout: float,
    ) -> None:
        super().__init__()
        self.embed = PatchEmbedding(image, patch, channels, width)
        self.blocks = nn.ModuleList(
            Block(width, heads, norm, dropout, causal=False) for _ in range(layers)
        )
        self.ln_f = NORMS[norm](width)
        self.head = nn.Linear(width, classes)
        _initialise(self, layers)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the logits of each image."""
        x_BTD = self.embed(images_BCHW)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits_BK: Tensor = self.head(self.ln_f(x_BTD).mean(1))
        return logits_BK


def vit(
    image: int = 8,
    patch: int = 2,
    channels: int = 1,
    classes: int = 10,
    layers: int = 4,
    width: int = 64,
    heads: int = 4,
    norm: Norm = "layer",
    dropout: float = 0.0,
) -> ViT:
    """Build a small vision transformer; the defaults fit the digits."""
    return ViT(image, patch, channels, classes, layers, width, heads, norm, dropout)


class Residual(nn.Module):
    """Two 3x3 convolutions with batch normalisation around a skip connection."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Add what the convolutions find to the input."""
        y_BCHW = F.relu(self.bn1(self.conv1(x_BCHW)))
        return F.relu(self.skip(x_BCHW) + self.bn2(self.conv2(y_BCHW)))


class ResNet(nn.Module):
    """A residual network: images (B, C, H, W) to logits (B, K)."""

    def __init__(self, channels: int, classes: int, width: int, stages: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        widths = [width, *(width * 2**stage for stage in range(stages))]
        self.stages = nn.ModuleList(
            nn.Sequential(
                Residual(widths[stage], widths[stage + 1], stride=1 if stage == 0 else 2),
                *(Residual(widths[stage + 1], widths[stage + 1], 1) for _ in range(depth - 1)),
            )
            for stage in range(stages)
        )
        self.head = nn.Linear(widths[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the logits of each image."""
        x_BCHW = F.relu(self.bn(self.stem(images_BCHW)))
        for stage in self.stages:
            x_BCHW = stage(x_BCHW)
        logits_BK: Tensor = self.head(x_BCHW.mean((2, 3)))
        return logits_BK


def resnet(
    channels: int = 1, classes: int = 10, width: int = 16, stages: int = 2, depth: int = 1
) -> ResNet:
    """Build a small residual network with batch normalisation; the defaults fit the digits."""
    return ResNet(channels, classes, width, stages, depth)


class Hidden(nn.Module):
    """A linear layer, a norm and a ReLU."""

    def __init__(self, inputs: int, width: int, norm: Norm) -> None:
        super().__init__()
        self.fc = nn.Linear(inputs, width)
        self.norm = NORMS[norm](width)

    def forward(self, x_BD: Tensor) -> Tensor:
        """Return the layer's activations."""
        return F.relu(self.norm(self.fc(x_BD)))


class MLP(nn.Module):
    """A multi-layer perceptron: anything (B, ...) to logits (B, K)."""

    def __init__(self, inputs: int, width: int, layers: int, classes: int, norm: Norm) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(Hidden(width if layer else inputs, width, norm) for layer in range(layers))
        )
        self.head = nn.Linear(width if layers else inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of each example."""
        logits_BK: Tensor = self.head(self.layers(x.flatten(1)))
        return logits_BK


def mlp(
    inputs: int = 64, width: int = 128, layers: int = 2, classes: int = 10, norm: Norm = "layer"
) -> MLP:
    """Build a multi-layer perceptron; the defaults fit the digits."""
    return MLP(inputs, width, layers, classes, norm)


def teacher_student(dimension: int = 32) -> nn.Linear:
    """Build the student of `examples.data:teacher`: a linear map (B, dimension) to (B, 1), at zero.

    From zero its gradient noise is known exactly, see `Teacher.moments`.
    """
    student = nn.Linear(dimension, 1, bias=False)
    nn.init.zeros_(student.weight)
    return student


def tanh_net(width: int = 12) -> nn.Sequential:
    """Build a network with one hidden layer for `examples.data:curve`: (B, 1) to (B, 1)."""
    return nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1))
