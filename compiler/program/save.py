"""Save a program: plan and graph as JSON, weights and the graph's constants as safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file, save_model
from torch import nn

from trainc.compiler.graph.serialize import step_to_json
from trainc.compiler.graph.step_graph import StepGraph
from trainc.compiler.plan.plan import Plan

PLAN, GRAPH = "plan.json", "graph.json"
WEIGHTS, CONSTANTS = "weights.safetensors", "constants.safetensors"


def save(folder: Path, plan: Plan, module: nn.Module, graph: StepGraph | None) -> Path:
    """Write a program's plan, its graph if one was captured, and the model's weights; return the folder.

    A graph that an earlier program left in the folder is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PLAN).write_text(json_text(plan.to_json()))
    save_model(module, str(folder / WEIGHTS))
    (folder / GRAPH).unlink(missing_ok=True)
    (folder / CONSTANTS).unlink(missing_ok=True)
    if graph is not None:
        (folder / GRAPH).write_text(json_text(step_to_json(graph)))
        constants = {n: t.contiguous() for n, t in graph.constant_tensors().items()}
        if constants:
            save_file(constants, str(folder / CONSTANTS))
    return folder


def json_text(data: Any) -> str:
    """Return JSON in the form of saved files: keys sorted, one value a line."""
    return json.dumps(data, indent=1, sort_keys=True) + "\n"
