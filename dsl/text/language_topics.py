"""The words of the language that are neither constructs nor rules, as `trainc explain` describes them."""

from __future__ import annotations

from trainc.dsl.text.record import Record


class Topic(Record):
    """A word of the language: how it is written, what it means, and the group it belongs to."""

    form: str
    meaning: str
    example: str = ""


STATEMENTS = {
    "train": Topic("train 1", "The version of the language, as the first statement of a file."),
    "let": Topic(
        "let NAME = VALUE",
        "Gives a value a name, which stands for it in the whole file. `--set NAME=VALUE` replaces it.",
        "let width = 48",
    ),
    "use": Topic(
        'use "FILE.train"',
        "Includes another file. Its path is relative to the file that includes it.",
        'use "base.train"',
    ),
    "when": Topic(
        "when CONDITION [for DURATION] [cooldown DURATION] { ACTION, ... }",
        "A rule: acts when its condition is true, or has been true `for` a duration. With a `cooldown` it then rests."
        " `trainc explain actions` lists what it can do, besides `batch = NUMBER` and `CLAUSE.FIELD = NUMBER`.",
        "when loss is nan { stop }",
    ),
}
PARTS = {
    "as": Topic("KIND NAME as LABEL", "What rules, logs and checkpoints call the clause."),
    "on": Topic(
        "KIND NAME on SELECTOR",
        "What the clause acts on. In a field, `NUMBER on SELECTOR` is a number for these parameters.",
        "let decay = 0.1 on ndim(2)",
    ),
    "from": Topic(
        "KIND NAME from DURATION",
        "Before this time since the start of the run the clause does not act.",
    ),
    "until": Topic("KIND NAME until DURATION", "At this time and later the clause does not act."),
    "every": Topic("KIND NAME every DURATION", "The clause acts once in this time."),
    "optional": Topic("KIND NAME on SELECTOR optional", "The selector may match nothing."),
    "for": Topic(
        "when CONDITION for DURATION { ... }", "How long a condition must have been true."
    ),
    "cooldown": Topic(
        "when CONDITION cooldown DURATION { ... }", "How long a rule rests after it acted."
    ),
    "then": Topic(
        "SCHEDULE then SCHEDULE",
        "One schedule after another: the second begins where the first ends.",
        "let rate = 1e-3 * (warmup(5%) then cosine())",
    ),
    "where": Topic(
        "SELECTOR where CONDITION",
        "The members of a selection for which a condition on `numel`, `ndim`, `depth` or `block` is true.",
    ),
    "expect": Topic(
        "SELECTOR expect NUMBER", "An error unless the selection has this many members."
    ),
    "is": Topic(
        "NUMBER is nan",
        "Whether a number is `nan`, `inf` or `finite`.",
        "when loss is nan { stop }",
    ),
}
ACTIONS = {
    "stop": Topic("when CONDITION { stop }", "Ends the run.", "when loss > 10 { stop }"),
    "save": Topic("when CONDITION { save }", "Writes a checkpoint.", "when loss < 1 { save }"),
    "evaluate": Topic(
        "when CONDITION { evaluate }", "Evaluates after the step.", "when loss < 1 { evaluate }"
    ),
    "rollback": Topic(
        "when CONDITION { rollback }",
        "Goes on from the last checkpoint before this step, with other samples than those that followed it.",
        "run { length = 9 steps, checkpoint = 3 steps }\nwhen loss > 9 { rollback }",
    ),
    "warn": Topic(
        'when CONDITION { warn "TEXT" }',
        "Says the text in the log.",
        'when loss > 10 { warn "high" }',
    ),
    "open": Topic(
        "when CONDITION { open CLAUSE }",
        "Lets a clause act from now on, whatever its `from` and `until` say.",
    ),
    "close": Topic(
        "when CONDITION { close CLAUSE }",
        "Ends what a clause does, as its `until` would.",
    ),
    "freeze": Topic(
        "when CONDITION { freeze SELECTOR }",
        "Keeps parameters as they are from now on.",
        'when steps < 1 { freeze "blocks.**" }',
    ),
    "unfreeze": Topic(
        "when CONDITION { unfreeze SELECTOR }",
        "Lets parameters train again that a rule froze.",
        'when loss < 1 { freeze "blocks.**" }\nwhen loss < 0.5 { unfreeze "blocks.**" }',
    ),
}
SCHEDULES = {
    "warmup": Topic("warmup(over, from = 0)", "Rises on a line from `from` to 1."),
    "constant": Topic("constant(value = 1, over)", "Stays at `value`."),
    "cosine": Topic(
        "cosine(to = 0, over, from = 1)", "Falls from `from` to `to` on half a cosine."
    ),
    "linear": Topic("linear(to = 0, over, from = 1)", "Goes from `from` to `to` on a line."),
    "cubic": Topic(
        "cubic(to = 0, over, from = 1)",
        "Goes from `from` to `to`, fast at first: (1 - t / over)^3 of the way is left.",
    ),
    "exponential": Topic(
        "exponential(to, over, from = 1)", "Falls by equal factors, down to `to`."
    ),
    "inverse_sqrt": Topic("inverse_sqrt(over)", "Falls as sqrt(over / (over + t))."),
    "step": Topic(
        "step(at = [50%, 75%], factor = 0.1)",
        "Multiplies by `factor` at each point, counted from the start of the run.",
    ),
    "wsd": Topic(
        "wsd(warmup = 5%, decay = 20%, to = 0, shape = linear)",
        "Rises over `warmup`, stays at 1, and falls to `to` over the last `decay` of the run. Shapes are `linear`,"
        " `cosine` and `sqrt`.",
    ),
}
FUNCTIONS = {
    "min": Topic("min(a, b, ...)", "The smallest of the numbers."),
    "max": Topic("max(a, b, ...)", "The largest of the numbers."),
    "sqrt": Topic("sqrt(x)", "The square root; NaN below 0."),
    "log": Topic("log(x)", "The natural logarithm; NaN below 0."),
    "exp": Topic("exp(x)", "The exponential function."),
    "abs": Topic("abs(x)", "The number without its sign."),
    "best": Topic(
        "best(x)",
        "The lowest value of a number so far, in a rule. Of what should be high, write `best(-x)`.",
        "run { length = 9 steps, eval = 1 steps }\nwhen eval_loss > 1.2 * best(eval_loss) { stop }",
    ),
    "since_best": Topic(
        "since_best(x)",
        "How many steps ago a number had its lowest value so far, in a rule.",
        "run { length = 9 steps, eval = 1 steps }\nwhen since_best(eval_loss) > 4 steps { stop }",
    ),
    "mean": Topic(
        "mean(x, 100 steps)",
        "The mean of a number over the steps of a window that ends now, in a rule; unknown before it is full.",
        "when loss > 2 * mean(loss, 100 steps) { save }",
    ),
}
SELECTORS = {
    "type": Topic("type(CLASS, ...)", "Modules of these classes, and the parameters they own."),
    "ndim": Topic("ndim(NUMBER)", "Parameters with this many axes."),
    "role": Topic(
        "role(ROLE)", "What plays a role in the model; `trainc explain roles` lists them."
    ),
    "depth": Topic(
        "depth(0..0.5)", "What lies in this part of the model: 0 is the input, 1 the head."
    ),
    "all": Topic("all", "Everything."),
    "trainable": Topic("trainable", "What requires a gradient."),
    "matrices": Topic(
        "matrices",
        "Weights of linear layers, convolutions, embeddings and experts, also where one tensor holds several. Norms, "
        "biases, tokens and positions are none.",
        "let decay = 0.1 on ndim(2)",
    ),
}
ROLES = {
    "norm": Topic("role(norm)", "Normalization layers of any class, and their parameters."),
    "bias": Topic("role(bias)", "Biases, also those of all experts in one tensor."),
    "embedding": Topic(
        "role(embedding)",
        "Tables of tokens and positions, and tokens that are parameters themselves.",
    ),
    "attention": Topic("role(attention)", "Attention layers, and what is in them."),
    "mlp": Topic(
        "role(mlp)", "Feed-forward layers and experts: the linear layers beside attention."
    ),
    "head": Topic(
        "role(head)", "What gives the model's output: linear layers behind the last block."
    ),
    "adapter": Topic(
        "role(adapter)",
        "Of modules the layers with an adapter, of `adapt` or of peft; of parameters those of the adapters.",
    ),
}
UNITS = {
    "steps": Topic("200 steps", "Updates of the weights."),
    "samples": Topic("32 samples", "Examples that the model trained on."),
    "tokens": Topic("1.5G tokens", "Samples times the tokens that the data says a sample has."),
    "epochs": Topic("3 epochs", "Passes over the training data."),
    "seconds": Topic("3600 seconds", "Time spent training."),
    "minutes": Topic("10 minutes", "Time spent training, 60 seconds each."),
    "hours": Topic("2 hours", "Time spent training, 3600 seconds each."),
    "%": Topic("5%", "A part of the run; where a plain number belongs, a hundredth."),
}
NAMES = {
    "progress": Topic("progress", "The part of the run that is over, from 0 to 1."),
    "loss": Topic("loss", "The loss of the step before."),
    "eval_loss": Topic("eval_loss", "The loss that the last evaluation measured."),
    "gradient_norm": Topic(
        "gradient_norm",
        "The L2 norm of the whole model's gradient in the step before, before clipping.",
    ),
    "batch": Topic("batch", "The samples of a step."),
    "micro_batch": Topic("micro_batch", "The samples of one forward and backward pass."),
    "lr": Topic("lr", "The learning rate, without the factors of `lr` clauses."),
    "block": Topic("block", "The number of a layer's block, counted from 0."),
    "blocks": Topic("blocks", "How many blocks the model has."),
}
GROUPS = {
    "statements": STATEMENTS, "parts": PARTS, "actions": ACTIONS, "schedules": SCHEDULES,
    "functions": FUNCTIONS, "selectors": SELECTORS, "roles": ROLES, "units": UNITS, "names": NAMES,
}  # fmt: skip
"""The words by group; one word may be in several."""


def topic_page(group: str, word: str) -> str:
    """Return the page of one word of the language."""
    about = GROUPS[group][word]
    singular = group.removesuffix("s")
    lines = [f"# {word} ({singular})", about.meaning, f"```train\n{about.form}\n```"]
    if about.example:
        lines.append(f"For example:\n\n```train\n{about.example}\n```")
    return "\n\n".join(lines) + "\n"


def group_page(group: str) -> str:
    """Return a line for each word of a group."""
    return "".join(f"{word}: {about.meaning}\n" for word, about in GROUPS[group].items())
