"""The closed sets of words of the language.

What the grammar, the runtime and the compiler make of each is held to these lists by
tests/dsl/test_vocabulary.py.
"""

KINDS = (
    "model", "data", "loss", "run", "optimizer", "lr", "regularize", "perturb", "normalize",
    "noise_scale", "mask", "adapt", "observe", "distribute",
)  # fmt: skip
SELECTED = ("none", "modules", "parameters")
"""What `on` of a construct can select."""
PHASES = (
    "batch", "rates", "perturb", "forward", "backward", "undo", "reduce", "gradients", "optimizer",
    "deltas", "exchange", "observe",
)  # fmt: skip
"""The phases of a step, in order."""
RESOURCES = frozenset(
    ("batch", "clock", "rate", "params", "inputs", "views", "forward", "loss", "probe", "gradient",
     "optimizer_state", "delta", "metrics")
)  # fmt: skip
"""What the actions of a step read and write, besides `signal:<name>`."""

COUNTERS = ("steps", "samples", "tokens", "epochs", "seconds")
"""What the clock counts; durations are in these units or in percent of the run."""
TIMES = {"seconds": 1, "minutes": 60, "hours": 3600}
"""Units of time, in seconds: the clock counts these."""
UNITS = (*COUNTERS, *(unit for unit in TIMES if unit not in COUNTERS))
"""The units that durations are written in, beside percent of the run."""
PLACES = ("depth", "block", "blocks")
"""Where in the model a value is used."""
SIGNALS = ("loss", "gradient_norm", "batch", "lr", "step", "micro_batch", "eval_loss")
"""What every run measures."""
EVALUATED = "eval_"
"""What the names of what evaluations measure begin with."""
BUILT_IN = (*PLACES, "progress", *COUNTERS, *SIGNALS)
"""The names every expression may use."""
METRICS = ("data_loss", "gradient_norm", "lr_min", "lr_max", "skipped")
"""What steps report besides, which no expression may use and no clause may be called."""
ASSIGNABLE = ("batch",)
"""What a rule may set, besides scheduled fields of clauses."""
VERBS = {
    "stop": None, "save": None, "evaluate": None, "rollback": None, "warn": "text", "open": "clause", "close": "clause",
    "freeze": "selector", "unfreeze": "selector",
}  # fmt: skip
"""What else a rule may do, and what each is told."""

SHAPES = ("linear", "cosine", "sqrt")
STATES = ("nan", "inf", "finite")
BOOLEANS = ("false", "true")

SELECTOR_WORDS = ("all", "trainable", "matrices")
SELECTOR_FUNCTIONS = ("type", "ndim", "role", "depth")
ROLES = ("norm", "bias", "embedding", "attention", "mlp", "head", "adapter")
WHERE_NAMES = ("numel", "ndim", "depth", "block")
"""What a `where` condition may compare."""
