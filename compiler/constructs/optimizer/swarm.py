"""A particle swarm: points that are drawn to the best that they and the others have found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from trainc.compiler.constructs.optimizer._vector import OfVector

if TYPE_CHECKING:
    import torch


class Swarm(OfVector):
    """Moves particles in each step, and puts the model at the best point that any has found; uses no gradient.

    A particle has a place x and a speed v. With p the best place that it has found, g the best of all before the step,
    and r and s uniform in 0..1 for each number, v <- inertia v + pull_own r (p - x) + pull_best s (g - x) and
    x <- x + v. At first the places are the model's weights plus `spread` times normal numbers, one of them the weights
    themselves, and speeds are 0. The defaults are those with which the swarm contracts. While no particle finds a
    better place the model stays where it is.

    A step evaluates the loss once for each particle, with its gradients, which are not read. It is for at most 10,000
    parameters, and for steps of the whole training data: a value that was found in one step is compared with those of
    later ones, but for the model's own, which is evaluated anew. Random numbers are those of `seed` and of the number
    of the step. As any optimizer that evaluates the loss several times in a step, it has to be the only optimizer, in
    `program.step`, without `clip`, a GradScaler, masks, and clauses that change gradients, updates or weights.
    """

    cite: ClassVar = (
        "Kennedy and Eberhart, Particle Swarm Optimization, ICNN 1995; the defaults: Clerc and Kennedy, IEEE"
        " Transactions on Evolutionary Computation 6 (2002) 58"
    )
    usage: ClassVar = "optimizer swarm { particles = 20 }"

    particles: int = Field(default=20, ge=2, description="number of particles")
    spread: float = Field(
        default=0.5, gt=0, description="standard deviation of the first places around the weights"
    )
    inertia: float = Field(default=0.7298, ge=0, lt=1, description="what is left of a speed")
    pull_own: float = Field(default=1.49618, ge=0, description="pull to the best place of its own")
    pull_best: float = Field(default=1.49618, ge=0, description="pull to the best place of all")
    seed: int = Field(default=0, ge=0, description="seed of its random numbers")

    @property
    def moments(self) -> float:
        """Return places, speeds and best places of all particles."""
        return 3 * self.particles

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        from trainc.runtime.vector_optimizer.particles import Particles

        groups = [{k: v for k, v in group.items() if k != "weight_decay"} for group in groups]
        pulls = self.pull_own, self.pull_best
        return Particles(groups, self.particles, self.spread, self.inertia, pulls, self.seed)

    def reference(
        self, place: float, speed: float, own: float, best: float, drawn: tuple[float, float]
    ) -> tuple[float, float]:
        """Return place and speed of one number of a particle after a step, by definition."""
        speed = self.inertia * speed + self.pull_own * drawn[0] * (own - place)
        speed += self.pull_best * drawn[1] * (best - place)
        return place + speed, speed
