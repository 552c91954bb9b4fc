"""Adapters that take no part in the loss of a model in which nothing else trains."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from trainc.compiler.errors import SiteError
from trainc.compiler.model.adapters import adapters_of

Run = TypeVar("Run", bound=Callable[..., Any])


def explaining_silence(run: Run) -> Run:
    """Return a method of an execution that raises SiteError, which names an adapter, where its loss has no gradient."""

    @wraps(run)
    def explained(self: Any, *args: Any, **named: Any) -> Any:
        try:
            return run(self, *args, **named)
        except RuntimeError as error:
            found = adapters_of(self.module) if "does not require grad" in str(error) else []
            if not found:
                raise
            raise SiteError(
                f"`{found[0].full_name}` takes no part in the loss, in which nothing trains: `{found[0].layer_name}` is"
                " never called, as where the model calls what is inside of it, or runs without gradients. Select a"
                " module that is called",
                found[0].adapter.label,
            ) from error

    return explained  # type: ignore[return-value]
