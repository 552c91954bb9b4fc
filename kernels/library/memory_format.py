"""The memory format of an operator's results on images: that of its input."""

import torch
from torch import Tensor

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def layout(like: Tensor) -> torch.memory_format:
    """Channels last where `like` is channels last and not contiguous too (as 1x1 images are), else contiguous.

    Kernels and fake kernels both ask here, so that compiled code meets the strides it was promised.
    """
    last = CHANNELS_LAST.get(like.dim())
    if last is not None and not like.is_contiguous() and like.is_contiguous(memory_format=last):
        return last
    return torch.contiguous_format
