"""What replicas that train apart do in a step, and what their turns measure."""

from __future__ import annotations

from trainc.dsl.reading.construct import Effect, Signal

SIGNALS: dict[str, Signal | str] = {
    "bytes": "bytes that this process sent in the last turn",
    "replicas": "replicas in the last turn, 0 where it failed",
    "distance": Signal(
        "L2 distance of the weights before the last turn from the mean of all, or from the leader that draws them"
        " (with `groups` that of the group): the mean over replicas without leaders",
        ends=("distance_low", "distance_high"),
        title="distance",
    ),
    "distance_low": "the smallest of these distances",
    "distance_high": "the largest of them",
    "loss": "loss of the step of the last turn: the mean over replicas",
    "loss_low": "the lowest of these losses",
    "loss_high": "the highest of them",
    "change": "L2 distance of the mean of all from the weights that were agreed on, which `outer` takes as a gradient",
    "step": Signal("L2 norm of the step of the agreed weights by `outer`", title="step"),
    "leader": Signal("rank of the leader of all", title="leader"),
    "score": "score of the leader of all",
}
OF_RULE = {"change": "outer", "step": "outer", "leader": "leader", "score": "leader"}
"""The rule by which a signal is measured, of those that no other rule has."""
WEIGHTS = Effect(
    "exchange",
    "exchange the weights between replicas",
    ("params", "clock"),
    ("params", "metrics", *(f"signal:{name}" for name in SIGNALS)),
)
STATE = Effect(
    "exchange",
    "average the optimizer's state over replicas",
    ("optimizer_state",),
    ("optimizer_state",),
)
START = Effect("reduce", "keep the weights that replicas start from", ("params",), lasting=True)
NEAR = Effect(
    "deltas",
    "draw the weights to stored leaders",
    ("params", "clock"),
    ("params",),
    lasting=True,
)
