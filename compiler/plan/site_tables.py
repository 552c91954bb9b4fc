"""The plan's tables of rewritten layers and of the operators that serve them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from trainc.compiler.bind.binding import Binding
    from trainc.compiler.method.lowered_method import LoweredMethod
    from trainc.compiler.method.sites import LayerSite

Row = dict[str, Any]

_TRITON = {
    "layer_norm", "rms_norm", "linear", "embedding", "ghost_batch_norm", "multiplicative_noise",
    "cross_entropy_consistency",
}  # fmt: skip
"""The operators with a Triton kernel; of the others ATen's compositions run on every device."""


def site_rows(binding: Binding, parts: LoweredMethod) -> list[Row]:
    """Return one row per rewritten layer: the operator it reaches and by which road."""
    rewrite = parts.rewrite
    refused = rewrite.modules_only
    road = (
        "graph; bound module where no graph can hold the model"
        if refused is None
        else f"bound module: {refused}"
    )
    rows = [
        {
            "site": s.module,
            "operator": f"{s.form}_norm" + (", affine part by composition" if s.wide else ""),
            "pass": "instrument_norms",
            "road": road,
        }
        for s in rewrite.norms
    ]
    rows += [
        {
            "site": s.module,
            "operator": _layer_operator(s, binding),
            "pass": "instrument_layers",
            "road": road if s.tied is None else "bound module: its weight is shared",
        }
        for s in rewrite.layers
    ]
    rows += [
        {"site": name, "operator": "ghost_batch_norm", "pass": "-", "road": road}
        for name in rewrite.ghosts
        if all(name != s.module for s in rewrite.layers)
    ]
    rows += [
        {
            "site": s.module,
            "operator": "multiplicative_noise",
            "pass": "add_noise",
            "road": road,
        }
        for s in rewrite.noises
    ]
    if rewrite.pairing is not None:
        fused = parts.loss is not None and parts.loss.name == "cross_entropy"
        operator = (
            "cross_entropy_consistency"
            if fused
            else f"{parts.loss.name if parts.loss else ''} + distance"
        )
        rows.append({"site": "loss", "operator": operator, "pass": "pair_views", "road": road})
        if fused and road.startswith("graph"):  # which of the two, the captured logits decide
            rows.append(
                {"site": "loss", "operator": _through_head(), "pass": "fuse_head", "road": road}
            )
    return rows


def _layer_operator(site: LayerSite, binding: Binding) -> str:
    """Return the operator of a measured layer, with the form that it will choose where that is known."""
    if site.form == "batch_norm":
        return "ghost_batch_norm, affine part by composition"
    if site.tied is not None:
        return f"tied_{site.form}"
    tokens = binding.units.tokens_per_sample
    if site.form != "linear" or not tokens:
        return site.form
    from trainc.kernels.layer.linear import choose

    outputs, inputs = binding.inventory.parameter[site.weight].shape
    return f"linear, {choose(int(tokens), inputs, outputs)} form at {tokens:g} rows an example"


def _through_head() -> str:
    from trainc.compiler.passes.fuse_head import CLASSES

    return f"linear_cross_entropy_consistency, where a head of {CLASSES} classes or more gives the logits"


def kernel_rows(parts: LoweredMethod) -> list[Row]:
    """Return the operators in use, the implementation that will run and why not another."""
    rewrite = parts.rewrite
    names = sorted({f"{site.form}_norm" for site in rewrite.norms})
    names += sorted({_operator(site) for site in rewrite.layers})
    names += ["ghost_batch_norm"] if rewrite.ghosts and "ghost_batch_norm" not in names else []
    names += ["multiplicative_noise"] if rewrite.noises else []
    names += (
        ["cross_entropy_consistency"]
        if rewrite.pairing and parts.loss and parts.loss.name == "cross_entropy"
        else []
    )
    return [_kernel_row(name) for name in dict.fromkeys(names)]


def _kernel_row(name: str) -> Row:
    refused = _triton_refused() if name in _TRITON else "there is none of it"
    return {
        "operator": name,
        "chosen": "ATen composition" if refused else "Triton kernel",
        "refused": f"Triton kernel: {refused}" if refused else None,
    }


def _operator(site: LayerSite) -> str:
    if site.form == "batch_norm":
        return "ghost_batch_norm"
    return site.form if site.tied is None else f"tied_{site.form}"


def _triton_refused() -> str | None:
    from importlib.util import find_spec

    if not torch.cuda.is_available():
        return "no CUDA device"
    return None if find_spec("triton") else "triton is not installed"
