"""The mechanism for a clause that measures gradients."""

from __future__ import annotations

from dataclasses import replace

from trainc.compiler.lower.clause_access import ClauseAccess
from trainc.compiler.method.lowered_method import CalibrationPart
from trainc.compiler.method.sites import LayerSite, MeasuredSite, NormSite
from trainc.compiler.method.statistic import (
    BatchGradient,
    OfExamples,
    OfReplicas,
    OfSomeExamples,
    Statistic,
)
from trainc.runtime.schedule.gate import Gate


class StatisticAccess(ClauseAccess):
    """What is measured."""

    def statistic(self, request: Statistic) -> None:
        """Measure gradients at the clause's times: `OfExamples`, `OfMicroBatches`, `OfReplicas` or `OfSomeExamples`.

        These requests, in compiler/method/statistic.py, say where an action finds what was measured. While the gate is
        closed the layers run as they are. Raises ValueError where another clause counts examples otherwise,
        or measures the same parameter of replicas and this one of micro-batches.
        """
        if isinstance(request, OfSomeExamples):
            self.refuse_times(f"calibrations of `{self.label}` have a period of their own", "every")
            window = self._gate_of(request.every) or Gate()
            part = CalibrationPart(self.label, window, request.examples)
            self._method.calibrations.append(part)
        elif isinstance(request, OfExamples):
            self._measure_examples(request)
        else:
            of_replica, gate = isinstance(request, OfReplicas), self.gate()
            for name in request.parameters:
                known = self._method.batch_gradients.setdefault(name, BatchGradient(of_replica))
                if known.of_replica != of_replica:
                    raise ValueError(
                        f"another clause measures the gradient of `{name}` of each"
                        f" {'micro-batch' if of_replica else 'replica'}, and this one of each"
                        f" {'replica' if of_replica else 'micro-batch'}: measure the same in both"
                    )
                known.gates.append(gate)

    def _measure_examples(self, request: OfExamples) -> None:
        rewrite = self._method.rewrite
        if rewrite.measured and rewrite.example_units != request.units:
            raise ValueError(
                "another clause counts examples differently, but a program supports one definition of what an example"
                " is: give both clauses the same"
            )
        rewrite.example_units = request.units
        for site in request.sites:
            if isinstance(site, LayerSite) and site.per_example_gradients:
                reason = f"`{self.label}` changes how layers normalize, in the whole run"
                self.refuse_times(reason, "from", "until", "every")
            rewrite.measured_at.setdefault(site.module, []).append(self.gate())
            known = next((one for one in rewrite.measured if one.module == site.module), None)
            self._add_site(site, known)

    def _add_site(self, site: MeasuredSite, known: MeasuredSite | None) -> None:
        """Add a site; of a norm that several clauses measure there is one, with gradients where one wants them."""
        rewrite = self._method.rewrite
        if isinstance(site, LayerSite):
            if known is None:
                rewrite.layers.append(site)
            return
        if isinstance(known, NormSite):
            rewrite.norms.remove(known)
            gradients = site.per_example_gradients or known.per_example_gradients
            site = replace(site, per_example_gradients=gradients)
        rewrite.norms.append(site)
