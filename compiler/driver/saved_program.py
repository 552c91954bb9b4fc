"""Load a saved program onto a model. No spec is parsed, and no code from the saved files is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, load_model
from torch import nn

from trainc.compiler.bind.binding import Binding
from trainc.compiler.bind.bound_clause import from_json
from trainc.compiler.catalog import catalog
from trainc.compiler.driver.compile import build_program
from trainc.compiler.graph.serialize import FORMAT as GRAPH_FORMAT
from trainc.compiler.graph.serialize import GraphFormatError, step_from_json
from trainc.compiler.graph.step_graph import StepGraph
from trainc.compiler.model.inventory import Inventory, build_inventory
from trainc.compiler.plan.plan import FORMAT, Plan
from trainc.compiler.program.execution import Executor
from trainc.compiler.program.program import Program
from trainc.compiler.program.save import CONSTANTS, GRAPH, PLAN, WEIGHTS
from trainc.dsl.resolve.spec import Spec
from trainc.runtime.schedule.clock import RunLength
from trainc.runtime.schedule.unit_conversion import UnitConversion


class LoadError(ValueError):
    """A saved program cannot be loaded onto this model; the message says why."""


def load(
    folder: str | Path, model: nn.Module, *, weights: bool = True, executor: Executor = "auto"
) -> Program:
    """Bind the program saved in `folder` to `model`, in place, and load its weights unless `weights` is false.

    Raises LoadError when a file is missing, damaged or of another format, or when the model's parameters are not
    those that the program was compiled for.
    """
    folder = Path(folder)
    saved = _read_json(folder / PLAN, FORMAT)
    try:
        plan = Plan.from_json(saved)
        clauses = tuple(from_json(data, catalog()) for data in plan.clauses)
        spec = Spec.from_json(plan.spec, catalog())
    except (ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{folder / PLAN}: {error}") from error
    inventory = build_inventory(model)
    _check_signature(plan, inventory)
    if weights:
        load_model(model, str(folder / WEIGHTS))
    length = plan.settings["length"]
    binding = Binding(
        spec,
        inventory,
        clauses,
        UnitConversion(**plan.settings["units"]),
        RunLength(float(length["amount"]), length["unit"]) if length else None,
    )
    program = build_program(binding, model, frozenset(), executor)
    if (folder / GRAPH).exists():
        program.execution.graphs.use(_graph(folder, model))
    return program


def _graph(folder: Path, model: nn.Module) -> StepGraph:
    """Return the saved graph over the parameters of `model`."""
    constants = load_file(str(folder / CONSTANTS)) if (folder / CONSTANTS).exists() else {}
    try:
        return step_from_json(_read_json(folder / GRAPH, GRAPH_FORMAT), model, constants)
    except GraphFormatError as error:
        raise LoadError(f"{folder / GRAPH}: {error}") from error


def _check_signature(plan: Plan, inventory: Inventory) -> None:
    saved = {name: (tuple(shape), dtype) for name, shape, dtype in plan.model["signature"]}
    here = {p.name: (p.shape, p.dtype) for p in inventory.parameters}
    for name, (shape, dtype) in saved.items():
        if name not in here:
            raise LoadError(
                f"the program was saved with a parameter `{name}`, which this {inventory.model} does not have"
            )
        if here[name] != (shape, dtype):
            own_shape, own_dtype = here[name]
            raise LoadError(
                f"`{name}` was {dtype}{list(shape)} when the program was compiled; in this {inventory.model} it is"
                f" {own_dtype}{list(own_shape)}"
            )
    if new := [name for name in here if name not in saved]:
        raise LoadError(
            f"this {inventory.model} has a parameter `{new[0]}`, which the program was not saved with"
        )


def _read_json(path: Path, version: int) -> Any:
    """Return the JSON data of a file; raises LoadError unless it is intact and of format `version`."""
    try:
        data = json.loads(path.read_text())
        found = data["format"]
    except FileNotFoundError:
        raise LoadError(
            f"there is no {path}: `trainc.load` takes a folder written by `trainc compile` or `program.save`"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{path} is damaged: {error}") from None
    if found != version:
        raise LoadError(
            f"{path} has format {found}, but this version of trainc reads format {version}: compile the spec again with"
            " `trainc compile`"
        )
    return data
