"""The weights that a command names: of a model, a spec, a run, a checkpoint, a program or a file of tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trainc.compiler.catalog import catalog
from trainc.compiler.driver.adaptation import started_model
from trainc.compiler.driver.saved_program import AGAIN
from trainc.compiler.model.import_path import searching
from trainc.compiler.model.inventory import build_inventory
from trainc.compiler.program.save import FORMAT, PLAN, WEIGHTS
from trainc.compiler.structure.weights import find_units, read_units
from trainc.dsl.resolve.resolver import load_spec
from trainc.dsl.text.source import Source
from trainc.kernels.parameter.spectrum import count, matrices
from trainc.runtime.storage.foreign_files import (
    MANIFEST,
    UnreadableFile,
    check_manifest,
    interpreting,
    open_file,
    read_json,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

EXPECTED = (
    "expected a .train file, a .safetensors file, the folder of a run, of a checkpoint or of a"
    ' program that `trainc compile` saved, or a model as "module:callable"'
)


@dataclass(frozen=True, slots=True)
class FoundWeights:
    """Weights as matrices (count, out, in) by name, the shapes of what has no spectrum, and where they are from.

    The weights of a model are divided as it uses them, such as a fused projection. In a file they are whole.
    """

    stacks: dict[str, Tensor]
    others: dict[str, tuple[int, ...]]
    source: str


def find_weights(given: str, settings: Sequence[str] = ()) -> FoundWeights:
    """Return the weights that `given` names; `settings` are those of the `let` values of a spec, NAME=VALUE.

    A model is built with the seed of its spec, or 0. Raises SpecError, UnreadableFile, or ValueError for what names
    nothing.
    """
    path = Path(given)
    if settings and path.suffix != ".train":
        raise ValueError(
            f"`--set {settings[0]}` sets a `let` of a spec, and `{given}` is none: leave it out; arguments of a model"
            ' are written with it, "module:callable { name = value }"'
        )
    if path.is_dir():
        return _in_folder(path)
    if path.suffix == ".safetensors":
        return _of_tensors(_read(path), str(path))
    if path.suffix == ".train":
        return _of_spec(path, path, settings, f"initial weights of the model in {path}")
    if path.exists():
        raise UnreadableFile(f"{path} cannot be read for weights: {EXPECTED}")
    module, colon, _ = given.partition(":")
    if not colon or "/" in module or not module.strip():
        raise ValueError(f"there is no `{given}`: {EXPECTED}")
    model, brace, arguments = given.partition("{")
    text = f'train 1\nmodel "{model.strip()}" {brace}{arguments}\n'
    return _of_spec(Source("<command line>", text), None, (), f"initial weights of {given}")


def _of_spec(
    spec: Path | Source, path: Path | None, settings: Sequence[str], source: str
) -> FoundWeights:
    checked = load_spec(spec, catalog(), settings).unwrap()
    with searching(path):
        model = started_model(checked)
    inventory = build_inventory(model)
    units = find_units(inventory.weights)
    used = {name for weight in inventory.weights for name in weight.parameters}
    others = {p.name: p.shape for p in inventory.parameters if p.name not in used}
    return FoundWeights(read_units(model, units), others, source)


def _of_tensors(tensors: dict[str, Tensor], source: str) -> FoundWeights:
    fit = {n: t for n, t in tensors.items() if count(t.shape) and t.is_floating_point()}
    others = {n: tuple(t.shape) for n, t in tensors.items() if n not in fit}
    return FoundWeights({n: matrices(t) for n, t in fit.items()}, others, source)


def _in_folder(folder: Path) -> FoundWeights:
    from trainc.runtime.storage.checkpoint import DamagedCheckpoint, find_latest

    if (folder / "checkpoints").is_dir():
        found = find_latest(folder / "checkpoints")
        if found.path is None:
            why = "; ".join(found.damage) or "it has no checkpoint"
            raise DamagedCheckpoint(f"there are no weights of the run in {folder}: {why}")
        return _of_checkpoint(found.path)
    if (folder / WEIGHTS).exists():
        return _of_program(folder)
    if (folder / MANIFEST).exists():
        return _of_checkpoint(folder)
    raise UnreadableFile(
        f"{folder} is a folder without a run, a checkpoint or a program: {EXPECTED}"
    )


def _of_checkpoint(path: Path) -> FoundWeights:
    """Return the parameters in a checkpoint: buffers, such as masks of attention, are no weights."""
    from trainc.runtime.storage.checkpoint import load_checkpoint

    state = load_checkpoint(path)
    with interpreting(path):
        tensors: dict[str, Any] = state["program"]["model"]
        names = [name for name, *_ in state["program"]["made_by"]["signature"]]
        found = {name: tensors[name] for name in names}
    return _of_tensors(found, str(path))


def _of_program(folder: Path) -> FoundWeights:
    """Return the parameters of a saved program, of which tied ones are stored under one of their names."""
    check_manifest(folder, (PLAN, WEIGHTS), FORMAT, AGAIN)
    tensors = _read(folder / WEIGHTS)
    with interpreting(folder / PLAN):
        names = [name for name, *_ in read_json(folder / PLAN)["model"]["signature"]]
    return _of_tensors({n: tensors[n] for n in names if n in tensors}, str(folder))


def _read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file; those that share memory, as tied weights, stand there once."""
    from safetensors.torch import load_file

    open_file(path).close()  # says what is wrong with one that is missing or no file
    with interpreting(path):
        return load_file(path)
