"""Examples as text: the class, the value or the tokens of each, and which of them are pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trainc.runtime.data.batch import Batch, one_of

LENGTH = 60
"""The most characters of an example's text."""
TEXTS = 4
"""The most texts of an example that are shown."""
SIDE = 4
"""The shortest side of a picture, in pixels."""

Decode = Callable[[list[int]], str]


def picture(inputs: Any) -> Tensor | None:
    """Return the input of one example, without its axis of examples, as a picture: (H, W) or (H, W, 3), from 0 to 1."""
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        return None
    found = inputs[0].detach().float().cpu()
    if found.dim() == 3 and found.shape[0] in (1, 3):
        found = found.permute(1, 2, 0).squeeze(-1)
    color = found.dim() == 3 and found.shape[-1] == 3
    if not (found.dim() == 2 or color) or min(found.shape[:2]) < SIDE:
        return None
    low, high = float(found.min()), float(found.max())
    return (found - low) / (high - low) if high > low else torch.zeros_like(found)


def text_of(batch: Batch, decode: Decode | None) -> str:
    """Return one example in a few words: its tokens as text where it is known how, and its target."""
    inputs, targets = batch
    tokens = _tokens(inputs)
    said = []
    for ids in tokens:
        text = " ".join(map(str, ids)) if decode is None else decode(ids)
        said.append(_short(text if decode is None else repr(text)))
    named = targets if isinstance(targets, Mapping) else {"target": one_of(targets)}
    for name, values in named.items():
        target = values[0]
        if target.dim() == 0:
            value = target.item()
            said.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
        elif not tokens and target.numel() <= 8:
            said.append(f"{name} {[round(float(x), 4) for x in target.flatten()]}")
    return ", ".join(said) or "neither tokens nor a few numbers"


def _tokens(inputs: Any) -> list[list[int]]:
    """Return the ids of an example's tokens, where an input is one: of each of its texts, if it has several."""
    values = inputs.values() if isinstance(inputs, dict) else inputs
    every = [inputs] if isinstance(inputs, Tensor) else values
    for one in every:
        if isinstance(one, Tensor) and one.dtype in (torch.int32, torch.int64):
            if one.dim() == 2:
                return [[int(i) for i in one[0]]]
            if one.dim() == 3 and one.shape[1] <= TEXTS:
                return [[int(i) for i in text] for text in one[0]]
    return []


def _short(text: str) -> str:
    return text if len(text) <= LENGTH else text[: LENGTH - 3] + "..."
