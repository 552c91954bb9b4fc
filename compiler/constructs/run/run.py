"""The run: its length, seed, evaluations and checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from trainc.dsl.reading.construct import Construct, Duration

if TYPE_CHECKING:
    from trainc.compiler.lower.lowering import Lowering


class Run(Construct):
    """States how long the run lasts, its seed, and when it evaluates and saves.

    The order of the data and all random numbers are functions of the seed and the clock, so a
    resumed run equals an uninterrupted one bit for bit.
    """

    cite: ClassVar = "trainc"
    usage: ClassVar = (
        "run { length = 2000 steps, seed = 7, eval = 200 steps, checkpoint = 500 steps }"
    )

    length: Duration = Field(
        description="when the run ends: steps, samples, tokens, epochs or seconds"
    )
    seed: int = Field(default=0, ge=0, description="seed of initial weights, data order and noise")
    start: str | None = Field(
        default=None,
        description="folder of another run, or .safetensors file, with the initial weights",
    )
    eval: Duration | None = Field(
        default=None, description="how often the model is evaluated. Default: only at the end"
    )
    eval_batches: int = Field(
        default=8, ge=1, description="micro-batches of held-out data in one evaluation"
    )
    checkpoint: Duration | None = Field(
        default=None, description="how often a checkpoint is saved. Default: only at the end"
    )
    keep: int = Field(default=2, ge=1, description="how many checkpoints are kept on disk")
    on_nan: Literal["stop", "skip", "continue"] = Field(
        default="stop",
        description="what happens at a loss that is not finite: stop before the update, skip the update, or continue",
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
            raise ValueError("expected a duration above 0, such as `200 steps` or `5%`")
        return value

    def lower(self, to: Lowering) -> None:
        """Do nothing: the loop reads these settings."""
