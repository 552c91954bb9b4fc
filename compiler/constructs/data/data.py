"""The data that a spec trains on, named by import path."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from trainc.compiler.constructs.data._base import DataSource
from trainc.compiler.model.import_path import (
    ImportProblem,
    call,
    import_attribute,
    import_callable,
)
from trainc.dsl.reading.construct import ImportPath


class Data(DataSource):
    """Calls `module:callable` with the given arguments; it returns the training and evaluation data.

    What it may return:

    - Samples, which are trained on: a map-style `torch.utils.data.Dataset`, or anything with `__len__` and
      `__getitem__`; a data set of Hugging Face's `datasets`, whose columns are then read as tensors unless it has a
      format; a `DataLoader`, of which the data set and `collate_fn` are used, and order, batch size and workers are
      not; or a split of your own, with `len()` and `batch(indices) -> (inputs, targets)`, whose targets may be a dict
      or a tuple of tensors, of which each loss takes one.
    - Samples that come in an order of their own, one after the other: an `IterableDataset`, or anything whose
      `__iter__` begins anew; or a loader with `state_dict()` and `load_state_dict()`, such as a `StatefulDataLoader`,
      whose batches are then the micro-batches. Their position is in checkpoints. What has `state_dict()` goes there by
      itself when a run is resumed; any other, and an iterable data set of `datasets`, whose state lacks what is in a
      shuffle buffer, is read up to it again, from the beginning of the pass where it has `set_epoch`, else from the
      beginning of the run. A resumed run has the same numbers, except those that processes of such a loader draw.
      Epochs need a `__len__`. The samples have no numbers, so clauses that read sample ids refuse them; `workers` are
      not for them either.
    - Training and held-out samples: a pair `(train, evaluation)`; a dict such as a `DatasetDict`, or an object, with
      `train` and `evaluation`, `validation`, `valid`, `val` or `test`, of which the first that is there is evaluated;
      an object with `train_dataloader()` and `val_dataloader()`, such as a `LightningDataModule`.

    A sample is a pair `(x, y)`, or a dict in which one field is the target: `label`, `labels`, `target` or `targets`,
    or the one that `target` names, or several, which are then a dict of targets. The others are inputs: a single tensor
    is passed to the model as it is, several by name. Under `loss model` the model is given the targets, too. Samples
    are stacked by torch's `default_collate`, or by `collate`, a function that takes a list of samples and returns
    `(inputs, targets)` or such a dict. An index is the same sample in every epoch. `tokens_per_sample` of the object,
    or else the size of the first sample's integer targets, says how many tokens a sample has.

    All random numbers of a sample, from the generators of torch, numpy and Python and from those that the data set
    holds, are functions of the seed and the sample's position in the run. Those of a split with `batch` are seeded by
    the position of the batch, and generators that it holds are kept in checkpoints.

    The callable is imported only by compile, run and verify. `trainc plan` asks its `describe`, if it has one:
    `describe(**arguments)` returns `{"samples": ..., "tokens_per_sample": ...}` without loading the data.

    `batch` is an amount, or a policy that sets it before every step, in whole micro-batches:

    - `ramp(16 samples, to = 120 samples, over = 2.2G tokens)` changes it linearly, rounded up to micro-batches,
      beginning at `from`. It depends on the clock alone. (Gray et al. 2024, in tokens.)
    - `follow(gns, max = 512 samples, min = 16 samples, factor = 0.5)` sets it to `factor` (1) times a measured signal,
      between `min` (a micro-batch) and `max`, in multiples of `step` (a micro-batch). It begins with `min`. It changes
      only when the wanted size differs by a `step` or more, at most once in `every`, not before `from`, and with
      `grow_only = true` never to a smaller size.
    - `signal_noise(gns, max = 512 samples, theta = 0.6)` raises it to the noise scale divided by `theta` squared and
      never lowers it. It begins with `min` and looks `every` 100 steps, `from` 15% of the run on.
    - `seesaw(max = 512 samples, min = 16 samples)` grows it where the schedule of the learning rate falls: to `min`
      over the rate of now as a part of the highest so far, rounded down. The rate is multiplied by the root of
      batch / `min`, so that it falls by the root of the scheduled cut. (Meterez et al. 2025, arXiv:2510.14717.)

    While the signal is NaN, the batch stays as it is. Learning rates do not follow the batch by themselves: see
    `lr batch_scaling`.
    """

    cite: ClassVar = (
        "trainc; ramp: Gray et al., Normalization Layer Per-Example Gradients, NeurIPS 2024, "
        "arXiv:2411.00999"
    )
    usage: ClassVar = 'data "examples.data:stdlib" { batch = 32 samples, context = 128 }'
    open_fields: ClassVar = True

    path: ImportPath = Field(description="what to import, as `module:callable`")
    target: str | tuple[str, ...] | None = Field(
        default=None,
        description="the field of dict samples that is the target, or several, as a list of names",
    )
    collate: ImportPath | None = Field(
        default=None,
        description="what makes a batch of a list of samples, as `module:callable`. Default: torch's `default_collate`,"
        " or the `collate_fn` of a DataLoader",
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of the callable"
    )

    def load(self) -> Any:
        """Call the callable, and make data of what it returns; raises WrongData for anything else."""
        from trainc.runtime.sources.adapt import WrongData, as_data

        found = call(self.path, dict(self.arguments), "data-failed")
        collate = None if self.collate is None else import_callable(self.collate, "collate")
        try:
            return as_data(found, collate, self.target, self.workers)
        except WrongData as error:
            name = f"{self.path.module}:{self.path.attribute}"
            raise ImportProblem(
                "data-failed",
                f"`{name}` returns a {type(found).__name__}, which lacks what the data of a run needs",
                "return a map-style data set of pairs (x, y), or of dicts with a field `label`; a pair (train,"
                " evaluation) or a dict of them; or an object with `train` and `evaluation`, each with `len()` and"
                " `batch(indices) -> (inputs, targets)`. `trainc explain data` has all forms",
                notes=error.problems,
            ) from error

    def count(self) -> tuple[int | None, int | None]:
        """Return what the callable's `describe` says, if it has one."""
        describe = getattr(import_attribute(self.path), "describe", None)
        if describe is None:
            return None, None
        try:
            described = describe(**self.arguments)
        except TypeError as error:
            message = f"`{self.path}` cannot describe the data: {error}"
            raise ImportProblem("wrong-argument", message) from error
        return described.get("samples"), described.get("tokens_per_sample")

    @property
    def count_help(self) -> str:
        """What to write where the callable has no `describe`."""
        name = f"{self.path.module}:{self.path.attribute}"
        return f"give `{name}` a `describe` that returns the number of `samples`, or write steps or samples"
