"""Loaders that people have, and modules that give them: what is taken of them, and what is not."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

Collate = Callable[[list[Any]], Any]


def dataset_of_loader(
    name: str, loader: DataLoader[Any], problems: list[str], notes: list[str]
) -> tuple[Any, Collate | None]:
    """Return the data set of a loader and its `collate_fn`, None where it is torch's.

    A loader that orders or batches samples in a way of its own is a problem, since order and batches are the run's.
    """
    if (own := _own_order(loader)) is not None:
        problems.append(
            f"`{name}` is a DataLoader with {own}, and the order of samples and their batches are the run's: return its"
            " data set in its place"
        )
        return None, None
    shuffles = isinstance(loader.sampler, RandomSampler)
    unused = [f"its batch size of {loader.batch_size}"]
    unused += ["its shuffling"] if shuffles else []
    unused += [f"its {loader.num_workers} workers"] if loader.num_workers else []
    notes.append(
        f"`{name}` is a DataLoader: its data set and `collate_fn` are used. {', '.join(unused).capitalize()} are not:"
        " the spec has `batch`, `seed` and `workers`"
    )
    collate = loader.collate_fn
    return loader.dataset, None if collate is default_collate else collate


def _own_order(loader: DataLoader[Any]) -> str | None:
    """Return what of a loader decides on order or batches beyond a shuffle, None where nothing does."""
    if isinstance(loader.dataset, IterableDataset):
        return None
    batches, sampler = loader.batch_sampler, loader.sampler
    if batches is None:
        return "`batch_size=None`"
    if type(batches) is not BatchSampler:
        return f"a `{type(batches).__name__}`"
    if isinstance(sampler, RandomSampler):
        if sampler.replacement or sampler.num_samples != len(sampler.data_source):
            return "a `RandomSampler` that repeats or leaves out samples"
    elif not isinstance(sampler, SequentialSampler):
        return f"a `{type(sampler).__name__}`"
    return None


def is_stateful_loader(given: Any) -> bool:
    """Say whether something is a loader of batches that says where it is, such as a `StatefulDataLoader`."""
    needs = ("state_dict", "load_state_dict", "__iter__", "batch_size")
    return not isinstance(given, type) and all(hasattr(given, name) for name in needs)


def loaders_of_module(module: Any) -> dict[str, Any]:
    """Return what a module such as Lightning's `LightningDataModule` loads, after its preparations."""
    if callable(prepare := getattr(module, "prepare_data", None)):
        prepare()
    if callable(setup := getattr(module, "setup", None)):
        setup("fit") if inspect.signature(setup).parameters else setup()
    held_out = getattr(module, "val_dataloader", None)
    if held_out is not None and _is_only_declared(module):
        held_out = None
    return {
        "train": module.train_dataloader(),
        "evaluation": None if held_out is None else held_out(),
    }


def _is_only_declared(module: Any) -> bool:
    """Say whether `val_dataloader` is the one of Lightning's base class, which raises an error."""
    home = str(getattr(type(module).val_dataloader, "__module__", "")).partition(".")[0]
    return home in ("lightning", "pytorch_lightning")
