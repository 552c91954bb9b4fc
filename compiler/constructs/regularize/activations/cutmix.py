"""CutMix: training on images with a box of another image in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainc.compiler.constructs.regularize.activations._mixtures import Mixture
from trainc.compiler.errors import SiteError
from trainc.dsl.reading.construct import Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.lower.lowering import Lowering


class Cutmix(Mixture):
    """Puts a box of image j into image i, and mixes the targets by the part of i that stays.

    With part ~ Beta(alpha, alpha) the box has sqrt(1 - part) of height and width, rounded down, and its
    center anywhere in the image; what of it lies outside is cut off, and the targets are mixed by the
    pixels that were left. j is a random order of the micro-batch; the box is drawn once for a step, as
    published, or for each example. The targets of `loss cross_entropy` become probabilities; targets
    that are numbers are averaged. Every example counts as one, as without it. The inputs are
    (examples, channels, height, width), floating-point numbers. Evaluation mixes nothing.
    """

    cite: ClassVar = (
        "Yun et al., CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features, "
        "ICCV 2019, arXiv:1905.04899, eqs. 1 and 2"
    )
    usage: ClassVar = "regularize cutmix { alpha = 1, probability = 50% }"

    alpha: Schedule = Field(
        description="both parameters of the Beta distribution; 1 as published, and at 0 nothing is mixed"
    )

    def lower(self, to: Lowering) -> None:
        """Mix every micro-batch before its first pass."""
        self.lower_with(to, self.alpha, mix)

    @staticmethod
    def box(part: float, row: float, column: float, *, height: int, width: int) -> tuple[int, ...]:
        """Return first and last row, then first and last column, ends excluded; the center is at two fractions."""
        sizes = [int(size * (1 - part) ** 0.5) for size in (height, width)]
        places = [int(row * height), int(column * width)]
        ends = [
            (max(place - size // 2, 0), min(place + size // 2, whole))
            for place, size, whole in zip(places, sizes, (height, width), strict=True)
        ]
        return (*ends[0], *ends[1])

    @classmethod
    def reference(cls, x: Tensor, order: Tensor, numbers: Tensor) -> tuple[Tensor, list[float]]:
        """Return mixed images (B, C, H, W), one by one, and which part of each stays; `numbers` are (B, 3)."""
        mixed, height, width = x.clone(), *x.shape[-2:]
        kept = []
        for i, drawn in enumerate(numbers.tolist()):
            top, bottom, left, right = cls.box(*drawn, height=height, width=width)
            mixed[i, :, top:bottom, left:right] = x[order[i], :, top:bottom, left:right]
            kept.append(1 - (bottom - top) * (right - left) / (height * width))
        return mixed, kept


def mix(name: str, inputs: list[Tensor], order: Tensor, numbers: Tensor) -> list[Tensor]:
    """Return the part of each image that stays, and the mixed images; raises SiteError for what is no image."""
    import torch

    for x in inputs:
        if x.dim() != 4 or x.shape[-2:] != inputs[0].shape[-2:]:
            raise SiteError(
                f"`{name}` cuts boxes out of images (examples, channels, height, width), and an input has"
                f" shape {tuple(x.shape)}: use `regularize mixup`, or remove the clause",
                name,
            )
    height, width = inputs[0].shape[-2:]
    boxes = torch.tensor(
        [Cutmix.box(*drawn, height=height, width=width) for drawn in numbers.tolist()],
        device=order.device,
    )
    top, bottom, left, right = (edge[:, None] for edge in boxes.unbind(1))
    rows, columns = (torch.arange(n, device=order.device)[None] for n in (height, width))
    inside = ((rows >= top) & (rows < bottom))[:, :, None]
    inside = inside & ((columns >= left) & (columns < right))[:, None, :]
    kept = 1 - inside.double().mean((1, 2))
    return [kept, *(torch.where(inside[:, None], x[order], x) for x in inputs)]
