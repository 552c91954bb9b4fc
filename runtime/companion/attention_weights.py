"""Attention weights, read where a module computes them in its passes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

SOFTMAX = (torch.softmax, Tensor.softmax, F.softmax)


class AttentionWeights(TorchFunctionMode):
    """Shows the attention weights of passes in its block to `see(module, weights)`, call by call.

    `module` is the name of the innermost module that runs, `weights` are (..., heads, queries, keys), without gradient.
    Seen are torch's scaled_dot_product_attention, nn.MultiheadAttention, and a softmax over the last of four axes or
    more. Attention in an operator of its own (FlashAttention's package, xFormers, flex attention) is not. What the
    passes compute stays the same, up to the rounding of another kernel.
    """

    def __init__(self, module: nn.Module, see: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self._module, self._see = module, see
        self._running: list[str] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> AttentionWeights:
        for name, module in self._module.named_modules():
            self._hooks += [
                module.register_forward_pre_hook(partial(self._begin, name)),
                module.register_forward_hook(self._end),
            ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._running = [], []

    def _begin(self, name: str, module: nn.Module, args: Any) -> None:
        self._running.append(name)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            return self._multi_head(func, args, kwargs)
        found = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self._show(weights_of(*args, **kwargs))
        elif func in SOFTMAX and found.dim() >= 4 and _axis(args, kwargs) in (-1, found.dim() - 1):
            self._show(found)
        return found

    def _multi_head(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return what nn.MultiheadAttention's function does, which gives its weights where it is asked for them."""
        asked = kwargs.get("need_weights", True)
        averaged = kwargs.get("average_attn_weights", True)
        given = {**kwargs, "need_weights": True, "average_attn_weights": False}
        output, weights = func(*args, **given)
        self._show(weights)
        if not asked:
            return output, None
        return output, weights.mean(-3) if averaged else weights

    def _show(self, weights: Tensor) -> None:
        self._see(self._running[-1] if self._running else "", weights.detach())


def _axis(args: Any, kwargs: dict[str, Any]) -> Any:
    """Return over which axis a call of softmax is."""
    return kwargs.get("dim", args[1] if len(args) > 1 else None)


def weights_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return the weights (..., queries, keys) that torch's scaled_dot_product_attention uses, without dropout.

    It takes the same arguments. A query that may see no key has the weights 0.
    """
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    if attn_mask is not None:
        hidden = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if hidden else scores + attn_mask
    return scores.softmax(-1).nan_to_num(0.0)
