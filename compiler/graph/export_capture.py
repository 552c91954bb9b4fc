"""The first capture front end: torch.export."""

from __future__ import annotations

import warnings

import torch
from torch import fx

from trainc.compiler.graph.wrapped_model import WrappedModel
from trainc.runtime.data.batch import Batch


def export_capture(wrapped: WrappedModel, batch: Batch) -> fx.GraphModule:
    """Capture with torch.export, non-strict: it keeps names and parameter objects."""
    with warnings.catch_warnings():
        # torch's notices are about its own internals.
        warnings.simplefilter("ignore")
        module = torch.export.export(wrapped, batch, strict=False).module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    return module
