"""What losses share that the user's own code computes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from trainc.compiler.constructs.loss._base import LossConstruct
from trainc.compiler.method.user_loss import Counting


class UserLossConstruct(LossConstruct):
    """Base of these: what they count, and where clauses find the logits."""

    counted: Counting | None = Field(
        default=None,
        description="what the mean runs over: `examples`; `targets` that are not `ignore_index`; or"
        " `shifted_targets`, these without the first of each example, as where a model predicts the next token."
        " Default: found by a few passes, where it is needed",
    )
    ignore_index: int = Field(default=-100, description="target value that the loss leaves out")
    logits: str | Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="which part of the model's output has the logits that other clauses read, by name or index."
        " Default: `logits`, or the first tensor of several values",
    )

    @property
    def may_ignore(self) -> bool:
        """Whether the clause says which target is ignored."""
        return "ignore_index" in self.model_fields_set or self.counted not in (None, "examples")
