"""What Triton kernels take, how many programs a launch needs, and how many a device runs at once.

A grid has up to 2^31 - 1 programs along its first axis, but 65535 along the others: what may be more belongs to
the first, several counts as their product.
"""

import torch
from torch import Tensor

from trainc.kernels.library.contracts import REDUCED


def supported(*tensors: Tensor) -> bool:
    """Whether Triton kernels take these tensors; ATen takes float64 and empty ones."""
    return all(t.dtype in (torch.float32, *REDUCED) and t.numel() > 0 for t in tensors)


def power_of_2(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(number - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def resident_programs(device: torch.device, resident: int) -> int:
    """How many programs run at once on a device whose processors hold `resident` each."""
    if device.type != "cuda":
        return resident
    return resident * int(torch.cuda.get_device_properties(device).multi_processor_count)
