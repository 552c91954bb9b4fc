"""Particles that are drawn to the best points that they and all others have found."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from trainc.runtime.vector_optimizer.vector import Landscape, Vector, VectorOptimizer, keep, kept


class Particles(VectorOptimizer):
    """In each step every particle moves once; the model is at the best point that was found.

    Random numbers are those of the seed and the number of the step, so that nothing else draws from them.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        count: int,
        spread: float,
        inertia: float,
        pulls: tuple[float, float],
        seed: int,
        lr: float = 1.0,
    ) -> None:
        super().__init__(groups, lr)
        self._count, self._spread = count, spread
        self._inertia, self._pulls, self._seed = inertia, pulls, seed

    def iterate(self, at: Landscape, state: dict[str, Any]) -> Vector:
        moved, shape = int(state.get("moved", 0)), (self._count, len(at.start))
        drawn = np.random.default_rng((self._seed, moved))
        places, speeds, own = (kept(state, n, shape) for n in ("places", "speeds", "own"))
        values = kept(state, "values", (self._count,))
        if places is None or speeds is None or own is None or values is None:
            places = at.start + self._spread * drawn.standard_normal(shape)
            places[0] = at.start
            speeds, own = np.zeros(shape), places.copy()
            values = np.array([at.value(place) for place in places])
        best = int(values.argmin())
        own[best], values[best] = at.start, at.value(at.start)  # the model is at the best point
        best = int(values.argmin())
        to_own, to_best = self._pulls
        for i in range(self._count):
            weights = drawn.random((2, shape[1]))
            speeds[i] = self._inertia * speeds[i] + to_own * weights[0] * (own[i] - places[i])
            speeds[i] += to_best * weights[1] * (own[best] - places[i])
            places[i] += speeds[i]
            value = at.value(places[i])
            if value < values[i]:
                own[i], values[i] = places[i], value
        for name, array in (("places", places), ("speeds", speeds), ("own", own)):
            keep(state, name, array)
        keep(state, "values", values)
        state["moved"] = moved + 1
        found: Vector = own[int(values.argmin())]
        return found
