"""The one place from which Triton kernels are launched, with the compiler options that decide bits."""

from collections.abc import Sequence
from typing import Any

# Every option of the compiler that changes results and whose default is not the same in all versions of Triton:
# from 3.10 on a product and a sum are no longer one rounded operation unless a launch asks for it.
PINNED = {"enable_fp_fusion": True}


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, **options: Any) -> None:
    """Run a `triton.jit` kernel over a grid of programs, compiled with `PINNED`; the interpreter ignores those.

    `options` are the kernel's constexprs and the launch's own, `num_warps` and `num_stages` among them.
    """
    kernel[tuple(grid)](*arguments, **options, **PINNED)


def compiled(kernel: Any, *arguments: Any, **options: Any) -> Any:
    """The compiled kernel that `launch` would run with these arguments, loaded on the current device, not run.

    Its `n_regs`, `n_spills` and `metadata.shared` say what a program takes.
    """
    found = kernel.warmup(*arguments, grid=(1,), **options, **PINNED)
    found.run  # noqa: B018  (reading it loads the binary, in every version from 3.6 on)
    return found
