"""What masks share that choose entries, rows or columns of the selected parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

from trainc.dsl.reading.construct import Problem

if TYPE_CHECKING:
    from pydantic import ValidationInfo

    from trainc.compiler.bind.bound_clause import Targets

Granularity = TypeVar("Granularity", bound=str)


def fits_scope(granularity: Granularity, info: ValidationInfo) -> Granularity:
    """Return the granularity; raises ValueError for rows or columns of all tensors together."""
    if granularity != "element" and info.data.get("scope") == "global":
        raise ValueError(
            "rows and columns of different tensors differ in length: use `scope = tensor`"
        )
    return granularity


def vector_problems(bound: Targets, granularity: str) -> Iterator[Problem]:
    """Report vectors where rows or columns are chosen."""
    flat = [p.name for p in bound.parameters if p.ndim < 2]
    if flat and granularity != "element":
        message = f"`{flat[0]}` is not a matrix, so it has no {granularity}s"
        yield Problem("wrong-target-kind", message, help="select among `ndim(2)`")
