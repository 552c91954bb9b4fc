"""What every `data` clause has: the batch and its policy, and who reads."""

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
from trainc.dsl.reading.construct import Construct, Effect, SamplesOrAuto
from trainc.dsl.values.value_json import Call, Duration

if TYPE_CHECKING:
    from trainc.compiler.lower.lowering import Lowering


WITH_RATES = Effect("batch", "scale the rates with the batch", ("batch", "clock"), ("rate",))


class DataSource(Construct):
    """Data in batches: a subclass says what the data is, with `load` and `count`."""

    effects: ClassVar = (
        Effect("batch", "set the batch by its policy", ("clock", "batch"), ("batch",)),
        WITH_RATES,
    )

    micro: SamplesOrAuto | None = Field(
        default=None,
        description="samples of one forward and backward pass; the batch of a step is a multiple of this. "
        "Default: the batch, or the smallest batch of a policy. `auto`: the same, and half of it, and so on, where a "
        "pass runs out of memory",
    )
    batch: BatchSize = Field(
        description="samples of one optimizer step: an amount, which rules may change, or a policy"
    )
    workers: int = Field(
        default=0,
        ge=0,
        description="processes that read samples ahead of time. The numbers of a run are the same for any number",
    )

    @field_validator("micro")
    @classmethod
    def _micro_is_whole(cls, value: Duration | str | None) -> Duration | str | None:
        return _whole(value) if isinstance(value, Duration) else value

    @field_validator("batch")
    @classmethod
    def _batch_is_whole(cls, value: Duration | Call, info: ValidationInfo) -> Duration | Call:
        given = info.data.get("micro")
        micro = given if isinstance(given, Duration) else None
        if isinstance(value, Call):
            if "micro" in info.data:
                parse_batch_policy(value, micro)
        elif _whole(value) and micro is not None:
            check_whole_micro_batches(value, micro)
        return value

    def load(self) -> Any:
        """Return the data as a run reads it; raises ImportProblem with the field that is wrong."""
        raise NotImplementedError(f"`{self.title}` has no data")

    def count(self) -> tuple[int | None, int | None]:
        """Return the number of training samples and the tokens of one, as far as they are known without loading."""
        return None, None

    @property
    def count_help(self) -> str:
        """What to write where `count` knows no number of samples."""
        return "write steps or samples"

    @property
    def policy(self) -> Policy | None:
        """Return the policy that sets the batch; None where the batch is an amount."""
        micro = self.micro if isinstance(self.micro, Duration) else None
        return parse_batch_policy(self.batch, micro) if isinstance(self.batch, Call) else None

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
        return int(self.micro.amount) if isinstance(self.micro, Duration) else self.start_size

    @property
    def halves_micro(self) -> bool:
        """Return whether a micro-batch that runs out of memory is passed in halves, and these in halves."""
        return self.micro == "auto"

    def performs(self, effect: Effect) -> bool:
        """Say whether this clause performs an effect: only a policy sets the batch, and only some the rates."""
        policy = self.policy
        return policy is not None and (effect != WITH_RATES or policy.scales_rates)

    def describe(self, effect: Effect) -> str:
        """Return the policy as the spec writes it."""
        return effect.action if effect == WITH_RATES else f"batch = {self.batch}"

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
