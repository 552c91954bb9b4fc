"""What people have as data, made into the splits of a run; all that is missing is told at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from trainc.runtime.data.batch import Batch, WrongBatch, count_tokens, map_tensors
from trainc.runtime.data.generators import find_generators, kept
from trainc.runtime.data.order import Data, Split, read_batch
from trainc.runtime.data.stream import Stream, count_samples, is_stream, with_access
from trainc.runtime.sources.collate import Collation
from trainc.runtime.sources.loaders import (
    dataset_of_loader,
    is_stateful_loader,
    loaders_of_module,
)
from trainc.runtime.sources.samples import Samples
from trainc.runtime.sources.streams import BatchStream, SampleStream

EVALUATION = ("evaluation", "validation", "valid", "val", "test")
"""The names of held-out samples in a dict or an object; the first that is there is taken."""


class WrongData(WrongBatch):
    """What a data callable returned lacks something; `problems` are all that were found."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


@dataclass(frozen=True)
class Adapted:
    """Data made of what a user has; `notes` say what of it is not used."""

    train: Split | Stream
    evaluation: Split | Stream | None
    tokens_per_sample: int
    workers: int = 0
    prefetch: bool = False
    fingerprint: str | None = None
    notes: tuple[str, ...] = ()


def as_data(
    found: Any,
    collate: Callable[[list[Any]], Any] | None = None,
    target: str | tuple[str, ...] | None = None,
    workers: int = 0,
) -> Data:
    """Return the data of a run from what a user has; raises WrongData with everything that is missing.

    It is the training samples, or training and held-out samples as a pair, a dict, an object, or a module with
    `train_dataloader()`. Samples are a split with `batch(indices)`, a data set with `len()` and `[index]`, or a loader.
    """
    if isinstance(found, Adapted):
        return found
    adapting = _Adapting(Collation(collate, target))
    parts = adapting.parts(found)
    train = adapting.split("train", parts.get("train")) if "train" in parts else None
    evaluation = None
    if (held_out := parts.get("evaluation")) is not None:
        evaluation = adapting.split("evaluation", held_out)
    tokens: Any = getattr(found, "tokens_per_sample", None)
    if train is not None:
        tokens = adapting.tokens("train", train, tokens)
    if evaluation is not None:
        adapting.tokens("evaluation", evaluation, tokens)
    if workers and (is_stream(train) or is_stream(evaluation)):
        adapting.problems.append(
            "`workers` read samples by their index, and an iterable has an order of its own: remove `workers`, and let"
            " a `StatefulDataLoader` with workers read it, or give a data set with `__len__` and `__getitem__`"
        )
    if adapting.problems:
        raise WrongData(adapting.problems)
    assert train is not None
    as_given = train is parts["train"] and evaluation is held_out
    if as_given and not workers and _is_whole(found):
        whole: Data = found
        return whole
    return Adapted(
        train,
        evaluation,
        int(tokens),
        workers,
        as_given and bool(getattr(found, "prefetch", False)),
        getattr(found, "fingerprint", None),
        tuple(adapting.notes),
    )


def _is_whole(found: Any) -> bool:
    """Say whether an object has all that the data of a run has, so that it can stay as it is."""
    return all(hasattr(found, name) for name in ("train", "evaluation", "tokens_per_sample"))


class _Adapting:
    """One object that is made into data; `problems` and `notes` are what was found on the way."""

    def __init__(self, collation: Collation) -> None:
        self.collation = collation
        self.problems: list[str] = []
        self.notes: list[str] = []

    def parts(self, found: Any) -> dict[str, Any]:
        """Return what trains and what is held out, as they were given."""
        if callable(getattr(found, "train_dataloader", None)):
            return self._one_loader_each(loaders_of_module(found))
        if isinstance(found, Mapping):
            return self._named({name: found[name] for name in found})
        if _is_pair(found):
            return dict(zip(("train", "evaluation"), found, strict=True))
        if hasattr(found, "train") and (_is_samples(found.train) or not _is_samples(found)):
            names = ("train", *EVALUATION)
            return self._named({n: getattr(found, n) for n in names if hasattr(found, n)})
        if _is_samples(found):
            return {"train": found}
        self.problems.append(
            f"it is a {type(found).__name__}: neither samples, with `__len__` and `__getitem__`, nor an object or a"
            " dict with `train`, nor a pair of training and held-out samples"
        )
        return {}

    def _named(self, given: dict[str, Any]) -> dict[str, Any]:
        if "train" not in given:
            names = ", ".join(f"`{name}`" for name in given) or "empty"
            self.problems.append(f"it has no `train`: its parts are {names}")
            return {}
        held_out = next((given[name] for name in EVALUATION if given.get(name) is not None), None)
        return {"train": given["train"], "evaluation": held_out}

    def _one_loader_each(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the loaders of a module; there may be one of each kind."""
        for name, value in given.items():
            if isinstance(value, list | tuple):
                if len(value) > 1:
                    self.problems.append(
                        f"`{name}` gives {len(value)} loaders, and a run has one data set to train on and one to"
                        " evaluate on: give one, such as one of a `ConcatDataset`"
                    )
                given[name] = value[0] if value else None
        return given

    def split(self, name: str, given: Any) -> Split | Stream | None:
        """Return given samples as a split or a stream, None where they are none."""
        if is_stateful_loader(given):
            collation = Collation(torch.utils.data.default_collate, self.collation.target)
            return BatchStream(name, given, collation)
        if isinstance(given, DataLoader):
            dataset, collate = dataset_of_loader(name, given, self.problems, self.notes)
            if dataset is None:
                return None
            own = self.collation
            return self._split(name, dataset, Collation(own.function or collate, own.target))
        return self._split(name, given, self.collation)

    def _split(self, name: str, given: Any, collation: Collation) -> Split | Stream | None:
        if is_iterable(given):
            if iter(given) is not given:
                if not all(hasattr(given, name) for name in ("column_names", "with_format")):
                    return SampleStream(given, collation)
                # The state of a shuffled one is without the samples in its buffer, which would be lost.
                return SampleStream(as_tensors(given), collation, exact_state=False)
            self.problems.append(
                f"`{name}` is a {type(given).__name__}, which can be read once: give an object whose `__iter__` begins"
                " anew, such as an `IterableDataset`"
            )
            return None
        if is_table(given):
            return Samples(as_tensors(given), collation, together=hasattr(given, "__getitems__"))
        if not isinstance(given, type) and callable(getattr(given, "batch", None)):
            if hasattr(given, "__len__"):
                own: Split = given
                return own
            self._lacks(name, given, ["`__len__()`"])
        elif _is_samples(given):
            return Samples(given, collation)
        else:
            needs = ("__len__", "__getitem__")
            lacks = [f"`{one}`" for one in needs if not hasattr(given, one)]
            self._lacks(name, given, lacks)
        return None

    def _lacks(self, name: str, given: Any, lacks: Sequence[str]) -> None:
        if isinstance(given, torch.Tensor | np.ndarray):
            self.problems.append(
                f"`{name}` is a {type(given).__name__}, which has inputs or targets alone: pair them in a"
                " `torch.utils.data.TensorDataset(inputs, targets)`"
            )
        else:
            words = " and no ".join(lacks) or "samples"
            self.problems.append(f"`{name}` is a {type(given).__name__}, which has no {words}")

    def tokens(self, name: str, part: Split | Stream, known: Any) -> Any:
        """Return the tokens of a sample, of the first one where nothing says it; note what a sample lacks."""
        if count_samples(part) == 0:
            if name == "train":
                self.problems.append("`train` has no samples")
            return known
        if known is not None and not isinstance(part, Samples | SampleStream):
            return known
        try:
            with kept(find_generators(part)):
                _, targets = first_samples(part)
        except WrongBatch as error:
            self.problems.append(f"`{name}`: {error}")
            return known
        return count_tokens(map_tensors(itemgetter(slice(1)), targets)) if known is None else known


def first_samples(part: Split | Stream) -> Batch:
    """Return the first sample as a batch, or the first batch where a loader made them."""
    if not is_stream(part):
        return read_batch(with_access(part), [0])
    for batch in part.from_start(1, 0):
        return batch
    raise WrongBatch("it has no samples")


def is_iterable(given: Any) -> bool:
    """Say whether samples come in an order of their own, one after the other."""
    if isinstance(given, IterableDataset):
        return True
    plain = isinstance(given, torch.Tensor | np.ndarray | str | bytes | Mapping | type | DataLoader)
    return not plain and hasattr(given, "__iter__") and not hasattr(given, "__getitem__")


def is_table(given: Any) -> bool:
    """Say whether samples are a data set of Hugging Face's `datasets`, by what it can do."""
    return all(hasattr(given, name) for name in ("column_names", "with_format", "__getitem__"))


def as_tensors(table: Any) -> Any:
    """Return a table that gives its columns as tensors, unless its user has chosen another format."""
    chosen = (getattr(table, "format", None) or {}).get("type")
    return table.with_format("torch") if chosen is None else table


def _is_samples(given: Any) -> bool:
    """Say whether something is a set of samples: a split, a data set, a loader."""
    if isinstance(given, torch.Tensor | np.ndarray | str | bytes | Mapping | type):
        return False
    if isinstance(given, DataLoader) or is_stateful_loader(given) or is_iterable(given):
        return True
    return hasattr(given, "__len__") and (hasattr(given, "__getitem__") or hasattr(given, "batch"))


def _is_pair(found: Any) -> bool:
    """Say whether something is training and held-out samples; a list of two may also be two samples."""
    if not isinstance(found, tuple | list) or len(found) != 2:
        return False
    return isinstance(found, tuple) or all(
        _is_samples(one) and not isinstance(one, tuple | list) for one in found
    )
