"""Methods that go from line to line: Powell's, conjugate gradients and BFGS, with scipy's searches along a line."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np

from trainc.runtime.vector_optimizer.vector import Landscape, Vector, VectorOptimizer, keep, kept

Method = Literal["Powell", "CG", "BFGS"]
TOLERANCE = 1e-2
"""To which fraction of a step the minimum on a line is found, without gradients."""
BLOCK = 1_000_000
"""How many numbers of an inverse Hessian are updated at a time."""
DECREASE = 1e-4
"""The constant of the first Wolfe condition."""
EXACT = 1e-3
"""What is left of the slope along a line, as a fraction of that at its beginning, where its minimum is found."""
CURVATURE = {"CG": 0.4, "BFGS": 0.9}
"""The constant of the second Wolfe condition."""


class LineSearches(VectorOptimizer):
    """One iteration of a method in each step."""

    def __init__(self, groups: Iterable[dict[str, Any]], method: Method, lr: float = 1.0) -> None:
        super().__init__(groups, lr)
        self._method = method

    def iterate(self, at: Landscape, state: dict[str, Any]) -> Vector:
        if self._method == "Powell":
            return powell(at, state)
        return _descend(at, state, self._method)


def powell(at: Landscape, state: dict[str, Any]) -> Vector:
    """Search along each direction in turn, then along the way that all of them went together.

    That way takes the place of the direction that gave most, where this keeps the directions independent.
    """
    x, n = at.start.copy(), len(at.start)
    directions = kept(state, "directions", (n, n))
    before = kept(state, "before", (n,))
    directions = np.eye(n) if directions is None else directions
    before = x.copy() if before is None else before
    value = first = at.value(x)
    most, largest = 0, 0.0
    for i in range(n):
        x, lower = _along(at, x, directions[i], value)
        if value - lower > largest:
            most, largest = i, value - lower
        value = lower
    way, before = x - before, x.copy()
    beyond = at.value(x + way)
    if first > beyond:
        gain = 2 * (first + beyond - 2 * value) * (first - value - largest) ** 2
        if gain < largest * (first - beyond) ** 2:
            end, _ = _along(at, x, way, value)
            if np.any(end != x):
                directions[most] = directions[-1]
                directions[-1] = end - x
            x = end
    keep(state, "directions", directions)
    keep(state, "before", before)
    return x


def _along(at: Landscape, x: Vector, direction: Vector, value: float) -> tuple[Vector, float]:
    """Return the minimum on a line through a point with this loss, and the loss there."""
    from scipy.optimize import minimize_scalar

    if not np.any(direction):
        return x, value
    found = minimize_scalar(
        lambda size: at.value(x + size * direction), method="brent", options={"xtol": TOLERANCE}
    )
    size, lower = float(found.x), float(found.fun)
    return (x + size * direction, lower) if np.isfinite(size) and lower <= value else (x, value)


def _descend(at: Landscape, state: dict[str, Any], method: Method) -> Vector:
    """Go along a direction of descent as far as both Wolfe conditions hold; along -gradient where they cannot hold."""
    x, n = at.start, len(at.start)
    value, gradient = at.value(x), at.gradient(x).copy()
    last_x, last_gradient = kept(state, "x", (n,)), kept(state, "gradient", (n,))
    last_value = state.get("value")
    if (
        last_value == value
    ):  # nothing moved, as at a rate of 0: the change says nothing on how far to go
        last_value = None
    direction = -gradient
    if last_x is not None and last_gradient is not None:
        direct = _of_inverse if method == "BFGS" else _conjugate
        direction = direct(state, x - last_x, last_gradient, gradient)
    elif method == "BFGS":
        keep(state, "inverse", np.eye(n))
    size = _wolfe(at, direction, gradient, value, last_value, CURVATURE[method])
    if size is not None and method == "CG":
        size = _at_the_bottom(at, direction, gradient, value, size)
    if size is None and not np.array_equal(direction, -gradient):
        direction = -gradient
        if method == "BFGS":
            keep(state, "inverse", np.eye(n))
        size = _wolfe(at, direction, gradient, value, None, CURVATURE[method])
    keep(state, "x", x)
    keep(state, "gradient", gradient)
    keep(state, "direction", direction)
    state["value"] = value
    return x if size is None else x + size * direction


def _conjugate(state: dict[str, Any], moved: Vector, last: Vector, now: Vector) -> Vector:
    """Return the direction of Polak and Ribiere, at least 0 of the last one; -gradient where it is no descent."""
    before = kept(state, "direction", now.shape)
    square = float(last @ last)
    if before is None or not square:
        return -now
    found: Vector = -now + max(0.0, float(now @ (now - last)) / square) * before
    return found if float(found @ now) < 0 else -now


def _of_inverse(state: dict[str, Any], moved: Vector, last: Vector, now: Vector) -> Vector:
    """Return -H g, after the update of the inverse Hessian H by the last step."""
    n = len(now)
    inverse, changed = kept(state, "inverse", (n, n)), now - last
    inverse = np.eye(n) if inverse is None else inverse
    curvature = float(moved @ changed)
    if curvature > 1e-12 * float(np.linalg.norm(moved) * np.linalg.norm(changed)):
        applied = inverse @ changed
        scale = (1 + float(changed @ applied) / curvature) / curvature
        for some in np.array_split(np.arange(n), -(-n * n // BLOCK)):  # beside n times n numbers
            inverse[some] += scale * np.outer(moved[some], moved)
            both = np.outer(applied[some], moved) + np.outer(moved[some], applied)
            inverse[some] -= both / curvature
    keep(state, "inverse", inverse)
    direction: Vector = -(inverse @ now)
    return direction if float(direction @ now) < 0 else -now


def _wolfe(
    at: Landscape,
    direction: Vector,
    gradient: Vector,
    value: float,
    before: float | None,
    curvature: float,
) -> float | None:
    """Return how far to go along a direction; None where no size was found that lowers the loss."""
    from scipy.optimize import line_search

    if not np.any(direction):
        return None
    before = value + float(np.linalg.norm(gradient)) / 2 if before is None else before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        size = line_search(
            at.value, at.gradient, at.start, direction, gradient, value, before, c2=curvature
        )[0]
    return None if size is None else float(size)


def _at_the_bottom(
    at: Landscape, direction: Vector, gradient: Vector, value: float, size: float
) -> float:
    """Return where a parabola with the slopes at both ends has its minimum, where both Wolfe conditions hold there too.

    Directions are conjugate as far as searches along them are exact: on a quadratic this one is, and n steps end it.
    """
    end = at.start + size * direction
    lower = at.value(end)
    first, last = float(gradient @ direction), float(at.gradient(end) @ direction)
    if abs(last) <= EXACT * abs(first) or not first < last:
        return size
    found = size * first / (first - last)
    there = at.start + found * direction
    if at.value(there) > min(lower, value + DECREASE * found * first):
        return size
    return found if abs(float(at.gradient(there) @ direction)) <= abs(last) else size
