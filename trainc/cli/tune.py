"""`trainc tune`: find the fastest launch settings of the norm kernels on this GPU."""

import sys
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command("tune")
    def tune(
        width: Annotated[
            list[int] | None,
            typer.Option(
                "--width",
                help="A width (normalized size) of the model's norms; may be repeated.",
                min=1,
            ),
        ] = None,
        dry: Annotated[bool, typer.Option("--dry", help="Measure, but save nothing.")] = False,
    ) -> None:
        """Find the fastest launch settings of the norm kernels on this GPU, and save them.

        Takes some minutes. Only settings faster than the built-in table are saved; later runs on this kind of GPU use
        them. Delete the file that the command names to undo this.
        """
        import torch

        from trainc.kernels.library.grid import power_of_2
        from trainc.kernels.norm import tiles, tuned_tiles

        if not torch.cuda.is_available():
            print("trainc tune: this machine has no CUDA device", file=sys.stderr)
            raise typer.Exit(1)
        if torch.version.hip is not None:
            print("trainc tune: AMD's GPUs run no Triton kernels of trainc's", file=sys.stderr)
            raise typer.Exit(1)
        from trainc.kernels.norm.tune import WIDTHS, seconds
        from trainc.kernels.norm.tune import tune as measured

        name = torch.cuda.get_device_name()
        columns = sorted({power_of_2(one) for one in width}) if width else WIDTHS
        if columns[-1] > tiles.HELD:
            raise typer.BadParameter(f"a width can be at most {tiles.HELD}", param_hint="--width")
        found = {}
        for one in measured(seconds, columns):
            gain = 1 - one.seconds / one.before
            print(f"{one.key:32} {one.seconds * 1e6:9.1f} us  {gain:6.1%} {one.tile}", flush=True)
            if gain > 0:
                found[one.key] = one.tile
        if found and not dry:
            print(f"saved in {tuned_tiles.store(name, found)}")
