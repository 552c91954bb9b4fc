"""Settings of a noise scale clause: what is compared, in which geometry, and how results are averaged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

HalfLifeUnit = Literal["steps", "samples", "tokens"]
Method = Literal["per_example", "micro_batch", "replica", "ghost"]
Geometry = Literal["euclidean", "adam", "sign"]

_SINGLE: dict[Method, str] = {
    "per_example": "two {examples} in a step; every step had one",
    "micro_batch": "two micro-batches in a step; every step had one: make `batch` at least twice `micro`",
    "replica": "two replicas; there was one: train on two or more, or use `method = micro_batch`",
    "ghost": "two groups in a step; every step had one: make `batch` at least twice `group`",
}


@dataclass(frozen=True, slots=True)
class NoiseScaleSettings:
    """How a noise scale is measured.

    `half_life` of the averages is in `unit`; that of the calibration is as long, and at least `calibrations` of its
    kind (None: there is no calibration). `errors` is how many standard errors the signal must be above zero, `level`
    the probability of intervals, `examples` the word for what an example is.
    """

    half_life: float
    unit: HalfLifeUnit
    errors: float = 0.0
    level: float = 0.9
    method: Method = "per_example"
    geometry: Geometry = "euclidean"
    jackknife: bool = False
    calibrations: float | None = None
    examples: str = "samples"

    @property
    def quantity(self) -> str:
        """Return the averaged quantity; averages of different quantities cannot be combined."""
        return f"{self.examples} in {self.geometry} geometry"

    @property
    def single_reason(self) -> str:
        """Return why there is no noise scale if every step had one example, micro-batch, replica or group."""
        return f"a noise scale needs {_SINGLE[self.method].format(examples=self.examples)}"
