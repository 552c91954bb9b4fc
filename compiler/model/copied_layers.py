"""Layers that were copied together with a model that a program has bound."""

from __future__ import annotations

from typing import Any

from torch import nn


def release_copies(model: nn.Module) -> None:
    """Give copies of bound layers their own classes back: a program knows the layers alone that it has bound itself."""
    for module in model.modules():
        layer: Any = module
        if hasattr(type(module), "unbound") and getattr(
            vars(module).get("trainc"), "is_copy", False
        ):
            layer.__class__ = layer.unbound
            del layer.trainc
