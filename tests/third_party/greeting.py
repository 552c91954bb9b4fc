"""A turn with the other replicas, in which they only meet."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from trainc.dsl.reading.construct import Construct, Effect
from trainc.runtime.step.exchange import Exchange

if TYPE_CHECKING:
    from trainc.compiler.lower.lowering import Lowering
    from trainc.runtime.step.record import Step


class Greeting(Construct):
    """Meets the other replicas now and then."""

    cite: ClassVar = "nobody"
    usage: ClassVar = "distribute greeting every 2 steps"
    signals: ClassVar = {"bytes": "bytes sent"}
    effects: ClassVar = (Effect("exchange", "meet", ("clock",), ("metrics", "signal:bytes")),)

    def lower(self, to: Lowering) -> None:
        """Ask for turns."""
        to.exchange(Meet(to.label))


class Meet(Exchange):
    """Sends nothing."""

    def turn(self, step: Step, replicas: object) -> None:
        """Do nothing."""
