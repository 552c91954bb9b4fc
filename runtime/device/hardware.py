"""What a run computes on: its device, autocast, the scaler of float16, and the precision of float32 products."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trainc.runtime.data.batch import Batch, map_tensors
from trainc.runtime.device.choice import choose

Precision = Literal["float32", "bf16", "fp16"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class NoPrecision(ValueError):
    """The device cannot compute in the precision that is asked for."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """The device of a run and how it computes there.

    `matmul` is torch's precision of float32 products; None leaves it as it is.
    """

    device: torch.device
    precision: Precision = "float32"
    matmul: str | None = None
    about: str = ""
    """What the device is, and why it was chosen."""

    def __str__(self) -> str:
        words = [f"{self.device.type} ({self.about})" if self.about else self.device.type]
        words.append(f"in {self.precision}")
        if self.precision == "fp16":
            words.append("with a scaled loss")
        if self.matmul is not None:
            words.append(f"with {self.matmul} precision of float32 products")
        return " ".join(words)

    def place(self, batch: Batch) -> Batch:
        """Return a batch with all tensors on the device; to CUDA they go through pinned memory."""
        placed = self.device.type

        def moved(tensor: Tensor) -> Tensor:
            return tensor if tensor.device.type == placed else self._moved(tensor)

        inputs, targets = batch
        return map_tensors(moved, inputs), map_tensors(moved, targets)

    def _moved(self, tensor: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return tensor.to(self.device)
        pinned = tensor.pin_memory() if tensor.device.type == "cpu" else tensor
        return pinned.to(self.device, non_blocking=True)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the block in which the model's forward pass and its loss run."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_DTYPES[self.precision])

    def scaler(self) -> torch.amp.GradScaler | None:
        """Return a new scaler of losses for float16; None where gradients need none."""
        if self.precision != "fp16":
            return None
        scaler = torch.amp.GradScaler(self.device.type)
        scaler.scale(
            torch.zeros((), device=self.device)
        )  # makes the scale, whatever the first step has
        return scaler

    @contextmanager
    def products(self) -> Iterator[None]:
        """Compute float32 products in the precision `matmul` inside this block."""
        before = torch.get_float32_matmul_precision()
        try:
            if self.matmul is not None:
                torch.set_float32_matmul_precision(self.matmul)
            yield
        finally:
            if self.matmul is not None:
                torch.set_float32_matmul_precision(before)


def find_hardware(device: str, precision: Precision, matmul: str | None) -> Hardware:
    """Return the hardware for the fields of a run; raises NoDevice or NoPrecision for what this machine cannot."""
    chosen = choose(device)
    found = Hardware(chosen.device, precision, matmul, chosen.about)
    if (why := _refused(found)) is not None:
        others = [one for one in ("float32", *_DTYPES) if one != precision]
        raise NoPrecision(
            f"`precision = {precision}`: torch {torch.__version__} cannot train in it on {chosen.device.type}"
            f" ({why}). Write `precision = {others[-1] if precision == 'fp16' else others[0]}` or another device"
        )
    return found


def _refused(hardware: Hardware) -> str | None:
    """Return why torch cannot compute in a precision, as a product of its own finds; None where it can."""
    if hardware.precision == "float32":
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch warns of an autocast that it leaves off
            one = torch.ones(1, 1, device=hardware.device)
            with hardware.autocast():
                product = one @ one
            hardware.scaler()
    except (RuntimeError, ValueError, TypeError, AssertionError, UserWarning) as error:
        return f"{error}".splitlines()[0]
    if product.dtype != _DTYPES[hardware.precision]:
        return f"autocast computes a product in {product.dtype}"
    return None


def after_step(scaler: torch.amp.GradScaler) -> None:
    """Let a scaler find its scale for the next step; one without a gradient leaves the scale as it was."""
    try:
        scaler.update()
    except AssertionError:  # there was nothing to unscale
        scaler.update(scaler.get_scale())
