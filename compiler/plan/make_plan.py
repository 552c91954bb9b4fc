"""Make the plan of a binding and its lowered method: the plan is the method's printed form, as tables."""

from __future__ import annotations

from trainc.compiler.bind.binding import Binding
from trainc.compiler.method.lowered_method import LoweredMethod
from trainc.compiler.plan import parameter_tables, plan_tables, schedule_tables, site_tables
from trainc.compiler.plan.plan import Plan
from trainc.compiler.plan.replays import replay_warnings


def make_plan(binding: Binding, method: LoweredMethod) -> Plan:
    """Return the plan of what was bound and lowered."""
    model, data = binding.one("model"), binding.one("data")
    return Plan(
        spec=binding.spec.to_json(),
        fingerprint=binding.spec.fingerprint,
        model={
            "type": binding.inventory.model,
            "clause": model.construct.model_dump(mode="json") if model else None,
            "signature": binding.inventory.signature,
            **({"base_signature": binding.base.signature} if binding.base else {}),
        },
        data=data.construct.model_dump(mode="json") if data else None,
        settings=plan_tables.settings_row(binding, method),
        clauses=tuple(clause.to_json() for clause in binding.clauses),
        parameters=tuple(parameter_tables.parameter_rows(binding, method)),
        shares=tuple(parameter_tables.share_rows(binding, method)),
        measured=tuple(parameter_tables.measured_rows(method)),
        steps=tuple(plan_tables.step_rows(binding)),
        schedules=tuple(schedule_tables.schedule_rows(binding, method)),
        sites=tuple(site_tables.site_rows(binding, method)),
        kernels=tuple(site_tables.kernel_rows(method)),
        memory=tuple(plan_tables.memory_rows(binding, method)),
        warnings=(*binding.warnings, *replay_warnings(binding, method)),
    )
