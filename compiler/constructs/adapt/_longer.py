"""A sequence with prompts in it, and what else a block is given with it: masks and positions."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from trainc.compiler.errors import SiteError

if TYPE_CHECKING:
    from torch import Tensor, nn

_POSITIONS = ("position_ids", "cache_position", "positions")
_ROTARY = ("position_embedding", "rotary", "rope", "freqs", "cos", "sin")
_OTHERS = ("encoder_", "memory", "past_key")
"""Beginnings of names of inputs that belong to another sequence."""


class Longer:
    """The inputs of one block of a model, whose sequence x has `tokens` prompts more from position `at` on.

    `already` of them are in x. Raises SiteError for an input that this cannot be said of.
    """

    def __init__(
        self, layer: nn.Module, adapter: Any, at: int, tokens: int, x: Any, already: int
    ) -> None:
        import torch

        self.layer, self.adapter, self.at, self.tokens = layer, adapter, at, tokens
        if not isinstance(x, torch.Tensor) or x.dim() != 3 or not x.is_floating_point():
            found = f"{tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
            raise self.error(f"gets {found} first, and prompts need a sequence (B, T, C)")
        if any(getattr(m, "batch_first", True) is False for m in layer.modules()):
            raise self.error(
                "has its examples on the second axis: build it with `batch_first=True`"
            )
        self.examples, self.length = x.shape[0], x.shape[1] - already
        if at > self.length:
            raise self.error(f"gets {self.length} tokens, and `at` is {at}", "at")

    def error(self, what: str, field: str = "") -> SiteError:
        """Return an error about the block."""
        message = f"`{self.adapter.layer_name}` {what}. Change that, or select other blocks"
        return SiteError(message, self.adapter.label, field)

    def with_prompts(self, x: Tensor, prompts: Tensor) -> Tensor:
        """Return the sequence with the prompts (tokens, C) in it."""
        if x.shape[2] != prompts.shape[1]:
            raise self.error(
                f"gets {x.shape[2]} channels, but its prompts have {prompts.shape[1]}: write `width = {x.shape[2]}`"
            )
        return self._with(x, prompts.to(x.dtype).expand(len(x), -1, -1), 1)

    def inputs(
        self, x: Tensor, key: str | None, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the inputs by position and by name, with x in the place of the first."""
        own = getattr(type(self.layer), "unbound", type(self.layer))
        names = [*inspect.signature(own.forward).parameters][1:]
        names += [""] * (len(args) - len(names))
        others = [self._fitting(n, v) for n, v in zip(names[1:], args[1:], strict=False)]
        by_name = {n: x if n == key else self._fitting(n, v) for n, v in named.items()}
        return ((x, *others) if args else ()), by_name

    def _fitting(self, name: str, value: Any) -> Any:
        """Return another input of the block, with entries for the prompts where it has one for each token."""
        import torch

        if name.startswith(_OTHERS):
            return value
        if isinstance(value, (tuple, list)) and value and all(map(torch.is_tensor, value)):
            return type(value)(self._fitting(name, one) for one in value)
        if not isinstance(value, torch.Tensor):
            if value is not None and "mask" in name and not isinstance(value, bool):
                raise self.error(
                    f"gets `{name}`, a {type(value).__name__}, in which prompts have no place: use an attention whose"
                    " masks are tensors, such as sdpa"
                )
            return value
        if "mask" in name:
            return self._mask(name, value)
        if any(word in name for word in _POSITIONS) and value.shape[-1:] == (self.length,):
            return self._copied(value, -1)
        if any(word in name for word in _ROTARY) and value.shape[-2:-1] == (self.length,):
            return self._copied(value, -2)
        if self.length in value.shape:
            raise self.error(
                f"gets `{name}` of shape {tuple(value.shape)} besides its sequence of {self.length} tokens, and it is"
                " not known what that is for a prompt"
            )
        return value

    def _mask(self, name: str, mask: Tensor) -> Tensor:
        """Return a mask of padding (B, T), or of attention (..., T, T) or (..., 1, T), for the longer sequence."""
        import torch

        kinds = (torch.nn.TransformerEncoderLayer, torch.nn.TransformerDecoderLayer)
        of_torch = isinstance(
            self.layer, (*kinds, torch.nn.TransformerEncoder, torch.nn.TransformerDecoder)
        )
        hides: bool | Tensor = "key_padding" in name or of_torch
        if mask.shape[-1] != self.length:
            raise self.error(
                f"gets `{name}` of shape {tuple(mask.shape)} with {self.length} tokens: generating with a cache is not"
                " supported (`use_cache=False`)"
            )
        of_tokens = of_torch or mask.shape[0] != self.examples
        square = mask.dim() > 2 or (of_tokens and "key_padding" not in name)
        if square and mask.shape[-2] == self.length:
            if mask.dtype == torch.bool and not of_torch:  # a token sees itself
                hides = ~mask.diagonal(dim1=-2, dim2=-1).any()
            return self._attention(mask, _visible(mask, hides), hides)
        visible = _visible(mask, hides)
        if mask.dim() == 2 and not hides:  # 1 for tokens and 0 for padding, in whatever dtype
            return self._with(mask, mask.new_ones(len(mask), self.tokens), 1)
        column = visible.new_ones(()).expand(*mask.shape[:-1], self.tokens)
        return self._with(mask, _in_form(column, mask, hides), -1)

    def _attention(self, mask: Tensor, visible: Tensor, hides: bool | Tensor) -> Tensor:
        """Return a mask (..., T, T) with rows and columns of the prompts; where it is causal, in their order."""
        import torch

        shape, n, size = mask.shape[:-2], self.tokens, self.length
        both_ways = visible.triu(1).any()
        places = torch.arange(size, device=mask.device)
        sees_prompts = (places >= self.at) | both_ways
        columns = sees_prompts[:, None].expand(*shape, size, n)
        tokens = visible.any(-2, keepdim=True) & ((places < self.at) | both_ways)
        prompts = torch.ones(n, n, dtype=torch.bool, device=mask.device).tril() | both_ways
        rows = torch.cat(
            [
                tokens[..., : self.at].expand(*shape, n, self.at),
                prompts.expand(*shape, n, n),
                tokens[..., self.at :].expand(*shape, n, size - self.at),
            ],
            -1,
        )
        wide = self._with(mask, _in_form(columns, mask, hides), -1)
        return self._with(wide, _in_form(rows, mask, hides), -2)

    def _copied(self, value: Tensor, axis: int) -> Tensor:
        """Return values of the tokens with those of the token before the prompts, or of the first, for the prompts."""
        before = value.narrow(axis, max(self.at - 1, 0), 1)
        return self._with(value, before.repeat_interleave(self.tokens, axis), axis)

    def _with(self, value: Tensor, more: Tensor, axis: int) -> Tensor:
        """Return a tensor of the tokens with that of the prompts in its place along an axis."""
        import torch

        size = value.shape[axis]
        if not self.at:
            return torch.cat([more, value], axis)
        first, rest = (
            value.narrow(axis, 0, self.at),
            value.narrow(axis, self.at, size - self.at),
        )
        return torch.cat([first, more, rest], axis)


def _visible(mask: Tensor, hides: bool | Tensor) -> Tensor:
    """Return where a mask lets see: where it is true, or false if it `hides`; of numbers to add where they are not
    hugely negative."""
    import torch

    if mask.is_floating_point():
        return mask > torch.finfo(mask.dtype).min / 2
    return (mask != 0) ^ hides


def _in_form(visible: Tensor, mask: Tensor, hides: bool | Tensor) -> Tensor:
    """Return what lets see where `visible` is true, in the dtype and sense of a mask."""
    import torch

    if mask.is_floating_point():
        hidden = torch.finfo(mask.dtype).min
        return torch.zeros_like(visible, dtype=mask.dtype).masked_fill(~visible, hidden)
    return (visible ^ hides).to(mask.dtype)
