"""The plan's tables of rewritten layers and of the operators that compute them."""

from __future__ import annotations

from typing import Any

import torch

from trainc.compiler.bind.binding import Binding
from trainc.compiler.method.layer_hook import LayerHookSite
from trainc.compiler.method.lowered_method import LoweredMethod
from trainc.compiler.method.sites import LayerSite, NormSite
from trainc.compiler.method.term import Term
from trainc.compiler.plan.plan import Row

_TRITON = {
    "layer_norm", "rms_norm", "linear", "embedding", "ghost_batch_norm", "multiplicative_noise",
    "random_entries",
    "cross_entropy_consistency",
}  # fmt: skip
"""The operators with a Triton kernel; the others are compositions of ATen operators on every device."""


def site_rows(binding: Binding, method: LoweredMethod) -> list[Row]:
    """Return one row per rewritten layer: its operator, the pass that inserts it, and what executes it."""
    rewrite = method.rewrite
    modules_only = rewrite.modules_only
    executor = "graph, or module where the model cannot be captured"
    if modules_only is not None:
        executor = f"module: {modules_only}"
    if method.compiled:
        executor += "; compiled by inductor"

    def row(site: str, operator: str, inserted_by: str, executor: str = executor) -> Row:
        return {"site": site, "operator": operator, "pass": inserted_by, "executor": executor}

    rows = [row(s.module, _norm_operator(s), "instrument_norms") for s in rewrite.norms]
    for s in rewrite.layers:
        how = executor if s.tied is None else "module: its weight is shared"
        rows.append(row(s.module, _layer_operator(s, binding), "instrument_layers", how))
    done = [site for site, done in rewrite.replaced() if done]
    rows += [
        row(s.module, _hook_operator(s), s.hook.fused_by or "-")
        for s in rewrite.hooks
        if s not in done
    ]
    joint = _joint(method)
    for term in rewrite.terms.values():
        if term.of_parameters:
            continue
        if term is not joint or term.joint is None:
            loss = method.loss.name if method.loss else ""
            rows.append(row("loss", f"{loss} + {term.label}", "-"))
            continue
        rows.append(row("loss", _name(term.joint.target), "fuse_loss"))
        if modules_only is None:  # which of the two, the captured logits decide
            rows.append(row("loss", _head_operator(_name(term.joint.head_target)), "fuse_head"))
    if rewrite.chunks is not None and joint is None:
        rows.append(row("loss", _chunked_head(rewrite.chunks), "fuse_head"))
    return rows


def kernel_rows(method: LoweredMethod) -> list[Row]:
    """Return the operators in use, what implements each on this machine, and why it is not a Triton kernel."""
    rewrite = method.rewrite
    names = sorted({f"{site.layer_type}_norm" for site in rewrite.norms})
    names += sorted({_operator(site) for site in rewrite.layers})
    names += sorted({s.hook.operator for s in rewrite.hooks if s.hook.operator})
    joint = _joint(method)
    names += [_name(joint.joint.target)] if joint is not None and joint.joint is not None else []
    names += ["linear_cross_entropy"] if rewrite.chunks is not None and joint is None else []
    return [_kernel_row(name) for name in dict.fromkeys(names)]


def _kernel_row(name: str) -> Row:
    reason = _why_no_triton() if name in _TRITON else "no Triton kernel for this operator"
    return {
        "operator": name,
        "implementation": "ATen composition" if reason else "Triton kernel",
        "reason": reason,
    }


def _norm_operator(site: NormSite) -> str:
    return (
        _with_affine(f"{site.layer_type}_norm")
        if site.per_example_gradients
        else f"{site.layer_type}_norm"
    )


def _layer_operator(site: LayerSite, binding: Binding) -> str:
    """Return the operator of a measured layer, with the algorithm that it will choose where that is known."""
    operator, tokens = _operator(site), binding.units.tokens_per_sample
    if operator == "ghost_batch_norm":
        return _with_affine(operator)
    if operator != "linear" or not tokens:
        return operator
    from trainc.kernels.layer.linear_norms import choose

    outputs, inputs = binding.inventory.parameter[site.weight].shape
    return (
        f"linear, {choose(int(tokens), inputs, outputs)} algorithm at {tokens:g} rows per example"
    )


def _hook_operator(site: LayerHookSite) -> str:
    name = site.hook.operator or site.label
    return f"{name}, {site.hook.algorithm}" if site.hook.algorithm else name


def _with_affine(operator: str) -> str:
    return f"{operator}, weight and bias applied by ATen operators"


def _chunked_head(chunks: int) -> str:
    """Return the operator of a loss without logits, as a number of chunks or their size decides."""
    if not chunks:
        return _head_operator("linear_cross_entropy")
    parts = f"{chunks} chunk{'s' * (chunks > 1)}"
    return f"linear_cross_entropy in {parts}, where logits of a linear layer are read by the loss alone"


def _head_operator(name: str) -> str:
    from trainc.compiler.passes.fuse_head import CLASSES

    return f"{name}, where the logits come from a head of {CLASSES} classes or more"


def _joint(method: LoweredMethod) -> Term | None:
    """Return the term that is computed together with the loss."""
    return method.rewrite.joint if method.loss and method.loss.is_cross_entropy else None


def _name(operator: Any) -> str:
    """Return a torch operator's name without its library."""
    return str(operator._schema.name).partition("::")[2]


def _operator(site: LayerSite) -> str:
    if site.layer_type == "batch_norm":
        return "ghost_batch_norm"
    return site.layer_type if site.tied is None else f"tied_{site.layer_type}"


def _why_no_triton() -> str | None:
    from importlib.util import find_spec

    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.version.hip is not None:
        return "the Triton kernels are for NVIDIA's GPUs"
    return None if find_spec("triton") else "triton is not installed"
