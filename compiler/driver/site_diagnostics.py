"""What a layer refuses once the model runs, told at the clause that asks it of the layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainc.dsl.text.diagnostic import Diagnostic, Label

if TYPE_CHECKING:
    from trainc.compiler.errors import SiteError
    from trainc.dsl.resolve.spec import Spec


_ASKING = ("noise_scale", "regularize")
"""The kinds whose clauses want something of layers, which of them first."""


def of_site(error: SiteError, spec: Spec) -> Diagnostic:
    """Return what a layer could not do as a diagnostic on the first clause that asks something of layers."""
    asking = [c for kind in _ASKING for c in spec.clauses if c.kind == kind and c.span is not None]
    labels = tuple(Label(c.span) for c in asking[:1] if c.span is not None)
    return Diagnostic(error.rule, str(error), labels)
