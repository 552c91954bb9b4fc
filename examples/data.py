"""Data that is already on the machine: nothing is downloaded, everything is deterministic.

Each function also answers `describe(**arguments)`, the size of its training part, without
loading it.
"""

import hashlib
import os
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor


class Part(Protocol):
    """Examples that can be fetched by index."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the inputs and the targets at `indices`, example axis first."""


@dataclass(frozen=True)
class Data:
    """What trains and what is held out; the two share no example.

    `sha256` names what was read, where that depends on the machine.
    """

    train: Part
    evaluation: Part
    tokens_per_sample: int = 1
    sha256: str = ""
    decode: Callable[[Sequence[int]], str] | None = None
    """Returns the text of ids of tokens, where samples have some."""


@dataclass(frozen=True)
class Examples:
    """Inputs and targets held in memory."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the examples at `indices`."""
        at = torch.as_tensor(indices)
        return self.inputs[at], self.targets[at]


@dataclass(frozen=True)
class Windows:
    """Consecutive windows of a text; the target of each byte is the byte after it."""

    text: Tensor
    context: int

    def __len__(self) -> int:
        return _windows(len(self.text), self.context)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return ids (B, context) and next ids (B, context)."""
        starts = torch.as_tensor(indices) * self.context
        rows = self.text[starts[:, None] + torch.arange(self.context + 1)].long()
        return rows[:, :-1], rows[:, 1:]


def _windows(length: int, context: int) -> int:
    return max(0, (length - 1) // context)


@cache
def _sources() -> tuple[Path, ...]:
    """List the standard library's own modules, without tests and code tables.

    The order is that of a hash of the path: alphabetical order would cut whole topics off the
    end, and the held-out part would be unlike the rest.
    """
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"__pycache__", "encodings", "idle_test", "pydoc_data", "test", "tests"}
    found = []
    for folder, folders, files in os.walk(root):
        if Path(folder) == root:  # site-packages and files generated for this machine lie here too
            folders[:] = [name for name in folders if name in sys.stdlib_module_names]
            files = [name for name in files if name.removesuffix(".py") in sys.stdlib_module_names]
        folders[:] = [name for name in folders if name not in left_out]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    names = {path: path.relative_to(root).as_posix() for path in found}
    return tuple(sorted(found, key=lambda path: hashlib.sha256(names[path].encode()).digest()))


def _code(limit: int) -> bytes:
    text = bytearray()
    for path in _sources():
        if len(text) >= limit:
            break
        text += path.read_bytes()
    return bytes(text[:limit])


def _prose(limit: int) -> bytes:
    from pydoc_data.topics import topics

    return "\n".join(text for _, text in sorted(topics.items())).encode()[:limit]


def _cut(length: int, evaluation_share: float) -> int:
    """Return where the training part ends."""
    return length - int(length * evaluation_share)


def stdlib(
    context: int = 128,
    part: Literal["code", "prose"] = "code",
    evaluation_share: float = 0.1,
    limit_bytes: int = 4_000_000,
) -> Data:
    """Read Python's own library, byte by byte: its sources (`code`) or its reference (`prose`).

    The vocabulary is the 256 bytes. The text changes with the Python version: `sha256` says which.
    """
    text = _code(limit_bytes) if part == "code" else _prose(limit_bytes)
    ids = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())
    middle = _cut(len(ids), evaluation_share)
    return Data(
        Windows(ids[:middle], context),
        Windows(ids[middle:], context),
        tokens_per_sample=context,
        sha256=hashlib.sha256(text).hexdigest(),
        decode=lambda ids: bytes(ids).decode("utf-8", "replace"),
    )


def _describe_stdlib(
    context: int = 128,
    part: Literal["code", "prose"] = "code",
    evaluation_share: float = 0.1,
    limit_bytes: int = 4_000_000,
) -> dict[str, int]:
    if part == "code":
        length = min(limit_bytes, sum(path.stat().st_size for path in _sources()))
    else:
        length = len(_prose(limit_bytes))
    samples = _windows(_cut(length, evaluation_share), context)
    return {"samples": samples, "tokens_per_sample": context}


stdlib.describe = _describe_stdlib  # type: ignore[attr-defined]

DIGITS = 1797


def digits(evaluation_share: float = 0.2, seed: int = 0) -> Data:
    """Load scikit-learn's handwritten digits: images (B, 1, 8, 8), mean 0, deviation 1, 10 classes.

    `seed` decides which images are held out.
    """
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)
    labels = torch.as_tensor(classes, dtype=torch.long)
    order = torch.randperm(DIGITS, generator=torch.Generator().manual_seed(seed))
    middle = _cut(DIGITS, evaluation_share)
    train, held_out = order[:middle], order[middle:]
    images = (images - images[train].mean()) / images[train].std()
    return Data(
        Examples(images[train], labels[train]), Examples(images[held_out], labels[held_out])
    )


def _describe_digits(evaluation_share: float = 0.2, seed: int = 0) -> dict[str, int]:
    return {"samples": _cut(DIGITS, evaluation_share), "tokens_per_sample": 1}


digits.describe = _describe_digits  # type: ignore[attr-defined]


def some_digits(first: int = 0, images: int = 0, seed: int = 0) -> Data:
    """Load the digits of five classes from `first` on, numbered from 0: images (B, 1, 8, 8), mean 0, deviation 1.

    `images` of each class train, drawn by `seed`, and the others are held out; with 0 nine tenths train. Mean and
    deviation are those of all ten classes.
    """
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    pictures = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)
    pictures = (pictures - pictures.mean()) / pictures.std()
    labels = torch.as_tensor(classes, dtype=torch.long) - first
    source = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor]] = [[], []]
    for label in range(5):
        own = (labels == label).nonzero().flatten()
        own = own[torch.randperm(len(own), generator=source)]
        middle = images or _cut(len(own), 0.1)
        for part, at in zip(parts, (own[:middle], own[middle:]), strict=True):
            part.append(at)
    train, held_out = (torch.cat(part) for part in parts)
    mixed = held_out[torch.randperm(len(held_out), generator=source)]
    return Data(Examples(pictures[train], labels[train]), Examples(pictures[mixed], labels[mixed]))


def _describe_some_digits(first: int = 0, images: int = 0, seed: int = 0) -> dict[str, int]:
    samples = 5 * images or len(some_digits(first, images, seed).train)
    return {"samples": samples, "tokens_per_sample": 1}


some_digits.describe = _describe_some_digits  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Teacher(Data):
    """Regression on a linear teacher: y = x . weight + noise * e, with x and e standard normal."""

    weight: Tensor = field(kw_only=True)
    noise: float = field(kw_only=True)

    def moments(self, weight: Tensor) -> tuple[float, float]:
        """Return tr(Sigma) and |G|^2 of the squared error of a linear student at `weight`.

        With d dimensions and distance s = |weight - teacher|, the gradient of one example's
        (x . weight - y)^2 has mean G, |G|^2 = 4 s^2, and covariance Sigma,
        tr(Sigma) = 4 ((d + 1) s^2 + d noise^2), over fresh draws of x and e. The simple noise
        scale of a batch is their ratio.
        """
        distance = weight.detach().flatten().double() - self.weight.double()
        squared = float(distance.square().sum())
        d = self.weight.numel()
        return 4 * ((d + 1) * squared + d * self.noise**2), 4 * squared


def teacher(
    samples: int = 16384, dimension: int = 32, noise: float = 0.5, seed: int = 0
) -> Teacher:
    """Draw inputs (B, dimension) and targets (B, 1) from a linear teacher of unit length.

    One example is held out for every eight that train. A student at zero sees
    tr(Sigma) = 4 (dimension + 1 + dimension * noise^2) and |G|^2 = 4.
    """
    source = torch.Generator().manual_seed(seed)
    total = samples + samples // 8
    weight = torch.randn(dimension, generator=source)
    weight /= weight.norm()
    inputs = torch.randn(total, dimension, generator=source)
    targets = inputs @ weight[:, None] + noise * torch.randn(total, 1, generator=source)
    return Teacher(
        Examples(inputs[:samples], targets[:samples]),
        Examples(inputs[samples:], targets[samples:]),
        weight=weight,
        noise=noise,
    )


def _describe_teacher(
    samples: int = 16384, dimension: int = 32, noise: float = 0.5, seed: int = 0
) -> dict[str, int]:
    return {"samples": samples, "tokens_per_sample": 1}


teacher.describe = _describe_teacher  # type: ignore[attr-defined]


class Sums:
    """Questions such as `17+5=22`, each a dict as a collator makes them: only the answer has labels."""

    def __init__(self, seed: int, count: int, length: int) -> None:
        self.pairs = np.random.default_rng(seed).integers(0, 10**4, (count, 2)).tolist()
        self.length = length

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return ids and labels, padded; -100 marks what is not to be learnt."""
        one, other = self.pairs[index]
        question, answer = f"{one}+{other}=".encode(), f"{one + other}\n".encode()
        ids, labels = torch.zeros(self.length, dtype=torch.long), torch.full((self.length,), -100)
        text = torch.tensor([*question, *answer])
        ids[: len(text)], labels[len(question) : len(text)] = text, text[len(question) :]
        return {"input_ids": ids, "labels": labels}


def sums(count: int = 4000, length: int = 24) -> tuple[Sums, Sums]:
    """Return questions to train on and, of another seed, to evaluate on."""
    return Sums(0, count, length), Sums(1, count // 10, length)


def _describe_sums(count: int = 4000, length: int = 24) -> dict[str, int]:
    return {"samples": count, "tokens_per_sample": length}


sums.describe = _describe_sums  # type: ignore[attr-defined]


def curve(
    points: int = 64, amplitudes: Sequence[float] = (1.0, 0.6, 0.4)
) -> tuple[Examples, Examples]:
    """Return points of sin x, sin 3x and sin 5x with these amplitudes on a uniform grid of [-pi, pi), twice.

    What is held out is what trains: how well the curve between points is guessed is not the question.
    """
    inputs, targets = curve_points(points, amplitudes)
    return Examples(inputs, targets), Examples(inputs, targets)


def curve_points(
    points: int = 64, amplitudes: Sequence[float] = (1.0, 0.6, 0.4)
) -> tuple[Tensor, Tensor]:
    """Return the inputs (points, 1) and the targets (points, 1) of `curve`."""
    x = torch.arange(points, dtype=torch.float64)[:, None] / points * 2 * torch.pi - torch.pi
    y = sum((a * (k * x).sin() for a, k in zip(amplitudes, (1, 3, 5), strict=True)), 0 * x)
    return x.float(), y.float()


def rising_curve_points() -> tuple[Tensor, Tensor]:
    """Return the points of a curve whose amplitudes rise with the frequency."""
    return curve_points(amplitudes=(0.4, 0.6, 1.0))


def _describe_curve(
    points: int = 64, amplitudes: Sequence[float] = (1.0, 0.6, 0.4)
) -> dict[str, int]:
    return {"samples": points, "tokens_per_sample": 1}


curve.describe = _describe_curve  # type: ignore[attr-defined]


def sines(task: int = 0, points: int = 10) -> tuple[Examples, Examples]:
    """Return points of a sine wave of the task's own amplitude and phase, to train on and others to evaluate on."""
    source = torch.Generator().manual_seed(task)
    height, phase = (float(one) for one in torch.rand(2, generator=source))
    x = 10 * torch.rand(2 * points, 1, generator=source) - 5
    y = (0.1 + 4.9 * height) * (x + torch.pi * phase).sin()
    return Examples(x[:points], y[:points]), Examples(x[points:], y[points:])


def _describe_sines(task: int = 0, points: int = 10) -> dict[str, int]:
    return {"samples": points, "tokens_per_sample": 1}


sines.describe = _describe_sines  # type: ignore[attr-defined]
