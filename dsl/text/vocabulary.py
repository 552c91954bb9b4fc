"""The closed sets of the language: kinds, phases of a step, resources of a step."""

KINDS = (
    "model", "data", "loss", "run", "optimizer", "lr", "regularize", "perturb", "normalize",
    "noise_scale", "mask", "adapt", "observe", "distribute",
)  # fmt: skip
PHASES = (
    "batch", "rates", "perturb", "forward", "backward", "undo", "reduce", "gradients", "optimizer",
    "deltas", "exchange", "observe",
)  # fmt: skip
RESOURCES = frozenset(
    ("batch", "clock", "rate", "params", "inputs", "views", "forward", "loss", "probe", "gradient",
     "optimizer_state", "delta", "metrics")
)  # fmt: skip
