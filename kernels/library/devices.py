"""CUDA kernels run on the device of their tensors, whichever device is the current one.

torch calls AMD's GPUs CUDA devices too. The Triton kernels are not for these: they ask for options, properties and
instructions of NVIDIA's, and rely on its order of memory. There the ATen composition runs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from trainc.kernels.library.calls import tensors


def cuda_kernel(name: str, cpu: Callable[..., Any], cuda: Callable[..., Any]) -> Callable[..., Any]:
    """What trainc::name runs on CUDA tensors: its CUDA kernel, or, on AMD's GPUs, what it runs on a CPU."""
    return on_device_of_tensors(name, cuda if torch.version.hip is None else cpu)


def on_device_of_tensors(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel of trainc::name, with its tensors' device as the current one while it runs.

    Triton launches on the current device, and its kernels cannot read another one's memory. Numbers (0-d tensors)
    may be elsewhere, since launchers move them. Raises RuntimeError for other tensors on several CUDA devices.
    """

    def there(*arguments: Any) -> Any:
        with torch.cuda.device(_device(name, arguments)):
            return kernel(*arguments)

    return there


def _device(name: str, arguments: Sequence[Any]) -> torch.device:
    """The one CUDA device of a call's tensors."""
    on_cuda = [one for one in tensors(arguments) if one.is_cuda]
    found = {one.device for one in on_cuda if one.dim()} or {one.device for one in on_cuda[:1]}
    if len(found) > 1:
        names = " and ".join(sorted(map(str, found)))
        raise RuntimeError(
            f"the tensors of trainc::{name} are on {names}: move them to one device before the call"
        )
    return found.pop()
