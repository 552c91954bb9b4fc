"""`trainc delta`: what a run changed of its weights as a small file, and such a file put into weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def _export(run: Path, out: Path, base: Path | None) -> None:
    from trainc.runtime.storage.saved_weights import read_changes
    from trainc.runtime.storage.weight_delta import write_delta

    try:
        deltas = read_changes(run, base)
    except ValueError as error:
        raise ValueError(f"there is no delta of {run}: {error}") from error
    if not deltas:
        raise ValueError(f"there is no delta of {run}: no weight differs from those in {base}")
    write_delta(out, deltas)
    some = [delta for delta in deltas if delta.index is not None]
    whole = len(deltas) - len(some)
    entries, size = sum(len(delta.values) for delta in deltas), out.stat().st_size
    print(f"{out}: {entries} entries, {size} bytes, {size / entries:.3g} bytes an entry")
    print(f"  entries of {len(some)} tensors, {whole} tensors whole")


def _apply(delta: Path, weights: Path, out: Path | None) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save

    from trainc.kernels.library import atomic
    from trainc.runtime.storage.foreign_files import interpreting, open_file
    from trainc.runtime.storage.saved_weights import read_weights
    from trainc.runtime.storage.weight_delta import apply_delta, read_delta

    if weights.is_dir() and out is None:
        raise ValueError(
            f"{weights} is a folder, which stays as it is: write `--out FILE.safetensors` for the new weights"
        )
    deltas, about = read_delta(delta), None
    if weights.is_dir():
        tensors = read_weights(weights)
    else:
        with interpreting(weights):
            open_file(weights).close()  # says what is wrong with one that is missing or no file
            if weights.suffix != ".safetensors":
                raise ValueError("expected weights as FILE.safetensors; pickled ones are not read")
            with safe_open(weights, "pt") as file:
                about = file.metadata()
            tensors = load_file(weights)
    counts = apply_delta(tensors, deltas, str(weights))
    own = {id(t): n for n, t in reversed(tensors.items())}  # tied ones stand in a checkpoint once
    alone = {n: t.contiguous() for n, t in tensors.items() if own[id(t)] == n}
    target = weights if out is None else out
    atomic.write_bytes(target, save(alone, about))
    print(f"{target}: {sum(counts.values())} entries of {len(counts)} tensors were set")


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command("delta")
    def delta(
        what: Annotated[
            Path,
            typer.Argument(
                metavar="RUN | WEIGHTS",
                help="The folder of a run or of a checkpoint; with --apply the weights to change,"
                " FILE.safetensors or such a folder.",
            ),
        ],
        out: Annotated[
            Path | None,
            typer.Option(
                "--out",
                "-o",
                metavar="FILE",
                dir_okay=False,
                help="The file to write. With --apply it has the new weights; without it"
                " WEIGHTS themselves are changed.",
            ),
        ] = None,
        apply: Annotated[
            Path | None,
            typer.Option("--apply", metavar="FILE", help="Put this delta into WEIGHTS."),
        ] = None,
        base: Annotated[
            Path | None,
            typer.Option(
                "--base",
                metavar="WEIGHTS",
                help="The weights before the run: export what differs from them.",
            ),
        ] = None,
    ) -> None:
        """Export what a run changed of its weights as a small file, or put such a file into weights.

        A run whose mask lets few entries train differs from the weights that it started from in those
        entries. Their positions and values take 3 to 6 bytes an entry. Parameters that train whole, and buffers, are
        in the file whole: `rest = freeze` of the mask leaves the others untrained.

        \b
        trainc delta runs/tonight --out tonight.safetensors
        trainc delta --apply tonight.safetensors pretrained.safetensors --out tuned.safetensors

        What is applied is exactly what the run had, in any dtype. Weights that the run did not start from are refused,
        because their other entries differ. The weights are those that evaluation uses.

        Without --base the masks of the run say which entries changed. A run of any other method, and one that chose
        entries more than once, needs --base: then the file has every entry that differs, bit by bit.

        The file is safetensors: it holds numbers, and no code.
        """
        if apply is not None and base is not None:
            raise typer.BadParameter("it says what to export: leave it out", param_hint="--base")
        if apply is not None:
            _apply(apply, what, out)
        elif out is None:
            raise typer.BadParameter(
                "write where the delta goes: `--out FILE.safetensors`", param_hint="--out"
            )
        else:
            _export(what, out, base)
