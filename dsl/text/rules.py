"""Every rule a diagnostic can name, with what it means, why it is a rule, and what to write.

`trainc explain RULE` and docs/diagnostics.md are made from this table; a diagnostic whose rule is
not in it is an assertion failure. Names describe the offence, never the cure.
"""

from __future__ import annotations

from trainc.dsl.text.record import Record


class RuleExplanation(Record):
    """A rule: what happened, why it matters, and how it is mended."""

    what: str
    why: str
    fix: str


RULES: dict[str, RuleExplanation] = {
    # Found in the text, by `trainc check`.
    "syntax": RuleExplanation(
        "The text does not have the shape of a spec.",
        "Nothing can be said about a statement that cannot be read; the statements around it "
        "are still checked.",
        "Put at the caret what the message says is expected; fields are separated by `,`.",
    ),
    "too-large": RuleExplanation(
        "A text, or what a `let` stands for, is larger than any spec.",
        "A spec is written by people. Bounds keep a damaged file from using up time and memory.",
        "Look whether the file is really a spec; split long lists into several `let`s.",
    ),
    "too-deep": RuleExplanation(
        "Brackets, operators or includes are nested too deep.",
        "What reads a spec follows its nesting, and nobody writes a hundred levels by hand.",
        "Give inner parts a name with `let`.",
    ),
    "not-text": RuleExplanation(
        "The file is not UTF-8 text.",
        "A spec must mean the same on every machine.",
        "Save the file as UTF-8.",
    ),
    "unknown-version": RuleExplanation(
        "`train N` names a version of the language that this trainc does not read.",
        "A spec of another version could mean something else.",
        "Write `train 1`, or install a trainc that reads this version.",
    ),
    "misplaced-version": RuleExplanation(
        "`train N` is not the first statement of its file.",
        "The version says how everything after it is read.",
        "Move it to the first line.",
    ),
    "unknown-kind": RuleExplanation(
        "A statement begins with a word that is neither a kind nor `let`, `use`, `when` or "
        "`train`.",
        "The kinds are a closed set: they say where in a step a construct acts.",
        "Write one of the kinds in the note, as in `regularize pace`.",
    ),
    "unknown-construct": RuleExplanation(
        "A kind has no construct of this name.",
        "Constructs are files of the compiler, or come with installed packages; a misspelt "
        "one would do nothing.",
        "Write one of the names in the note, or install the package that brings the construct.",
    ),
    "unexpected-path": RuleExplanation(
        "A construct that imports nothing is given an import path.",
        "The path would have no effect.",
        "Leave the path out. Constructs that take one are written `optimizer "
        'torch("torch.optim:RMSprop")`.',
    ),
    "unknown-field": RuleExplanation(
        "A construct has no field of this name.",
        "A misspelt field that is ignored in silence is the most common way to run a method "
        "that is not the one meant.",
        "Write the name in the help line; `trainc explain CONSTRUCT` lists all fields.",
    ),
    "missing-field": RuleExplanation(
        "A construct needs a field that the clause does not give.",
        "The field has no default, since no value of it is right for everyone.",
        "Add the field between the clause's braces: `{ sigma = 0.5 }`.",
    ),
    "duplicate-field": RuleExplanation(
        "A field is given twice in one clause.",
        "One of the two values would be ignored.",
        "Keep one.",
    ),
    "duplicate-part": RuleExplanation(
        "`as`, `on`, `from`, `until`, `every` or `optional` is given twice in one clause.",
        "One of the two would be ignored.",
        'Keep one. Selectors are joined with `|`: `on ndim(2) | "head.*"`.',
    ),
    "bad-value": RuleExplanation(
        "A value is not one that can stand here.",
        "Fields have types and ranges; a value outside them has no meaning.",
        "Write a value as the label says; `trainc explain CONSTRUCT` shows the types of fields.",
    ),
    "wrong-unit": RuleExplanation(
        "A value has the wrong unit, or none.",
        "`200` could be steps, samples or tokens; a factor of a thousand goes unnoticed.",
        "Write a unit: `200 steps`, `3 epochs`, `1.5G tokens`, `5%`. Plain numbers have none.",
    ),
    "unknown-name": RuleExplanation(
        "An expression uses a name that nothing defines.",
        "Names are `let`s, signals, labels of clauses, counters of the clock, and `depth`, "
        "`block`, `blocks`.",
        "Write the name in the help line, or define it: `let width = 192`. Names of the model"
        " stand in quotes.",
    ),
    "unknown-function": RuleExplanation(
        "There is no function of this name.",
        "The functions of schedules, selectors and arithmetic are a closed set: "
        "docs/language.md lists them.",
        "Write the name in the help line.",
    ),
    "unknown-signal": RuleExplanation(
        "A clause does not measure this.",
        "A condition on something never measured would never come true.",
        "Use one of the signals in the note; `trainc explain CONSTRUCT` lists them.",
    ),
    "reserved-name": RuleExplanation(
        "A `let` or a label takes a name that cannot be one: it means something already, or "
        "has a dot.",
        "The same word would mean two things in one expression.",
        "Choose another name.",
    ),
    "duplicate-let": RuleExplanation(
        "A name is defined twice by `let`.",
        "The order of files would decide which one holds.",
        "Remove one. To vary a value from outside use `--set name=value`.",
    ),
    "duplicate-label": RuleExplanation(
        "Two clauses have the same name: the same `as`, or the same construct without one.",
        "The name is what conditions, logs and checkpoints call the clause.",
        "Name one of them: `noise_scale gns as early on ...`, and use `early`.",
    ),
    "duplicate-clause": RuleExplanation(
        "A kind that may come once is there twice.",
        "A run has one model, one data source, one loss and one length.",
        "Remove one of the clauses; look into included files too.",
    ),
    "let-cycle": RuleExplanation(
        "A `let` is defined by itself, directly or through others.",
        "It has no value.",
        "Break the circle at one of the two places shown.",
    ),
    "unknown-let": RuleExplanation(
        "`--set` names a `let` that the spec does not have.",
        "The setting would have no effect.",
        "Write the name in the help line, or add `let name = value` to the spec.",
    ),
    "unused-let": RuleExplanation(
        "Nothing uses a `let` of this file.",
        "It has no effect; often the place where it was to be used has a misspelt name or a "
        "plain number.",
        "Use it or remove it.",
    ),
    "use-not-found": RuleExplanation(
        "A file named by `use` cannot be read.",
        "Paths are relative to the file that contains the `use`, not to the working directory.",
        "Correct the path.",
    ),
    "include-cycle": RuleExplanation(
        "A file includes itself, directly or through others.",
        "There would be no end to it.",
        "Move what both files need into a third.",
    ),
    "missing-clause": RuleExplanation(
        "A spec lacks a clause that this command needs.",
        "For somebody's own loop `model`, `data` and `run` may be left out; training needs them.",
        "Add the clause in the help line.",
    ),
    "missing-on": RuleExplanation(
        "A clause does not say what it acts on.",
        "Which parameters or modules a method touches is the heart of it; there is no safe "
        "default here.",
        'Add `on` and a selector: `on "blocks.*.mlp.**"`, `on type(Linear)`, `on all`.',
    ),
    "unexpected-on": RuleExplanation(
        "A clause selects parts of the model although its construct acts on none.",
        "The selection would have no effect.",
        "Remove `on` and the selector.",
    ),
    "unknown-action": RuleExplanation(
        "A rule contains an action that does not exist.",
        'Rules assign (`batch = 2 * batch`), `stop`, `save`, or `warn "text"`.',
        "Write one of these.",
    ),
    "unknown-target": RuleExplanation(
        "A rule assigns to something that cannot be set.",
        "Rules set `batch`; rates and fields of clauses follow schedules.",
        "Write `batch` on the left of `=`, or a schedule where the field is.",
    ),
    "no-action": RuleExplanation(
        "A `when` rule has no actions.",
        "Whatever its condition, nothing would happen.",
        "Write an action between the braces, or remove the rule.",
    ),
    # Found against a model, by `trainc plan`, `compile` and `run`.
    "selector-matches-nothing": RuleExplanation(
        "A selector matches no module or parameter of the model.",
        "The clause would do nothing, and training would look as if it worked.",
        "Correct the pattern: `*` is one segment of a name, `**` any number. Write `optional`"
        " if matching nothing is fine.",
    ),
    "selector-count": RuleExplanation(
        "A selector with `expect` matches another number of things.",
        "`expect` is there to notice that a model has changed.",
        "Look at the list in the note; correct the selector or the number.",
    ),
    "unknown-class": RuleExplanation(
        "A name in `type(...)` is a class neither of the model nor of torch.nn.",
        "Beside classes that do match, a misspelt one would leave its layers out in silence.",
        "Write the name in the help line. A spec for several models selects by `role(norm)` and the like, or has the"
        " clause `optional`.",
    ),
    "selector-matches-frozen": RuleExplanation(
        "A selector matches parameters that are not trained.",
        "A policy for a parameter that never changes has no effect.",
        "Intersect with `trainable`: `on mats & trainable`.",
    ),
    "claimed-twice": RuleExplanation(
        "Two clauses of one kind claim the same parameter.",
        "Both would act on it, or one in silence would not; which is not to be guessed.",
        "Make the selections disjoint: `on all - norms`.",
    ),
    "unclaimed-parameters": RuleExplanation(
        "Trainable parameters are claimed by no optimizer.",
        "They would stay as they were initialised.",
        "Widen a selector, or freeze them on purpose.",
    ),
    "conflicting-effects": RuleExplanation(
        "Two constructs cannot act in one step as they are written.",
        "One undoes or overwrites what the other relies on, and no order of the two mends it.",
        "Remove one of them, or separate them in time with `from` and `until`.",
    ),
    "no-effect": RuleExplanation(
        "A clause has a value that makes it do nothing, such as a weight of 0.",
        "It is left out of the program, so that it costs nothing; perhaps it was meant to act.",
        "Give the field another value, or remove the clause.",
    ),
    "norm-mixes-examples": RuleExplanation(
        "Per-example statistics are asked of a layer that mixes examples, such as BatchNorm.",
        "In such a layer no gradient belongs to one example, so the number would be meaningless.",
        "Select layers that treat examples apart: LayerNorm, RMSNorm, GroupNorm.",
    ),
    "pair-over-batch-norm": RuleExplanation(
        "Two passes are compared through a layer whose statistics depend on the batch.",
        "The passes also differ by the batch statistics, and running averages are updated twice.",
        "Freeze the BatchNorm layers, or replace them by GroupNorm.",
    ),
    "noise-scale-sees-penalty": RuleExplanation(
        "A gradient noise scale is measured while a loss term other than the loss is active.",
        "The scale is then that of the sum, not of the loss that theory speaks of.",
        "Accept it, or measure in steps without the penalty.",
    ),
    "import-failed": RuleExplanation(
        "A module or attribute named in the spec cannot be imported.",
        "Models and data come from Python; what they raise while importing is in the note.",
        'Correct the path `"module:attribute"`, or run from the directory that contains the '
        "module.",
    ),
    "model-failed": RuleExplanation(
        "The model's callable raised, or did not return an `nn.Module`.",
        "Without a model nothing can be bound.",
        "See the note for what it said; the arguments are the fields of the `model` clause.",
    ),
    "data-failed": RuleExplanation(
        "The data callable raised, or what it returned does not follow the data contract.",
        "The contract is in docs/architecture.md: `train`, `evaluation`, `tokens_per_sample`.",
        "See the note for what is missing.",
    ),
    "wrong-argument": RuleExplanation(
        "A callable does not take an argument that the spec gives, or takes it otherwise.",
        "Fields of `model`, `data` and `torch` clauses are keyword arguments of what they import.",
        "Compare the fields with the signature in the note.",
    ),
    "capture-failed": RuleExplanation(
        "The model could not be turned into a graph.",
        "Passes work on a graph of the whole step. The note says where capture stopped.",
        "Move data-dependent Python out of the forward pass, or let the fallback named in the"
        " note run it.",
    ),
    "site-not-delivered": RuleExplanation(
        "A place in the model that should deliver a statistic did not at the first step.",
        "A number that never arrives would be read as zero.",
        "See whether the module runs at all in the forward pass, and whether something wraps "
        "or copies it.",
    ),
    "example-axis-unknown": RuleExplanation(
        "It is not known which axis of a tensor counts the examples.",
        "Per-example statistics need it, and guessing gives numbers that are wrong in silence.",
        "Put examples on the first axis of the inputs.",
    ),
    "weight-serves-elsewhere": RuleExplanation(
        "A measured weight takes part in the forward pass outside the layer that holds it.",
        "What it does there adds to its gradient, and the squared norm of a sum is not the sum of squared norms.",
        "Leave the layer out of the selection. A head tied to an embedding is measured where it is an nn.Linear whose"
        " `weight` is the embedding's, and both are selected.",
    ),
    "examples-mix": RuleExplanation(
        "What the model gives for an example depends on the other examples in the batch.",
        "Such an example has no gradient of its own, and what is taken for one is wrong in silence.",
        "Take out what looks across the first axis, or measure by `method = micro_batch`.",
    ),
    "loss-not-a-mean": RuleExplanation(
        "The loss of several examples is not the weighted mean of their own losses.",
        "Noise scales compare examples' shares of a mean; under a sum or a contrastive loss the shares are others.",
        "Divide a summed loss by the number of examples or targets, or leave the noise scale out.",
    ),
    "nothing-to-measure": RuleExplanation(
        "A clause selects something that has nothing for it to measure.",
        "A statistic of it would be missing from every report, or be read as zero.",
        "Leave it out of the selection, or give it what the label says it lacks.",
    ),
    "wrong-target-kind": RuleExplanation(
        "A selector finds parameters where a construct acts on modules, or the other way round.",
        "The construct cannot act on what was found.",
        "Select by `type(...)` or a module's name for modules, by `ndim(...)` or a "
        "parameter's name for parameters.",
    ),
    "resume-impossible": RuleExplanation(
        "A checkpoint cannot be continued under this spec.",
        "The change alters what the saved state means.",
        "Start a new run, or go back to the spec of the checkpoint.",
    ),
    "resume-needs-accept": RuleExplanation(
        "Continuing a checkpoint under this spec changes the method.",
        "It is possible and may be meant, but the result is no longer that of either spec.",
        "Repeat the command with `--accept RULE` for the difference in the note.",
    ),
}
