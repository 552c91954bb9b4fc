"""Fused norms: one operator for a norm with its backward pass, and for the residual sum before it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from trainc.dsl.reading.construct import Construct, Effect, Problem

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering


class Fuse(Construct):
    """Computes each selected norm by one operator, and on CUDA together with a residual sum before it.

    LayerNorm and RMSNorm layers of torch, and those of other libraries that compute the same. Nothing is
    measured, and the numbers are those of the layer up to rounding. In a captured graph a pass finds
    the norm, however its operators are written out, and another one the sum of two tensors that
    it reads first; modules run the norm alone. The plan lists the norms, and the notes of a
    step's first graph the sums. Norms that a `noise_scale` measures are computed so without this clause.
    """

    cite: ClassVar = (
        "Ba, Kiros and Hinton, Layer Normalization, 2016, arXiv:1607.06450; Zhang and Sennrich, Root Mean Square Layer "
        "Normalization, NeurIPS 2019, arXiv:1910.07467"
    )
    usage: ClassVar = "normalize fuse"
    targets: ClassVar = "modules"
    default_on: ClassVar = "role(norm)"
    effects: ClassVar = (
        Effect("forward", "compute norms by one operator each", ("inputs",), ("forward",)),
    )

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report layers that are no LayerNorm and no RMSNorm."""
        for module in bound.modules:
            if not any(name.endswith(("LayerNorm", "RMSNorm")) for name in module.types):
                yield Problem(
                    "wrong-target-kind",
                    f"`{module.name}` is a {module.types[0]}; operators are for LayerNorm and RMSNorm layers",
                    help="select these: `on type(LayerNorm, RMSNorm)`",
                )
                return

    def lower(self, to: Lowering) -> None:
        """Ask for the operator at each norm; raises ValueError for a layer that computes something else."""
        from trainc.compiler.errors import NotMeasurable
        from trainc.compiler.layers.norm import FusedNorm, norm_site

        to.refuse_times("norms are fused in the whole run", "from", "until", "every")
        for module in to.modules():
            layer = to.model.get_submodule(module.name)
            try:
                site = norm_site(module.name, layer)
            except NotMeasurable:
                raise ValueError(
                    f"`{module.name}` ({type(layer).__name__}) does not compute what LayerNorm or RMSNorm does: exclude"
                    " it from `on`"
                ) from None
            to.layer(module.name, FusedNorm(site))

    @staticmethod
    def reference(
        x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, rms: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the sum of two tensors (..., C) and its norm over the last axis, by definition."""
        total = x + residual
        centered = total if rms else total - total.mean(-1, keepdim=True)
        normal = centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt()
        return total, normal * weight if bias is None else normal * weight + bias
