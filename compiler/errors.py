"""The exceptions that the stages of the compiler raise, and how their messages name modules."""

from __future__ import annotations

from collections.abc import Iterable

from trainc.dsl.text.errors import CompilerBug


def name_root_module(message: str) -> str:
    """Return a message that calls the model by words: as a module its name is empty, in backticks nothing to read."""
    return message.replace("``", "the model itself")


class SiteError(Exception):
    """A site cannot do what the plan expects of it; the message names the module, `rule` the diagnostic."""

    rule = "site-not-delivered"

    def __init__(self, message: str) -> None:
        super().__init__(name_root_module(message))


class ExampleAxisUnknown(SiteError):
    """A site sees a tensor whose first axis is not the example axis."""

    rule = "example-axis-unknown"


def repeated(names: Iterable[str]) -> SiteError:
    """Return the error about layers that run more than once in one forward pass."""
    return SiteError(
        f"{listed(names)} ran more than once in one forward pass: the squared norm of a sum is not the sum of squared"
        " norms, so its statistics would be wrong. Leave it out of the selection"
    )


def listed(names: Iterable[str]) -> str:
    """Return names as they stand in messages."""
    return ", ".join(f"`{name}`" for name in names)


class NotMeasurable(ValueError):
    """A module computes nothing whose per-example gradient norms we know how to take."""

    def __init__(self, message: str) -> None:
        super().__init__(name_root_module(message))


class SiteMissing(ValueError):
    """Sites the plan names were not found in the captured graph."""

    def __init__(self, pass_name: str, missing: Iterable[str]) -> None:
        self.pass_name, self.missing = pass_name, tuple(missing)
        names = ", ".join(f"`{name}`" for name in self.missing)
        super().__init__(
            f"pass `{pass_name}` did not find {len(self.missing)} of its sites "
            f"in the graph: {names}"
        )


class SiteUnfit(ValueError):
    """A site was found but cannot be served; the message names the module."""

    def __init__(self, module: str, reason: str) -> None:
        self.module = module
        super().__init__(f"`{module}`: {reason}")


class PassBug(CompilerBug):
    """A pass broke the graph; `before` is the listing of the graph it was given."""

    def __init__(self, pass_name: str, reason: str, before: str) -> None:
        self.pass_name, self.before = pass_name, before
        super().__init__(
            f"pass `{pass_name}`",
            f"it broke the graph: {reason}\n`--without {pass_name}` leaves the pass out."
            f" The graph before it:\n{before}\n",
        )
