"""The data a spec trains on, named by import path, and the batch size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, ValidationInfo, field_validator

from trainc.compiler.constructs.data._batch_policy import (
    BatchSize,
    Policy,
    action,
    parse_batch_policy,
    whole_micros,
)
from trainc.dsl.reading.construct import Construct, Effect, ImportPath, Samples
from trainc.dsl.values.value_json import Call, Duration

if TYPE_CHECKING:
    from trainc.compiler.lower.lowering import Lowering


class Data(Construct):
    """Calls `module:callable` with the given arguments; it returns the training and evaluation data.

    The object has `train` and `evaluation`, each with `len()` and `batch(indices) -> (inputs, targets)`, and
    `tokens_per_sample`. Imported only by compile, run and verify; `trainc plan` asks the callable's `describe`.

    `batch` is an amount, or a policy that sets it before every step, in whole micro-batches:

    - `ramp(16 samples, to = 120 samples, over = 2.2G tokens)`: on a line, rounded up to micro-batches; begun at
      `from`. A function of the clock alone. (Gray et al. 2024, in tokens.)
    - `follow(gns, max = 512 samples, min = 16 samples, factor = 0.5)`: `factor` (1) times what was measured, between
      `min` (a micro-batch) and `max`, in multiples of `step` (a micro-batch). It begins at `min`, changes only when
      the wanted size is a `step` or more away, at most once in `every`, not before `from`, and never down with
      `grow_only = true`.
    - `signal_noise(gns, max = 512 samples, theta = 0.6)`: grows to the noise scale divided by `theta` squared and
      never shrinks; begins at `min`, looks `every` 100 steps, `from` 15% of the run on.

    While what is followed is undetermined the batch stays. The rates do not follow the batch by themselves: see
    `lr batch_scaling`.
    """

    cite: ClassVar = (
        "trainc; ramp: Gray et al., Normalization Layer Per-Example Gradients, NeurIPS 2024, "
        "arXiv:2411.00999"
    )
    usage: ClassVar = 'data "examples.data:stdlib" { batch = 32 samples, context = 128 }'
    open_fields: ClassVar = True
    effects: ClassVar = (
        Effect("batch", "set the batch by its policy", ("clock", "batch"), ("batch",)),
    )

    path: ImportPath = Field(description="what to import, as `module:callable`")
    micro: Samples | None = Field(
        default=None,
        description="samples of one forward and backward pass; a step's batch is made of whole ones. "
        "Default: batch, the smallest one of a policy",
    )
    batch: BatchSize = Field(
        description="samples of one optimizer step: an amount, which rules may change, or a policy"
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of the callable"
    )

    @field_validator("micro")
    @classmethod
    def _micro_is_whole(cls, value: Duration | None) -> Duration | None:
        return None if value is None else _whole(value)

    @field_validator("batch")
    @classmethod
    def _batch_is_whole(cls, value: Duration | Call, info: ValidationInfo) -> Duration | Call:
        micro = info.data.get("micro")
        if isinstance(value, Call):
            if "micro" in info.data:
                parse_batch_policy(value, micro)
        elif _whole(value) and micro is not None:
            whole_micros(value, micro)
        return value

    @property
    def policy(self) -> Policy | None:
        """Return what sets the batch, None where it is an amount."""
        return parse_batch_policy(self.batch, self.micro) if isinstance(self.batch, Call) else None

    @property
    def start_size(self) -> int:
        """Return the samples of the first step."""
        if (policy := self.policy) is not None:
            return -(-policy.start // policy.micro) * policy.micro
        assert isinstance(self.batch, Duration)
        return int(self.batch.amount)

    @property
    def micro_size(self) -> int:
        """Return the samples of one micro-batch."""
        if (policy := self.policy) is not None:
            return policy.micro
        return int(self.micro.amount) if self.micro is not None else self.start_size

    def performs(self, effect: Effect) -> bool:
        """Only a policy acts: an amount is where the loop begins."""
        return self.policy is not None

    def describe(self, effect: Effect) -> str:
        """Return the policy as the spec writes it."""
        return f"batch = {self.batch}"

    def lower(self, to: Lowering) -> None:
        """Set the batch before every step where it is not an amount; the loop reads the sizes."""
        if (policy := self.policy) is None:
            return
        reason = f"a `data` clause takes no times; `{policy.name}` has its own as arguments"
        to.refuse_times(reason, "from", "until", "every")
        to.action(action(policy, to))


def _whole(value: Duration) -> Duration:
    if value.unit != "samples" or value.amount != int(value.amount) or value.amount < 1:
        raise ValueError("expected a whole number of `samples`, such as `32 samples`")
    return value
