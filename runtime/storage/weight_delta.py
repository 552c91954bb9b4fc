"""What training changed of weights, as entries and their values: a file of tensors, exact and small.

A file has `positions`, bytes, and `values.<dtype>`, each of all tensors in turn, and `table`, JSON packed by zlib,
which says of each tensor: names, shape, dtype, how many entries follow, the bytes of a gap, and a digest of the entries
that are not in the file. A gap is the distance of a position to the one before (the first: to 0), 1 or 2 bytes: 255, or
65535, adds itself to the gap that follows. Gaps of 0 bytes say that every entry is in the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from trainc.kernels.library import atomic
from trainc.runtime.storage.foreign_files import UnreadableFile, interpreting, open_file

FORMAT = "2"
_KEY = "trainc_delta"
_LARGEST_TABLE = 1 << 28


@dataclass(frozen=True, slots=True)
class TensorDelta:
    """The entries of a tensor that training changed.

    `index` holds their sorted flat positions, int64 (k,), or is None for all of them; `values` (k,) what they are.
    `rest` is a digest of the other entries, which are what they were before: "" where there are none. `names` are all
    names of the tensor.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    index: Tensor | None
    values: Tensor
    rest: str = ""

    @classmethod
    def of(cls, names: Sequence[str], tensor: Tensor, index: Tensor | None) -> TensorDelta:
        """Return the entries of `tensor` at flat positions, distinct, in any order: None for all of them."""
        flat = tensor.detach().cpu().contiguous().view(-1)
        if index is None or index.numel() == flat.numel():
            return cls(tuple(names), tuple(tensor.shape), None, flat.clone())
        index = index.cpu().long().sort().values
        return cls(tuple(names), tuple(tensor.shape), index, flat[index], _digest(flat, index))

    @property
    def nbytes(self) -> int:
        """The bytes of positions and values in a file."""
        gaps = 0 if self.index is None else len(_encode(self.index)[1])
        return self.values.nbytes + gaps


def changed(before: Tensor, now: Tensor) -> Tensor:
    """Return the flat positions at which two tensors of one shape and dtype differ, bit by bit."""
    old, new = (
        t.detach().cpu().contiguous().view(-1).view(torch.uint8).view(t.numel(), -1)
        for t in (before, now)
    )
    return (old != new).any(1).nonzero()[:, 0]


def _digest(flat: Tensor, index: Tensor) -> str:
    rest = flat.clone()
    rest[index] = 0
    return hashlib.blake2b(rest.view(torch.uint8).numpy().data, digest_size=4).hexdigest()


def _encode(index: Tensor) -> tuple[int, Tensor]:
    """Return sorted positions as gaps of 1 or 2 bytes, whichever is shorter, and that number: uint8 bytes."""
    gaps = torch.diff(index, prepend=index.new_zeros(1))
    counts = {width: gaps // (256**width - 1) + 1 for width in (1, 2)}
    width = min(counts, key=lambda w: w * int(counts[w].sum()))
    ends, limit = counts[width].cumsum(0), 256**width - 1
    words = torch.full((int(ends[-1]) if len(ends) else 0,), limit, dtype=torch.int32)
    words[ends - 1] = (gaps % limit).int()
    return width, words.to(torch.uint8 if width == 1 else torch.uint16).view(torch.uint8)


def _decode(data: Tensor, width: int, count: int) -> tuple[Tensor, int]:
    """Return `count` positions from the beginning of some bytes, and how many bytes they took."""
    limit = 256**width - 1
    whole = data[: len(data) // width * width].clone()
    words = whole.view(torch.uint8 if width == 1 else torch.uint16).int()
    ends = (words != limit).nonzero()[:count, 0]
    if len(ends) != count:
        raise ValueError("its positions are cut off")
    taken = int(ends[-1]) + 1 if count else 0
    return words[:taken].long().cumsum(0)[ends], taken * width


def write_delta(path: Path, deltas: Iterable[TensorDelta]) -> None:
    """Write a file of deltas, whole or not at all; raises OSError that names it."""
    rows: list[list[Any]] = []
    positions = [torch.empty(0, dtype=torch.uint8)]
    values: dict[str, list[Tensor]] = {}
    for delta in deltas:
        width = 0
        if delta.index is not None:
            width, data = _encode(delta.index)
            positions.append(data)
        dtype = str(delta.values.dtype).removeprefix("torch.")
        values.setdefault(dtype, []).append(delta.values)
        rows.append(
            [list(delta.names), list(delta.shape), dtype, len(delta.values), width, delta.rest]
        )
    tensors = {f"values.{dtype}": torch.cat(parts) for dtype, parts in values.items()}
    tensors["positions"] = torch.cat(positions)
    table = zlib.compress(json.dumps(rows, separators=(",", ":")).encode(), 9)
    tensors["table"] = torch.frombuffer(bytearray(table), dtype=torch.uint8)
    atomic.write_bytes(path, save(tensors, {_KEY: FORMAT}))


def read_delta(path: Path) -> list[TensorDelta]:
    """Return the deltas in a file; raises UnreadableFile where it is none or damaged. No code in it is run."""
    open_file(path).close()
    with interpreting(path), safe_open(path, "pt") as file:
        about = file.metadata() or {}
        if about.get(_KEY) != FORMAT:
            raise UnreadableFile(
                f"{path} is no delta that `trainc delta RUN --out FILE` of this version wrote"
            )
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
        table = tensors.pop("table").numpy().tobytes()
        rows = json.loads(zlib.decompressobj().decompress(table, _LARGEST_TABLE))
        left = {key: tensor.view(-1) for key, tensor in tensors.items()}
        found = []
        for names, shape, dtype, count, width, rest in rows:
            entries = math.prod(shape)
            index = None
            if width:
                index, taken = _decode(left["positions"], width, count)
                left["positions"] = left["positions"][taken:]
                if count and (int(index[-1]) >= entries or not bool((index.diff() > 0).all())):
                    raise ValueError(f"its positions are not those of a tensor of {entries}")
            values = left[f"values.{dtype}"][:count]
            left[f"values.{dtype}"] = left[f"values.{dtype}"][count:]
            if len(values) != count or (index is None and count != entries):
                raise ValueError("its values are cut off")
            found.append(TensorDelta(tuple(names), tuple(shape), index, values, rest))
        return found


def apply_delta(
    weights: Mapping[str, Tensor], deltas: Sequence[TensorDelta], source: str
) -> dict[str, int]:
    """Put the entries of deltas into weights, in place, and return how many of each tensor.

    All is compared before anything is written. Raises ValueError, which calls the weights `source`, where a tensor is
    missing, has another shape or dtype, or its other entries are not those that were trained.
    """
    for delta in deltas:
        _require_fit(weights, delta, source)
    for delta in deltas:
        for name in delta.names:
            if name in weights:
                _write(weights[name], delta)
    return {delta.names[0]: len(delta.values) for delta in deltas}


def _require_fit(weights: Mapping[str, Tensor], delta: TensorDelta, source: str) -> None:
    own = [name for name in delta.names if name in weights]
    if not own:
        some = ", ".join(f"`{name}`" for name in sorted(weights)[:3]) or "none"
        raise ValueError(
            f"{source} has no `{delta.names[0]}`, which the delta changes. Its tensors: {some}, ... Give the weights"
            " that the run started from, under the names of its model"
        )
    for name in own:
        found, expected = weights[name], delta.values.dtype
        if tuple(found.shape) != delta.shape or found.dtype != expected:
            raise ValueError(
                f"`{name}` of {source} is {_form(found.dtype, found.shape)}, and the delta is of"
                f" {_form(expected, delta.shape)}: give the weights that the run started from, in the dtype in which it"
                " trained"
            )
        if delta.index is None:
            continue
        flat = found.detach().cpu().contiguous().view(-1)
        if _digest(flat, delta.index) != delta.rest:
            raise ValueError(
                f"`{name}` of {source} is not what the run started from: entries that did not train differ. Give the"
                " weights that it started from. Where a run chose entries more than once, those of earlier choices"
                " differ as well: export the delta again with `--base`"
            )


def _form(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


@torch.no_grad()
def _write(tensor: Tensor, delta: TensorDelta) -> None:
    whole = tensor.detach()
    values = delta.values.to(whole.device)
    if delta.index is None:
        whole.copy_(values.view(whole.shape))
    elif whole.is_contiguous():
        whole.view(-1)[delta.index.to(whole.device)] = values
    else:
        whole[torch.unravel_index(delta.index.to(whole.device), whole.shape)] = values


def entries_of(
    tensors: Mapping[str, Tensor],
    trained: Collection[str],
    indices: Mapping[str, Tensor],
    base: Mapping[str, Tensor] | None = None,
    source: str = "",
    left: Collection[str] = (),
) -> list[TensorDelta]:
    """Return what a run changed of its `tensors`; those that are the same memory are one, of several names.

    Of the `trained` these are the entries that `indices` has, and all where it has none; with `base`, the weights
    before, what differs from those. Raises ValueError, which calls `base` by `source`, where it is of another model,
    and without `base` for parameters that have `left` entries behind which trained, too.
    """
    if base is None and left:
        raise ValueError(
            f"`{min(left)}` has trained entries that were not chosen last, because its mask chose more than once:"
            " give the weights that the run started from, as `--base` or `base`, so that all that differs is found"
        )
    names: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in tensors.items():
        memory = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else (name,)
        names.setdefault(memory, []).append(name)
    found = []
    for group in names.values():
        tensor = tensors[group[0]]
        if base is not None:
            index: Tensor | None = changed(_before(base, group, tensor, source), tensor)
        else:
            index = next((indices[name] for name in group if name in indices), None)
        if base is None and not any(name in trained for name in group):
            continue
        few, every = TensorDelta.of(group, tensor, index), TensorDelta.of(group, tensor, None)
        if len(few.values):
            found.append(min(few, every, key=lambda delta: delta.nbytes))
    return found


def _before(base: Mapping[str, Tensor], names: Sequence[str], now: Tensor, source: str) -> Tensor:
    known = next((base[name] for name in names if name in base), None)
    if known is None:
        raise ValueError(
            f"{source} has no `{names[0]}`, which the run has: it is not what the run started from"
        )
    if known.shape != now.shape or known.dtype != now.dtype:
        raise ValueError(
            f"`{names[0]}` of {source} is {_form(known.dtype, known.shape)}, and that of the run is"
            f" {_form(now.dtype, now.shape)}: give the weights that the run started from, in the dtype in which it"
            " trained"
        )
    return known
