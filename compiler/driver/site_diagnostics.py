"""Turn a SiteError raised at run time into a diagnostic on the clause that requested the site."""

from __future__ import annotations

from trainc.compiler.errors import SiteError
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.text.diagnostic import Diagnostic, Label

_KINDS = ("noise_scale", "regularize")
"""The kinds of clauses that request sites, the most likely one first."""


def site_diagnostic(error: SiteError, spec: Spec) -> Diagnostic:
    """Return the diagnostic of a SiteError, on the first clause of the spec that may have requested the site."""
    spans = [c.span for kind in _KINDS for c in spec.clauses if c.kind == kind and c.span]
    return Diagnostic(error.rule, str(error), tuple(Label(span) for span in spans[:1]))
