"""Files that a `data` clause names by patterns: those to train on and those that are held out."""

from __future__ import annotations

from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from trainc.compiler.constructs.data._base import DataSource
from trainc.compiler.model.import_path import ImportProblem, spec_folder
from trainc.dsl.reading.construct import Fraction

HeldOut = Annotated[
    str | Fraction | None,
    Field(
        description="what is held out: a pattern of files, which are then not trained on, or a fraction, of the last"
        " samples. Default: nothing"
    ),
]


class Files(DataSource):
    """Sequences of tokens in files, cut into windows of `context` tokens."""

    path: str = Field(
        description="the files to train on, as a pattern, relative to the spec's folder; `**` are folders of any depth"
    )
    context: int = Field(
        gt=0, description="tokens of a sample; the targets are the tokens after them"
    )
    evaluation: HeldOut = None

    @field_validator("evaluation")
    @classmethod
    def _a_part(cls, value: str | float | None) -> str | float | None:
        if isinstance(value, float) and not 0 < value < 1:
            raise ValueError(
                "expected a fraction above 0 and below 1, such as 5%, or a pattern of files"
            )
        return value

    @property
    def fraction(self) -> float:
        """Return which part of the samples is held out of those of the files, 0 where files of their own are."""
        return self.evaluation if isinstance(self.evaluation, float) else 0.0

    def files(self) -> tuple[list[Path], list[Path]]:
        """Return the files to train on and those that are held out, each in the order of their names.

        Raises ImportProblem where a pattern matches none, or none is left to train on.
        """
        train, held_out = _some("path", self.path), []
        if isinstance(self.evaluation, str):
            held_out = _some("evaluation", self.evaluation)
        train = [path for path in train if path not in held_out]
        if not train:
            raise ImportProblem(
                "data-failed",
                f"`evaluation` holds out all {len(held_out)} files that match {self.path!r}",
                "write a pattern that leaves files to train on",
                "evaluation",
            )
        return train, held_out

    def trained(self, samples: int) -> int:
        """Return how many of the samples of the files to train on are trained on."""
        from trainc.runtime.sources.windows import split_windows

        return split_windows(samples, self.fraction)

    def count_by_size(self, item: int, end: int = 0) -> tuple[int | None, int]:
        """Return the number of samples, where a token has `item` bytes; None where there are no files yet.

        With `end` the files are one sequence, with that many tokens after each; else each is one of its own.
        """
        from trainc.runtime.sources.windows import count_windows

        if not matching(self.path):  # a plan may be made where the files are not; a run says so
            return None, self.context
        lengths = [path.stat().st_size // item + end for path in self.files()[0]]
        lengths = [sum(lengths)] if end else lengths
        samples = self.trained(sum(count_windows(n, self.context) for n in lengths))
        self.require_windows(samples, None)
        return samples, self.context

    @property
    def count_help(self) -> str:
        """What to write where the samples cannot be counted."""
        return f"no file matches {self.path!r} here: correct the pattern, or write steps or samples"

    def require_windows(self, train: int, held_out: int | None) -> None:
        """Raise ImportProblem where the files are too short for one sample to train on, and one that is held out."""
        lacks = "to train on" if train < 1 else "that is held out" if held_out == 0 else None
        if lacks is not None:
            raise ImportProblem(
                "data-failed",
                f"the files have not one sample {lacks}: a sample is {self.context + 1} tokens in a row",
                "write a smaller `context`, or name longer files",
                "context",
            )


def fingerprint(files: Sequence[Path]) -> str:
    """Return what a checkpoint keeps of files: their names and sizes, as one short text."""
    from hashlib import blake2b

    text = "\n".join(f"{path.name} {path.stat().st_size}" for path in files)
    return blake2b(text.encode(), digest_size=12).hexdigest()


def matching(pattern: str) -> list[Path]:
    """Return the files that match a pattern, in the order of their names."""
    folder = spec_folder()
    # `Path.glob` takes no absolute pattern.
    names = glob(pattern, root_dir=folder, recursive=True)  # noqa: PTH207
    found = sorted(folder / name for name in names)
    return [path for path in found if path.is_file()]


def _some(field: str, pattern: str) -> list[Path]:
    """Return the files that match a field's pattern; raises ImportProblem where none does."""
    files = matching(pattern)
    if not files:
        where = f" in {spec_folder()}, the folder of the spec"
        where = "" if Path(pattern).is_absolute() else where
        help_ = "correct the pattern: `*` is any part of a name, and `**/` any folders"
        raise ImportProblem("data-failed", f"no file matches {pattern!r}{where}", help_, field)
    return files
