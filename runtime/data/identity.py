"""What identifies the data of a run: a checkpoint keeps it, and a resumed run compares it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainc.runtime.data.order import Data
from trainc.runtime.data.stream import count_samples
from trainc.runtime.storage.differences import Difference, samples_differ, tokens_differ


def data_identity(data: Data) -> dict[str, Any]:
    """Return the numbers of samples, the tokens of a sample, and the data's own `fingerprint` if it has one."""
    fingerprint = getattr(data, "fingerprint", None)
    return {
        "train": count_samples(data.train),
        "evaluation": None if data.evaluation is None else count_samples(data.evaluation),
        "tokens_per_sample": data.tokens_per_sample,
        "fingerprint": None if fingerprint is None else str(fingerprint),
    }


def data_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Difference]:
    """Yield what differs between the data of a checkpoint and the data that a run would continue on."""
    yield from samples_differ(before["train"], now["train"])
    yield from tokens_differ(before["tokens_per_sample"], now["tokens_per_sample"])
    if before["fingerprint"] != now["fingerprint"]:
        was, is_now = before["fingerprint"], now["fingerprint"]
        yield Difference(
            f"the `fingerprint` of the data was {_shown(was)} and is {_shown(is_now)}: the samples are others"
        )
    if before["evaluation"] != now["evaluation"]:
        yield Difference(
            f"the evaluation data had {before['evaluation'] or 'no'} samples and has {now['evaluation'] or 'none'}",
            "safe",
        )


def _shown(fingerprint: str | None) -> str:
    return "not given" if fingerprint is None else f"`{fingerprint[:40]}`"
