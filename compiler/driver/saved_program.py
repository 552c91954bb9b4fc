"""Saved programs: plan and graph as JSON, weights as safetensors. Loading parses nothing and runs no code of theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainc.compiler.bind.binding import Binding
from trainc.compiler.bind.bound_clause import from_json
from trainc.compiler.catalog import catalog
from trainc.compiler.model.inventory import Inventory, take
from trainc.compiler.plan.plan import Plan
from trainc.runtime.schedule.clock import RunLength, UnitConversion

if TYPE_CHECKING:
    from torch import nn

    from trainc.compiler.program.execution import Executor
    from trainc.compiler.program.program import Program

PLAN, GRAPH, WEIGHTS, CONSTANTS = (
    "plan.json",
    "graph.json",
    "weights.safetensors",
    "constants.safetensors",
)


class LoadError(ValueError):
    """A saved program cannot be bound: the message says what differs."""


def save(program: Program, folder: Path) -> Path:
    """Write a program's plan, its graph if one was captured, and the model's weights; return the folder."""
    from safetensors.torch import save_file, save_model

    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / PLAN, program.plan.to_json())
    save_model(program.module, str(folder / WEIGHTS))
    graph = program.graph
    if graph.installed:
        _write(folder / GRAPH, graph.to_json())
        constants = {n: t.contiguous() for n, t in graph.constant_tensors().items()}
        if constants:
            save_file(constants, str(folder / CONSTANTS))
    return folder


def load(
    folder: str | Path, model: nn.Module, *, weights: bool = True, executor: Executor = "auto"
) -> Program:
    """Bind the program saved in `folder` to `model` and, unless told otherwise, load its weights.

    Raises LoadError when a file is missing or damaged, or the model's parameters are not those it was compiled for.
    """
    from safetensors.torch import load_file, load_model

    from trainc.compiler.driver.compile import build_program
    from trainc.compiler.graph.step_graph import StepGraph
    from trainc.dsl.resolve.spec import Spec

    folder = Path(folder)
    try:
        plan = Plan.from_json(_read(folder / PLAN))
        clauses = tuple(from_json(data, catalog()) for data in plan.clauses)
        spec = Spec.from_json(plan.spec, catalog())
    except (ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{folder / PLAN}: {error}") from error
    inventory = take(model)
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
        constants = load_file(str(folder / CONSTANTS)) if (folder / CONSTANTS).exists() else {}
        program.execution.use_graph(StepGraph.from_json(_read(folder / GRAPH), model, constants))
    return program


def _check_signature(plan: Plan, inventory: Inventory) -> None:
    saved = {name: (tuple(shape), dtype) for name, shape, dtype in plan.model["signature"]}
    here = {p.name: (p.shape, p.dtype) for p in inventory.parameters}
    for name in saved:
        if name not in here:
            raise LoadError(
                f"the program was compiled for a model with `{name}`; `{inventory.model}` has no such parameter"
            )
        if saved[name] != here[name]:
            raise LoadError(
                f"`{name}` was {_say(saved[name])} when the program was compiled, and is {_say(here[name])} here"
            )
    new = [name for name in here if name not in saved]
    if new:
        raise LoadError(
            f"`{inventory.model}` has `{new[0]}`, which the program was not compiled for"
        )


def _say(entry: tuple[tuple[int, ...], str]) -> str:
    return f"{entry[1]}{list(entry[0])}"


def _write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise LoadError(f"{path} is not there: is this the folder of a saved program?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LoadError(f"{path} is damaged: {error}") from None
