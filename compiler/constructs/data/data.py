"""The data that a spec trains on, named by import path, and the batch size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, ValidationInfo, field_validator

from trainc.compiler.constructs.data._batch_policy import (
    BatchSize,
    Policy,
    action,
    check_whole_micro_batches,
    parse_batch_policy,
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

    - `ramp(16 samples, to = 120 samples, over = 2.2G tokens)` changes it linearly, rounded up to micro-batches,
      beginning at `from`. It depends on the clock alone. (Gray et al. 2024, in tokens.)
    - `follow(gns, max = 512 samples, min = 16 samples, factor = 0.5)` sets it to `factor` (1) times a measured signal,
      between `min` (a micro-batch) and `max`, in multiples of `step` (a micro-batch). It begins with `min`. It changes
      only when the wanted size differs by a `step` or more, at most once in `every`, not before `from`, and with
      `grow_only = true` never to a smaller size.
    - `signal_noise(gns, max = 512 samples, theta = 0.6)` raises it to the noise scale divided by `theta` squared and
      never lowers it. It begins with `min` and looks `every` 100 steps, `from` 15% of the run on.

    While the signal is NaN, the batch stays as it is. Learning rates do not follow the batch by themselves: see
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
        description="samples of one forward and backward pass; the batch of a step is a multiple of this. "
        "Default: the batch, or the smallest batch of a policy",
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
            check_whole_micro_batches(value, micro)
        return value

    @property
    def policy(self) -> Policy | None:
        """Return the policy that sets the batch; None where the batch is an amount."""
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
        """Say whether this clause performs an effect: only a policy sets the batch."""
        return self.policy is not None

    def describe(self, effect: Effect) -> str:
        """Return the policy as the spec writes it."""
        return f"batch = {self.batch}"

    def lower(self, to: Lowering) -> None:
        """Add the action of a policy; an amount is read by the loop."""
        if (policy := self.policy) is None:
            return
        reason = f"a `data` clause takes no times, because `{policy.name}` has times as arguments"
        to.refuse_times(reason, "from", "until", "every")
        to.action(action(policy, to))


def _whole(value: Duration) -> Duration:
    if value.unit != "samples" or value.amount != int(value.amount) or value.amount < 1:
        raise ValueError("expected a whole number of `samples`, such as `32 samples`")
    return value
