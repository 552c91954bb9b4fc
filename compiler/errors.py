"""The exceptions of the compiler, and the names of modules in their messages."""

from __future__ import annotations

from collections.abc import Iterable

from trainc.dsl.text.errors import CompilerBug as CompilerBug


def name_root_module(message: str) -> str:
    """Return a message with `the model itself` in place of the model's own name, which is empty."""
    return message.replace("``", "the model itself")


class SiteError(Exception):
    """A layer cannot do what the program needs of it; the message names the layer, `rule` the diagnostic.

    `clause` is the label of the clause that needs it, and `field` its field, where that is known.
    """

    rule = "site-not-delivered"

    def __init__(self, message: str, clause: str | None = None, field: str = "") -> None:
        super().__init__(name_root_module(message))
        self.clause, self.field = clause, field


class FieldError(ValueError):
    """The value of a field cannot be compiled; the message says why."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class RuleRefused(ValueError):
    """What rules do with the clause of this label is not possible."""

    def __init__(self, message: str, label: str) -> None:
        super().__init__(message)
        self.label = label


class ValueOutOfRange(SiteError, ValueError):
    """A number of a field is negative or not finite in a step; the message names field and number."""

    rule = "bad-value"


class ExampleAxisUnknown(SiteError):
    """A layer is given a tensor whose first axis is not the example axis."""

    rule = "example-axis-unknown"


class NoResidualBranch(SiteError):
    """A layer must be a residual branch, and what it gives is added to nothing."""

    rule = "wrong-target-kind"


class GraphRefused(SiteError):
    """A step cannot run as a graph; the message says why.

    `detail` says more of this step: another one may be refused for the same `reason` with other figures.
    """

    rule = "capture-failed"

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def repeated_layers(names: Iterable[str]) -> SiteError:
    """Return the error for layers that run more than once in one forward pass."""
    return SiteError(
        f"{listed(names)} ran more than once in one forward pass. A measured layer must run only once:"
        " exclude such layers from `on`"
    )


def listed(names: Iterable[str]) -> str:
    """Return names in backticks, separated by commas."""
    return ", ".join(f"`{name}`" for name in names)


class NotMeasurable(ValueError):
    """A module does not have per-example gradient norms that can be measured."""

    def __init__(self, message: str) -> None:
        super().__init__(name_root_module(message))


class SiteMissing(ValueError):
    """A pass did not find some layers that it must rewrite in the captured graph."""

    def __init__(self, pass_name: str, missing: Iterable[str]) -> None:
        self.pass_name, self.missing = pass_name, tuple(missing)
        names = ", ".join(f"`{name}`" for name in self.missing)
        super().__init__(
            f"pass `{pass_name}` did not find {len(self.missing)} of its layers in the captured graph: {names}"
        )


class SiteUnfit(ValueError):
    """A pass cannot rewrite a layer that it found; the message names the layer."""

    def __init__(self, module: str, reason: str) -> None:
        self.module = module
        super().__init__(f"`{module}`: {reason}")


class PassBug(CompilerBug):
    """A pass broke the graph; `before` is the listing of the graph it was given."""

    def __init__(self, pass_name: str, reason: str, before: str) -> None:
        self.pass_name, self.before = pass_name, before
        super().__init__(
            f"pass `{pass_name}`",
            f"the pass broke the graph: {reason}\nWrite `--without {pass_name}` to leave the pass out."
            f" The graph before the pass:\n{before}\n",
        )
