"""What is known of the data before it is built."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Facts:
    """Numbers that the data callable's `describe` gives; None where it does not."""

    samples: int | None = None
    tokens_per_sample: int | None = None
