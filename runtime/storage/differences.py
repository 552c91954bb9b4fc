"""Differences between what made a checkpoint and what loads it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Effect = Literal["safe", "needs --accept", "impossible"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference, in a sentence, and what it means for loading.

    `safe` changes no number of the run, `needs --accept` continues another run, `impossible` fits nowhere.
    """

    text: str
    effect: Effect = "needs --accept"

    def __str__(self) -> str:
        return f"{self.effect}: {self.text}"


def samples_differ(before: float | None, now: float | None) -> Iterator[Difference]:
    """Yield the difference between the numbers of training samples, if they differ."""
    if before != now:
        was, is_now = ("not known" if n is None else f"{n:.0f}" for n in (before, now))
        yield Difference(
            f"the number of training samples was {was} and is {is_now}: the order of the samples starts anew, so of"
            " this epoch some are read twice and some not at all"
        )


def tokens_differ(before: float | None, now: float | None) -> Iterator[Difference]:
    """Yield the difference between the tokens of a sample, if they differ."""
    if before != now:
        was, is_now = ("not known" if n is None else f"{n:.0f}" for n in (before, now))
        yield Difference(f"the number of tokens in a sample was {was} and is {is_now}")


class ChangedRun(ValueError):
    """A checkpoint was made by something else; `differences` has all of them."""

    def __init__(self, differences: Sequence[Difference]) -> None:
        self.differences = tuple(differences)
        lines = "".join(f"\n  {difference}" for difference in self.differences)
        super().__init__(
            "the checkpoint was made by another spec, model or data. Resume with `--accept`, or call `load_compatible`,"
            f" to keep what fits:{lines}"
        )

    @property
    def impossible(self) -> bool:
        """Say whether one of the differences makes loading impossible."""
        return any(one.effect == "impossible" for one in self.differences)


class OtherReplicas(ChangedRun):
    """A checkpoint holds another number of replicas than there are now, each with a state of its own."""


def check_differences(differences: Sequence[Difference], accept: bool) -> None:
    """Raise ChangedRun where a difference is impossible, or is not safe and not accepted."""
    effects = {difference.effect for difference in differences}
    if "impossible" in effects or ("needs --accept" in effects and not accept):
        raise ChangedRun(differences)
