"""The data a spec trains on, named by import path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from trainc.dsl.construct import Construct, Duration, ImportPath

if TYPE_CHECKING:
    from trainc.compiler.lowering import Lowering


class Data(Construct):
    """Calls `module:callable` with the given arguments; it returns the training and evaluation data.

    The object has `train` and `evaluation`, each with `len()` and `batch(indices) -> (inputs, targets)`, and
    `tokens_per_sample`. Imported only by compile, run and verify; `trainc plan` asks the callable's `describe`.
    """

    cite: ClassVar = "trainc"
    example: ClassVar = 'data "examples.data:stdlib" { batch = 32 samples, context = 128 }'
    open_fields: ClassVar = True

    path: ImportPath = Field(description="what to import, as `module:callable`")
    batch: Duration = Field(description="samples of one optimizer step, at the start of the run")
    micro: Duration | None = Field(
        default=None,
        description="samples of one forward and backward pass; a step's batch is made of whole ones. Default: batch",
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of the callable"
    )

    @field_validator("batch", "micro")
    @classmethod
    def _whole_samples(cls, value: Duration | None) -> Duration | None:
        if value is not None and (
            value.unit != "samples" or value.amount != int(value.amount) or value.amount < 1
        ):
            raise ValueError("expected a whole number of `samples`, such as `32 samples`")
        return value

    @property
    def micro_size(self) -> int:
        """Return the samples of one micro-batch."""
        return int((self.micro or self.batch).amount)

    def lower(self, to: Lowering) -> None:
        """Do nothing: the loop reads the batch sizes."""
