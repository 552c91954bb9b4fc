"""The run: how long, from which seed, and what is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from trainc.dsl.reading.construct import Construct, Duration

if TYPE_CHECKING:
    from trainc.compiler.lower.lowering import Lowering


class Run(Construct):
    """States the length of the run and everything about it that is not a method.

    Data order and random streams are functions of the seed and the clock, so a resumed run equals an
    uninterrupted one bit for bit.
    """

    cite: ClassVar = "trainc"
    usage: ClassVar = (
        "run { length = 2000 steps, seed = 7, eval = 200 steps, checkpoint = 500 steps }"
    )

    length: Duration = Field(description="when the run ends, in any unit of the clock")
    seed: int = Field(default=0, ge=0, description="seed of initial weights, data order and noise")
    start: str | None = Field(
        default=None,
        description="folder of another run, or .safetensors file, that gives the initial weights",
    )
    eval: Duration | None = Field(
        default=None, description="distance between evaluations. Default: only at the end"
    )
    eval_batches: int = Field(
        default=8, ge=1, description="micro-batches of held-out data per evaluation"
    )
    checkpoint: Duration | None = Field(
        default=None, description="distance between checkpoints. Default: only at the end"
    )
    keep: int = Field(default=2, ge=1, description="how many checkpoints stay on disk")
    on_nan: Literal["stop", "skip", "continue"] = Field(
        default="stop",
        description="what a non-finite loss does: stop before the update, skip the update, or carry on",
    )

    @field_validator("length")
    @classmethod
    def _a_length(cls, value: Duration) -> Duration:
        if value.unit == "run" or value.amount <= 0:
            raise ValueError("expected a length such as `2000 steps`, `3 epochs` or `1.5G tokens`")
        return value

    @field_validator("eval", "checkpoint")
    @classmethod
    def _a_distance(cls, value: Duration | None) -> Duration | None:
        if value is not None and value.amount <= 0:
            raise ValueError("expected a distance such as `200 steps` or `5%`")
        return value

    def lower(self, to: Lowering) -> None:
        """Do nothing: the loop reads these settings."""
