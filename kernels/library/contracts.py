"""The contracts that operators share: dtypes, autocast, probes, results that are not requested."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

REDUCED = (torch.bfloat16, torch.float16)
# Asked once: compiled code of torch 2.11 cannot ask.
AUTOCAST_DEVICES = frozenset(
    device
    for device in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla", "maia")
    if torch.amp.is_autocast_available(device)
)


def require(condition: bool, message: Callable[[], str]) -> None:
    """Raise RuntimeError with the message unless the condition holds; works with symbolic shapes."""
    torch._check(condition, message)


def lazy(module: str, function: str, *first: Any) -> Callable[..., Any]:
    """A kernel whose module is imported by its first call: without CUDA, triton may be missing.

    `first` are arguments to give it before those of the call.
    """

    def kernel(*arguments: Any) -> Any:
        return getattr(import_module(f"trainc.kernels.{module}"), function)(*first, *arguments)

    return kernel


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors as autocast gives them to an operation of its 16-bit list; float64 and others stay as they are."""
    device = next(t.device.type for t in tensors if t is not None)
    if not (device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device)):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    cast = (torch.float32, *REDUCED)
    return [t.to(dtype) if t is not None and t.dtype in cast else t for t in tensors]


def in_float32(tensor: Tensor) -> Tensor:
    """The tensor as autocast gives it to an operation of its float32 list: float64 and integers stay as they are."""
    return tensor.to(torch.float32) if tensor.dtype in REDUCED else tensor


def composition_is_cheaper(limit: int, x: Tensor, *others: Tensor | None) -> bool:
    """Whether torch's own calls cost less than an operator: for up to `limit` elements of x on a CPU.

    Compiled code keeps the operator, and so do tensors in several dtypes, which torch warns of or refuses.
    """
    alike = all(t is None or t.dtype == x.dtype for t in others)
    return alike and x.device.type == "cpu" and not is_compiling() and x.numel() <= limit


def compiler_fuses(x: Tensor) -> bool:
    """Whether this is being compiled for CUDA, where inductor fuses torch's own operations with what is around them.

    Operators it cannot look into, so there they are for what needs them.
    """
    return x.device.type == "cuda" and is_compiling()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are carried in: float64 for float64, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def absent(like: Tensor) -> Tensor:
    """An empty tensor in place of a result that is not requested: operators cannot return None."""
    return like.new_empty((0,))


def check_affine(shape: tuple[int, ...], *parameters: Tensor | None) -> None:
    """Reject a weight or bias of another shape than the one given."""
    for parameter in parameters:
        if parameter is not None and parameter.shape != shape:
            raise RuntimeError(
                f"weight and bias must have the shape {shape}, not {tuple(parameter.shape)}"
            )


def check_bias(bias: Tensor | None, weight: Tensor) -> None:
    """Reject a bias that does not hold one number for each row of the weight."""
    if bias is not None and tuple(bias.shape) != tuple(weight.shape[:1]):
        raise RuntimeError(
            f"bias must have the shape {tuple(weight.shape[:1])}, not {tuple(bias.shape)}"
        )


def check_probe(probe: Tensor | None, examples: int, columns: int, like: Tensor) -> None:
    """Reject a probe that is not zeros (examples, columns) in the dtype sums are carried in."""
    if probe is None:
        return
    expected = accumulation_dtype(like.dtype)
    if probe.shape != (examples, columns) or probe.dtype != expected:
        raise RuntimeError(
            f"probe must be ({examples}, {columns}) {expected}, "
            f"not {tuple(probe.shape)} {probe.dtype}"
        )
