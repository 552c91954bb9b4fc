"""Base of the constructs by which `trainc run` divides a run over processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from trainc.dsl.reading.construct import Construct, Duration, Effect

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from trainc.compiler.lower.lowering import Lowering


class Launched(Construct):
    """Says what the processes do that torchrun started for `trainc run`."""

    harmless: ClassVar = ("timeout",)

    timeout: Duration = Field(
        default=Duration(600, "seconds"),
        description="how long one process may be at one thing, such as a step, while the others wait, as a time; then"
        " the run ends with an error that names it",
    )

    @field_validator("timeout")
    @classmethod
    def _is_a_time(cls, value: Duration) -> Duration:
        if value.unit != "seconds" or value.amount < 1:
            raise ValueError(
                "expected a time of 1 second or more, such as `600 seconds` or `1 hour`"
            )
        return value

    @property
    def patience(self) -> float:
        """Return how many seconds one process may be at one thing while the others wait."""
        return self.timeout.amount

    def explain(self, error: Exception, model: nn.Module) -> str | None:
        """Return what is wrong with the clause, and what to write, where an error of torch says so."""
        return None

    def prepare(
        self, model: nn.Module, modules: Mapping[str, nn.Module], device: torch.device
    ) -> None:
        """Change a model before the clauses are lowered for it; `modules` are those that the clause selects."""

    def wrap(self, model: nn.Module, device: torch.device) -> Any:
        """Return what is called in place of the model in training steps."""
        return model


class Joined(Launched):
    """Divides every step over the processes that torchrun started. One process trains as without the clause."""

    effects: ClassVar = (
        Effect("reduce", "average gradients over processes", ("gradient",), ("gradient",)),
    )

    joins: ClassVar[str] = "by clause"
    shards: ClassVar[bool] = False
    """Whether each process holds a part of every parameter."""

    def lower(self, to: Lowering) -> None:
        """Let `trainc run` join the processes."""
        to.join(shards=self.shards)

    def reference(self, gradients: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return what becomes of the gradients of all processes, by name: their means."""
        import torch

        return {
            name: torch.stack([one[name] for one in gradients]).mean(0) for name in gradients[0]
        }
