"""Load a saved program onto a model. No spec is parsed, and no code from the saved files is run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import nn

from trainc.compiler.bind.binding import Binding
from trainc.compiler.bind.bound_clause import BoundClause, from_json
from trainc.compiler.catalog import catalog
from trainc.compiler.driver.adaptation import adapted, base_inventory
from trainc.compiler.driver.compile import build_program
from trainc.compiler.execution.execution import Executor
from trainc.compiler.graph.serialize import FORMAT as GRAPH_FORMAT
from trainc.compiler.graph.serialize import GraphFormatError, step_from_json
from trainc.compiler.graph.step_graph import StepGraph
from trainc.compiler.model.import_path import ImportProblem, is_trusted, only_trusted
from trainc.compiler.model.inventory import Inventory, build_inventory
from trainc.compiler.plan.plan import FORMAT, Plan
from trainc.compiler.program.program import Program
from trainc.compiler.program.save import CONSTANTS, GRAPH, PLAN, WEIGHTS
from trainc.compiler.program.save import FORMAT as SAVED_FORMAT
from trainc.compiler.structure.wrappers import Unwrapped, name_through, tensors_of, unwrapped
from trainc.dsl.reading.construct import Construct
from trainc.dsl.resolve.spec import Spec
from trainc.dsl.text.errors import SpecError
from trainc.dsl.values.value_json import ImportPath
from trainc.runtime.processes.sharded import is_sharded, shard_like
from trainc.runtime.schedule.clock import RunLength
from trainc.runtime.schedule.unit_conversion import UnitConversion
from trainc.runtime.storage.foreign_files import (
    UnreadableFile,
    check_manifest,
    interpreting,
    read_json,
)

AGAIN = "compile the spec again with `trainc compile`"


class LoadError(UnreadableFile):
    """A saved program cannot be loaded onto this model; the message says why."""


def load(
    folder: str | Path,
    model: nn.Module,
    *,
    weights: bool = True,
    executor: Executor = "auto",
    trust: Iterable[str] = (),
) -> Program:
    """Bind the program saved in `folder` to `model`, in place, and load its weights unless `weights` is false.

    A model that the spec adapts may be given as it was before, or adapted. Nothing that the files name is imported but
    the optimizers of torch.optim and what is in `trust`: names of modules, or paths such as `"module:Class"`.

    Raises LoadError when a file is missing, damaged or of another format, when it names something that is not trusted,
    or when the model's parameters are not those that the program was compiled for.
    """
    folder, own = Path(folder), unwrapped(model)
    name_through(own)
    try:
        with only_trusted(trust):
            program = _load(folder, own, weights, executor)
    except LoadError:
        raise
    except (UnreadableFile, ImportProblem, SpecError, GraphFormatError) as error:
        raise LoadError(
            f"the program in {folder} cannot be loaded: {str(error).strip()}"
        ) from error
    if own is not model:
        program.forward = model
    return program


def _load(folder: Path, model: nn.Module, weights: bool, executor: Executor) -> Program:
    if not (folder / PLAN).exists():
        raise LoadError(
            f"there is no {folder / PLAN}: `trainc.load` takes a folder written by `trainc compile` or `program.save`"
        )
    files = check_manifest(folder, (PLAN, WEIGHTS), SAVED_FORMAT, AGAIN)["files"]
    saved = _read_json(folder / PLAN, FORMAT)
    with interpreting(folder / PLAN):
        plan = Plan.from_json(saved)
        clauses = tuple(from_json(data, catalog()) for data in plan.clauses)
        spec = Spec.from_json(plan.spec, catalog())
    for construct in (*(c.construct for c in clauses), *(c.construct for c in spec.clauses)):
        _check_paths(construct, folder / PLAN)
    with interpreting(folder / PLAN):
        if "base_signature" in plan.model:
            _check_signature(plan.model["base_signature"], base_inventory(model))
    with ExitStack() as stack:
        base = stack.enter_context(adapted(spec, model, clauses))
        inventory = build_inventory(model)
        with interpreting(folder / PLAN):
            _check_signature(plan.model["signature"], inventory)
        with interpreting(folder / PLAN):
            binding = _binding(plan, spec, clauses, inventory, base)
        graph = _graph(folder, model, CONSTANTS in files) if GRAPH in files else None
        stack.enter_context(_weights(folder / WEIGHTS if weights else None, model))
        with _building(folder / PLAN):
            program = build_program(binding, model, executor=executor)
        if graph is not None:
            program.execution.graphs.use(graph)
        return program


@contextmanager
def _weights(file: Path | None, model: nn.Module) -> Iterator[None]:
    """Load the weights in a file, if one is given; where the block fails the model has those of before again."""
    if file is None:
        yield
        return
    before = {name: tensor.detach().clone() for name, tensor in tensors_of(model).items()}
    try:
        with interpreting(file):
            _check_weights(file, model)
            _load_weights(file, model)
        yield
    except BaseException:
        with torch.no_grad():
            for name, tensor in tensors_of(model).items():
                tensor.copy_(before[name])
        raise


def _load_weights(file: Path, model: nn.Module) -> None:
    """Load the weights in a file, of which each process that shards the model takes its own."""
    here = tensors_of(model)
    if not any(map(is_sharded, here.values())):
        load_model(cast("nn.Module", Unwrapped(model)), str(file))
        return
    with torch.no_grad(), safe_open(str(file), "pt") as found:
        for name in found.keys():  # noqa: SIM118 - it is no dict
            here[name].copy_(shard_like(found.get_tensor(name), here[name]))


def _check_weights(file: Path, model: nn.Module) -> None:
    """Raise LoadError where a tensor has another shape or dtype than in the model: torch would convert it."""
    here = tensors_of(model)
    with safe_open(str(file), "pt") as found:
        for name in found.keys():  # noqa: SIM118 - it is no dict
            if (tensor := here.get(name)) is None:
                continue
            entry = found.get_tensor(name)
            if (entry.shape, entry.dtype) != (tensor.shape, tensor.dtype):
                forms = [f"{str(t.dtype)[6:]}{list(t.shape)}" for t in (entry, tensor)]
                raise LoadError(f"{file}: `{name}` is {forms[0]}, and in this model {forms[1]}")


@contextmanager
def _building(path: Path) -> Iterator[None]:
    """Name the plan where a clause in it is not of the form that its construct gives."""
    try:
        yield
    except (LookupError, TypeError, AttributeError) as error:
        raise LoadError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _check_paths(construct: Construct, path: Path) -> None:
    """Raise LoadError for an import path in a construct's fields that is not trusted.

    Loading imports no model and no data, so those of `model` and `data` may be any.
    """
    if construct.kind in ("model", "data"):
        return
    for name in type(construct).model_fields:
        for found in _import_paths(getattr(construct, name)):
            if not is_trusted(found):
                raise LoadError(
                    f"{path}: `{construct.title}` names `{found.module}:{found.attribute}`, which is imported only if"
                    f' you trust it: write `trainc.load(folder, model, trust=["{found.module}"])`'
                )


def _import_paths(value: object) -> Iterator[ImportPath]:
    if isinstance(value, ImportPath):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _import_paths(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _import_paths(inner)


def _binding(
    plan: Plan,
    spec: Spec,
    clauses: tuple[BoundClause, ...],
    inventory: Inventory,
    base: Inventory | None,
) -> Binding:
    length = plan.settings["length"]
    return Binding(
        spec,
        inventory,
        clauses,
        UnitConversion(**plan.settings["units"]),
        RunLength(float(length["amount"]), length["unit"]) if length else None,
        base,
    )


def _graph(folder: Path, model: nn.Module, has_constants: bool) -> StepGraph:
    """Return the saved graph over the parameters of `model`."""
    constants = {}
    if has_constants:
        with interpreting(folder / CONSTANTS):
            constants = load_file(str(folder / CONSTANTS))
    data = _read_json(folder / GRAPH, GRAPH_FORMAT)
    with interpreting(folder / GRAPH):
        return step_from_json(data, model, constants)


def _check_signature(signature: Sequence[Any], inventory: Inventory) -> None:
    saved = {name: (tuple(shape), dtype) for name, shape, dtype in signature}
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


def _read_json(path: Path, version: int) -> dict[str, Any]:
    """Return the JSON object of a file; raises LoadError unless it is of format `version`."""
    data = read_json(path)
    if data.get("format") != version:
        raise LoadError(
            f"{path} has format {data.get('format')}, but this version of trainc reads format {version}: {AGAIN}"
        )
    return data
