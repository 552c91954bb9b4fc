"""The rules that `trainc check` applies to a text, and how a rule is explained."""

from __future__ import annotations

from trainc.dsl.text.record import Record


class RuleExplanation(Record):
    """A rule, for `trainc explain` and docs/diagnostics.md: what happened, why it matters, what to write instead."""

    what: str
    why: str
    fix: str


LANGUAGE_RULES: dict[str, RuleExplanation] = {
    "never-acts": RuleExplanation(
        "A line cannot act in this run: its time is after the end, or no value meets its condition.",
        "The run would look as if the line worked.",
        "Change the time or the number, or the `length` of `run`, or remove the line.",
    ),
    "syntax": RuleExplanation(
        "The text does not follow the grammar of the language at this place.",
        "A statement that cannot be read cannot be checked. The statements around it are still checked.",
        "Write at the caret what the message expects. Fields are separated by `,`.",
    ),
    "unknown-unit": RuleExplanation(
        "The word behind a number is no unit.",
        "A duration in another unit would be another run.",
        "Write one of the units in the note, in the singular or the plural.",
    ),
    "too-large": RuleExplanation(
        "A text, or the value of a `let`, is larger than the limit.",
        "The limits keep a damaged file from using all time and memory. No spec written by hand reaches them.",
        "Check that the file is a spec. Split long lists into several `let`s.",
    ),
    "too-deep": RuleExplanation(
        "Brackets, operators or included files are nested deeper than the limit, or a chain of operators is longer.",
        "The limits keep a damaged file from exhausting the memory. No spec written by hand reaches them.",
        "Give inner parts a name with `let`.",
    ),
    "not-text": RuleExplanation(
        "The file is not UTF-8 text.",
        "A spec must mean the same on every machine.",
        "Save the file as UTF-8.",
    ),
    "unknown-version": RuleExplanation(
        "`train N` names a version of the language that this trainc does not read.",
        "In another version the same text could mean something else.",
        "Write `train 1`, or install a trainc that reads this version.",
    ),
    "misplaced-version": RuleExplanation(
        "`train N` is not the first statement of its file.",
        "The version says how the rest of the file is read.",
        "Move `train N` to the first line.",
    ),
    "unknown-kind": RuleExplanation(
        "A statement begins with a word that is neither a kind of clause nor `let`, `use`, `when` or `train`.",
        "The kinds are fixed. A kind says what a construct is for, and so when it acts in a step.",
        "Write one of the kinds in the note.",
    ),
    "unknown-construct": RuleExplanation(
        "The kind has no construct of this name.",
        "Constructs come with trainc or with installed packages. A clause without a construct would do nothing.",
        "Write one of the names in the note, or install the package that provides the construct.",
    ),
    "unexpected-path": RuleExplanation(
        "An import path is given to a construct that imports nothing.",
        "The path would have no effect.",
        'Remove the path. Constructs that take one are written like `optimizer torch("torch.optim:RMSprop")`.',
    ),
    "unknown-field": RuleExplanation(
        "The construct has no field of this name.",
        "If a misspelt field were ignored, the run would use another method than the one meant.",
        "Write the name in the help line. `trainc explain CONSTRUCT` lists all fields.",
    ),
    "missing-field": RuleExplanation(
        "A field that the construct needs is not given.",
        "The field has no default, because no value is right for everyone.",
        "Add the field between the braces of the clause: `{ sigma = 0.5 }`.",
    ),
    "duplicate-field": RuleExplanation(
        "A field is given twice in one clause.",
        "One of the two values would be ignored.",
        "Keep one of them.",
    ),
    "duplicate-part": RuleExplanation(
        "`as`, `on`, `from`, `until`, `every` or `optional` is given twice in one clause.",
        "One of the two would be ignored.",
        'Keep one of them. Join selectors with `|`: `on ndim(2) | "head.*"`.',
    ),
    "bad-value": RuleExplanation(
        "A value is not allowed at this place.",
        "Each field has a type and a range. Other values have no meaning.",
        "Write a value as the label says. `trainc explain CONSTRUCT` shows the types of the fields.",
    ),
    "wrong-unit": RuleExplanation(
        "A value has the wrong unit, or no unit.",
        "`200` could mean steps, samples or tokens, and the wrong choice is easy to miss.",
        "Write a unit: `200 steps`, `3 epochs`, `1.5G tokens`, `5%`. Numbers such as learning rates have no unit.",
    ),
    "unknown-name": RuleExplanation(
        "An expression uses a name that is not defined.",
        "Expressions may use `let`s, signals, labels of clauses, the counters of the clock, and `depth`, `block` "
        "and `blocks`.",
        "Write the name in the help line, or define it: `let width = 192`. Write names of modules and parameters "
        "in quotes.",
    ),
    "unknown-function": RuleExplanation(
        "There is no function of this name.",
        "The functions for schedules, selectors and arithmetic are fixed: docs/language.md lists them.",
        "Write the name in the help line.",
    ),
    "unknown-signal": RuleExplanation(
        "The clause does not measure this signal.",
        "A condition on a signal that is never measured is never true.",
        "Use one of the signals in the note. `trainc explain CONSTRUCT` lists them.",
    ),
    "reserved-name": RuleExplanation(
        "A `let` or a label has a name that is not allowed: the language uses it already, or it contains a dot.",
        "One word would mean two things in an expression.",
        "Choose another name.",
    ),
    "duplicate-let": RuleExplanation(
        "Two `let`s define the same name.",
        "The value would depend on the order of the files.",
        "Remove one of them. To change a value from the command line use `--set name=value`.",
    ),
    "duplicate-label": RuleExplanation(
        "Two clauses have the same name: the same `as`, or the same construct and no `as`.",
        "Conditions, logs and checkpoints refer to a clause by its name.",
        "Name one of them, `as early`, and write `early` in conditions.",
    ),
    "duplicate-clause": RuleExplanation(
        "A kind that may be used once is used twice.",
        "A run has one model, one data source and one length.",
        "Remove one of the clauses. One of them may be in an included file.",
    ),
    "let-cycle": RuleExplanation(
        "The definition of a `let` uses its own name, directly or through other `let`s.",
        "Such a definition gives no value.",
        "Change one of the two places shown.",
    ),
    "unknown-let": RuleExplanation(
        "`--set` names a `let` that the spec does not define.",
        "The setting would have no effect.",
        "Write the name in the help line, or add `let name = value` to the spec.",
    ),
    "unused-let": RuleExplanation(
        "A `let` of this file is never used.",
        "It has no effect. Often the place that should use it has a misspelt name or a plain number.",
        "Use the `let`, or remove it.",
    ),
    "use-not-found": RuleExplanation(
        "A file named by `use` cannot be read.",
        "Paths are relative to the file that contains the `use`, not to the working directory.",
        "Correct the path.",
    ),
    "use-outside": RuleExplanation(
        "A file named by `use` is not in the folder of the spec, nor in a folder below.",
        "A spec from elsewhere could otherwise read any file, parts of which would be in messages.",
        "Move the file below the spec, or set TRAINC_USE_PATH to the folders that `use` may read from, with `:` "
        "between them.",
    ),
    "include-cycle": RuleExplanation(
        "A file includes itself, directly or through other files.",
        "Reading it would never end.",
        "Move what both files need into a third file.",
    ),
    "missing-clause": RuleExplanation(
        "The spec lacks a clause that this command needs.",
        "A spec for a training loop of your own needs no `model`, `data` or `run`. `trainc run` needs all three.",
        "Add the clause in the help line.",
    ),
    "missing-on": RuleExplanation(
        "The clause does not say which modules or parameters it acts on.",
        "No default is safe for this construct.",
        'Add `on` and a selector: `on "blocks.*.mlp.**"`, `on type(Linear)`, `on all`.',
    ),
    "unexpected-on": RuleExplanation(
        "The clause has `on`, but its construct does not act on modules or parameters.",
        "The selection would have no effect.",
        "Remove `on` and the selector.",
    ),
    "unknown-action": RuleExplanation(
        "A rule contains an action that does not exist.",
        'The actions are `batch = ...`, `stop`, `save` and `warn "text"`.',
        "Write one of these.",
    ),
    "unknown-target": RuleExplanation(
        "A rule sets something that rules cannot set.",
        "Rules set `batch`, and the fields of clauses that are schedules. All others are fixed for the whole run.",
        "Write `batch` on the left of `=`, or the clause's name, a dot and the field: `adamw.lr = adamw.lr / 2`.",
    ),
    "no-action": RuleExplanation(
        "A `when` rule has no actions.",
        "It would do nothing, whatever its condition.",
        "Write an action between the braces, or remove the rule.",
    ),
}
