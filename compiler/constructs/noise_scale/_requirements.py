"""Check what a noise scale needs of the selected modules, the sizes of the batch and the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from trainc.dsl.reading.construct import Problem

if TYPE_CHECKING:
    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.constructs.noise_scale.gns import Gns
    from trainc.compiler.model.inventory import ModuleEntry, ParameterEntry

_NORMS = ("LayerNorm", "RMSNorm")
_LAYERS = (
    *_NORMS, "GroupNorm", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "Linear", "Embedding",
    "Conv1d", "Conv2d", "Conv3d", "Conv1D",
)  # fmt: skip
_SELECT_NORMS = "select LayerNorm and RMSNorm layers: `on type(LayerNorm, RMSNorm)`"


class _Reason(NamedTuple):
    """Why a module cannot be measured: rule, message after the module's name, and help."""

    rule: str
    message: str
    help: str | None = None


def module_problems(rule: Gns, bound: Targets) -> Iterator[Problem]:
    """Report selected modules that cannot be measured; modules with the same reason share a problem."""
    found: dict[_Reason, list[str]] = {}
    for module in bound.modules:
        if (reason := _unmeasurable(rule, module, bound)) is not None:
            found.setdefault(reason, []).append(module.name)
    for reason, names in found.items():
        message = f"`{names[0]}` {reason.message}"
        others = len(names) - 1
        notes = (f"other selected modules with this problem: {others}",) if others else ()
        yield Problem(reason.rule, message, notes=notes, help=reason.help)
    if not found and not any(module.parameters for module in bound.modules):
        yield Problem("nothing-to-measure", "no selected module has parameters of its own")


def _unmeasurable(rule: Gns, module: ModuleEntry, bound: Targets) -> _Reason | None:
    """Return why a module cannot be measured, by names and types alone; None where they allow it."""
    is_norm = _is_norm(module)
    if "_BatchNorm" in module.types and rule.method == "ghost":
        return None
    if module.batch_statistics:
        help_ = (
            f"{_SELECT_NORMS}, or compare what BatchNorm normalizes together: micro-batches, `method = micro_batch`, or"
            " groups of a micro-batch, `method = ghost, group = 8`"
        )
        message = "normalizes over the batch, so a single example has no gradient of its own"
        return _Reason("norm-mixes-examples", message, help_)
    if f"{module.name}.parametrizations".lstrip(".") in bound.inventory.module:
        message = "has a weight that is computed from other parameters (a parametrization)"
        help_ = "exclude it from `on`, or remove the parametrization"
        return _Reason("wrong-target-kind", message, help_)
    if not module.parameters:
        message, help_ = "has no weight (elementwise_affine=False)", "exclude it from `on`"
        return _Reason("nothing-to-measure", message, help_) if is_norm else None
    if not is_norm and (setting := rule.gradients_setting):
        message = f"is not a norm layer, but `{setting}` is supported for norm layers only"
        return _Reason("wrong-target-kind", message, _SELECT_NORMS)
    if not _is_layer(module):
        if _only_names(module, bound):
            return None
        message = "has parameters of its own, but is not a supported layer"
        help_ = f"exclude it from `on`; supported layers are {', '.join(_LAYERS)}"
        return _Reason("wrong-target-kind", message, help_)
    if not module.trainable:
        message, help_ = "has only frozen weights, which get no gradient", "exclude it from `on`"
        return _Reason("selector-matches-frozen", message, help_)
    return _shared_weight(module, bound)


def _shared_weight(module: ModuleEntry, bound: Targets) -> _Reason | None:
    """Report a shared weight, unless an embedding and its output head share it and both are selected."""
    owners: dict[str, ModuleEntry] = {}
    for name in module.parameters:
        holding = _layers_holding(bound.inventory.parameter[name], bound)
        owners |= holding if len(holding) > 1 else {}
    if not owners:
        return None
    types = sorted(t for m in owners.values() for t in ("Embedding", "Linear") if t in m.types)
    others, help_ = owners.keys() - {module.name}, "exclude them from `on`"
    if types == ["Embedding", "Linear"]:
        others = owners.keys() - {m.name for m in bound.modules}
        help_ = "select both the embedding and the head, or neither of them"
        if not others:
            return None
    names = ", ".join(f"`{name}`" for name in sorted(others))
    message = (
        f"shares its weight with {names}; per-example norms of shared weights are supported for an embedding and its"
        " output head only"
    )
    if types == ["Embedding", "Linear"]:
        message = f"shares its weight with {names}, which is not selected"
    return _Reason("wrong-target-kind", message, help_)


def _only_names(module: ModuleEntry, bound: Targets) -> bool:
    """Say whether all parameters of a module belong to selected layers inside it, under other names."""
    inside = {m.name for m in bound.modules if m.name.startswith(f"{module.name}.".lstrip("."))}
    held = (bound.inventory.parameter[name] for name in module.parameters)
    return all(not inside.isdisjoint(_layers_holding(p, bound)) for p in held)


def _layers_holding(parameter: ParameterEntry, bound: Targets) -> dict[str, ModuleEntry]:
    """Return the layers that hold a parameter, each by its first name."""
    owners = (bound.inventory.module[name] for name in parameter.modules)
    return {module.name: module for module in owners if _is_layer(module)}


def _is_layer(module: ModuleEntry) -> bool:
    return _is_norm(module) or any(name in _LAYERS for name in module.types)


def _is_norm(module: ModuleEntry) -> bool:
    return any(name.endswith(_NORMS) for name in module.types)


def micro_batch_problems(bound: Targets) -> Iterator[Problem]:
    """Report steps with a single micro-batch where micro-batches are compared."""
    sizes = bound.sizes
    if sizes is not None and not sizes.changing and sizes.start <= sizes.micro:
        half = max(1, sizes.start // 2)
        yield Problem(
            "nothing-to-measure",
            "`method = micro_batch` compares the micro-batches of a step, but a step has only one:"
            f" {sizes.micro} samples",
            field="method",
            help=f"set `micro = {half} samples` in `data`, or use `method = per_example`",
        )


def calibration_problems(rule: Gns, bound: Targets) -> Iterator[Problem]:
    """Report calibrations that a BatchNorm in train mode does not allow, or for which a micro-batch is too small."""
    asked = rule.calibrate_examples if "calibrate_examples" in rule.model_fields_set else None
    # Where the clause compares examples itself, that is said of all of it.
    if rule.method != "per_example" and (norm := batch_norm(bound)) is not None:
        yield Problem(
            "norm-mixes-examples",
            f"`calibrate` runs one example at a time, which BatchNorm (`{norm}`) in train mode does not support",
            field="calibrate",
            help="remove `calibrate`, or put the BatchNorm layers in eval mode before the spec is compiled",
        )
    micro = None if bound.sizes is None else bound.sizes.micro
    if micro == 1:
        yield Problem(
            "nothing-to-measure",
            "`calibrate` compares the examples of a micro-batch, but a micro-batch has only one sample",
            field="calibrate",
            help="set `micro = 2 samples` or more in `data`, or remove `calibrate`",
        )
    elif micro is not None and asked is not None and asked > micro:
        yield Problem(
            "no-effect",
            f"`calibrate_examples = {asked}` is more than the {micro} samples of a micro-batch, so {micro} are used",
            field="calibrate_examples",
            help=f"write `calibrate_examples = {micro}`, or set a larger `micro` in `data`",
            severity="warning",
        )


def mixing_problems(rule: Gns, bound: Targets) -> Iterator[Problem]:
    """Report a BatchNorm anywhere in the model that mixes what the method compares."""
    joined = batch_norm(bound, "SyncBatchNorm")
    if rule.method == "per_example" and (norm := batch_norm(bound)) is not None:
        yield Problem(
            "norm-mixes-examples",
            f"`{norm}` normalizes over the batch, so in no layer of the model has an example a gradient of its own",
            help="write `method = micro_batch` or `method = ghost, group = 8`, or put the BatchNorm layers in eval mode"
            " before the spec is compiled",
        )
    elif rule.method in ("replica", "ghost") and joined is not None:
        compared = "a replica" if rule.method == "replica" else "a group"
        yield Problem(
            "norm-mixes-examples",
            f"`{joined}` is a SyncBatchNorm, which normalizes the examples of all replicas together, so {compared} has"
            " no gradient of its own",
            help="make it a BatchNorm, or put it in eval mode before the spec is compiled",
        )


def batch_norm(bound: Targets, type_name: str = "_BatchNorm") -> str | None:
    """Return the name of the model's first BatchNorm that mixes the batch, in its mode of now; None without one."""
    mixing = (m for m in bound.inventory.modules if m.batch_statistics and type_name in m.types)
    return next((m.name for m in mixing), None)
