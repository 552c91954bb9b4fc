"""Check the shapes of contributions and of the tensors that belong to them."""

from __future__ import annotations

from torch import Tensor


def check_matrix(name: str, tensor: Tensor) -> tuple[int, int]:
    """Return rows and columns of a matrix with one row for each contribution; raises ValueError for other shapes."""
    if tensor.dim() != 2:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, expected two axes: a row for each contribution"
        )
    rows, columns = tensor.shape
    return rows, columns


def check_shapes(**tensors: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Raise ValueError unless each tensor, if given, has its expected shape."""
    for name, (tensor, shape) in tensors.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
