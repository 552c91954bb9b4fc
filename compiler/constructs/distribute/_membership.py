"""Whether replicas are fixed, or leave and join by torchft, which has to be installed for that."""

from __future__ import annotations

from typing import Literal

Membership = Literal["fixed", "torchft"]


def require_library(membership: Membership) -> None:
    """Raise ImportProblem where what finds the replicas is not installed."""
    from trainc.compiler.model.import_path import ImportProblem
    from trainc.runtime.processes.torchft_connection import has_library

    if membership == "torchft" and not has_library():
        raise ImportProblem(
            "missing-library",
            "`membership = torchft` needs torchft, which is not installed",
            help="for a loop of your own install it: pip install trainc[torchft]; for `trainc run`, which divides its"
            " data over fixed replicas, remove `membership`",
            field="membership",
        )
