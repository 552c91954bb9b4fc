"""Iterations of classical methods of minimization, with the line searches of scipy."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from trainc.compiler.constructs.optimizer._vector import OfVector
from trainc.compiler.model.import_path import ImportProblem

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Scipy(OfVector):
    """Makes one iteration of Powell's method, of conjugate gradients or of BFGS in each step.

    It is for at most 10,000 parameters, and best for steps of the whole training data: an iteration goes to the
    minimum of its step's loss on a line, whatever the other samples say. Numbers are in float64, and rounded to the
    weights' dtype.

    - `Powell` uses no gradient. It searches along each of n directions in turn, at first the axes, and then along the
      way that all of these went: about 10 n evaluations a step. That way may take the place of a direction, which is
      as in `scipy.optimize.minimize`. The directions are n times n numbers.
    - `CG` goes along conjugate gradients of Polak and Ribiere, or along -g where these do not descend. From the point
      that a search finds it goes on to the bottom of a parabola: on a quadratic n steps are enough.
    - `BFGS` keeps an estimate of the inverse Hessian, n times n numbers.

    At 10,000 parameters n times n numbers take 800 MB, in memory and in checkpoints, and twice that during a step.

    The last two go along a line until both Wolfe conditions hold, and stay where they are if no such point is found.
    Their curvature is that of the gradients of two steps: between different batches it is noise. Each evaluation costs
    the passes of a step, its gradients included; how many there were is the metric `<label>.evaluations`. As any
    optimizer that evaluates the loss several times in a step, it has to be the only optimizer, in `program.step`,
    without `clip`, a GradScaler, masks, and clauses that change gradients, updates or weights.
    """

    cite: ClassVar = (
        "Powell, The Computer Journal 7 (1964) 155; Nocedal and Wright, Numerical Optimization, 2006, chapters 3, 5"
        " and 6"
    )
    usage: ClassVar = 'optimizer scipy { method = "BFGS" }'

    method: Literal["Powell", "CG", "BFGS"] = Field(description="whose iterations")

    @property
    def moments(self) -> float:
        """Return the vectors that are kept beside directions and inverse Hessian."""
        return 1 if self.method == "Powell" else 3

    @property
    def matrices(self) -> int:
        """Return how many matrices are kept: directions, or the inverse Hessian."""
        return 0 if self.method == "CG" else 1

    def examine(self) -> None:
        """Raise ImportProblem where scipy is not installed."""
        if find_spec("scipy") is None:
            raise ImportProblem(
                "missing-library",
                "`optimizer scipy` needs scipy, which is not installed",
                help="install it: pip install trainc[scipy]",
                field="head",
            )

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        from trainc.runtime.vector_optimizer.line_searches import LineSearches

        return LineSearches(_without_decay(groups), self.method)

    def reference(self, matrix: Tensor, x: Tensor) -> Tensor:
        """Return the minimum of (x - c) A (x - c) / 2 along -gradient from x, for the matrix A and c = 0.

        On a line that is where the first iteration of CG and of BFGS ends with an exact search.
        """
        gradient = matrix @ x
        return x - (gradient @ gradient) / (gradient @ matrix @ gradient) * gradient


def _without_decay(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in group.items() if k != "weight_decay"} for group in groups]
