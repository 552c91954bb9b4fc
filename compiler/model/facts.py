"""What is known of the data before it is touched."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of the data without touching it; None where the callable does not describe itself."""

    samples: int | None = None
    tokens_per_sample: int | None = None
