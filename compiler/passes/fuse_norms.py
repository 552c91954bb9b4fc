"""Fuse normalization layers into one operator each, which can then measure per-example norms."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from trainc.compiler.errors import SiteMissing, SiteUnfit, listed
from trainc.compiler.graph.forward_graph import ForwardGraph, arguments, call_site
from trainc.compiler.method.sites import NormSite, Rewrite
from trainc.compiler.passes.pass_base import FusingPass
from trainc.compiler.passes.site_checks import check_weight_uses
from trainc.compiler.patterns.norm_calls import NormCall, norm_calls
from trainc.kernels.norm import layer_norm as _layer_norm  # noqa: F401  (registers the operator)
from trainc.kernels.norm.rms_norm import default_eps

COMPILED_ON = "cuda"
"""Where compiled code fuses a norm with what is around it, better than an operator could."""


class FuseNorms(FusingPass):
    """Replaces each selected norm by one operator, whichever operators compute it.

    Norms that nothing measures are left to the compiler where there is one for CUDA: an operator would keep it from
    fusing them with what is before and behind.
    """

    name = "fuse_norms"
    purpose = "turn the selected normalization layers into one operator each"

    def run(self, forward: ForwardGraph, rewrite: Rewrite) -> list[str]:
        """Rewrite every norm site."""
        found = locate(forward, rewrite)
        missing = [site.module for site in rewrite.fused_norms if site.module not in found]
        if missing:
            raise SiteMissing(self.name, missing)
        fused: dict[fx.Node, fx.Node] = {}
        measured = {site.module for site in rewrite.norms}
        left: list[str] = []
        for site in rewrite.fused_norms:
            call = found[site.module]
            on = call.result.meta["val"].device.type
            if rewrite.compiled and on == COMPILED_ON and site.module not in measured:
                left.append(site.module)
                continue
            fused[call.result] = self.fuse(forward, site, call, fused.get(call.x, call.x))
        if left:
            forward.notes.append(
                f"the compiler fuses {len(left)} norms itself, which nothing measures: {listed(left)}"
            )
        return list(found)

    def fuse(self, forward: ForwardGraph, site: NormSite, call: NormCall, x: fx.Node) -> fx.Node:
        """Replace one norm of `x`; `x` may be the result of a norm fused before."""
        given: tuple[Any, ...]
        shape = list(call.shape)
        eps = default_eps(x.meta["val"].dtype) if call.eps is None else call.eps
        if site.layer_type == "layer":
            operation = torch.ops.trainc.layer_norm.default
            given = (x, shape, call.weight, call.bias, None, eps)
        else:
            operation = torch.ops.trainc.rms_norm.default
            given = (x, shape, call.weight, None, eps, call.casting or site.casting)
        with forward.graph.inserting_before(call.result):
            (result,) = forward.results_of(operation, given, call.result)
        old, new = call.result.meta["val"], result.meta["val"]
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise SiteUnfit(
                site.module,
                f"the layer gives {old.dtype} {list(old.shape)}, but the operator that would replace it "
                f"gives {new.dtype} {list(new.shape)}",
            )
        call.result.replace_all_uses_with(result)
        forward.graph.erase_node(call.result)
        return result


def fused_norm(forward: ForwardGraph, site: NormSite, targets: Iterable[Any]) -> fx.Node | None:
    """Return the call of one of our operators that serves a site and has no probe yet."""
    name = None if site.weight is None else forward.canonical_name(site.weight)
    for node in forward.calls():
        if node.target not in targets:
            continue
        given = arguments(node)
        mine = forward.tensor_name(given["weight"]) == name
        if mine and given["probe"] is None and (name or call_site(node) == site.module):
            return node
    return None


def locate(forward: ForwardGraph, rewrite: Rewrite) -> dict[str, NormCall]:
    """Return the one call of each norm site, found by its weight, else by its module."""
    calls = list(norm_calls(forward.graph))
    found: dict[str, NormCall] = {}
    for site in rewrite.fused_norms:
        mine = [
            call
            for call in calls
            if call.layer_type == site.layer_type and _belongs(forward, site, call)
        ]
        if not mine:
            continue
        check_weight_uses(forward, site.module, site.weight, len(mine))
        found[site.module] = mine[0]
    return found


def _belongs(forward: ForwardGraph, site: NormSite, call: NormCall) -> bool:
    if site.weight is None or call.weight is None:
        return site.weight is None and call.weight is None and call_site(call.result) == site.module
    return forward.tensor_name(call.weight) == forward.canonical_name(site.weight)
