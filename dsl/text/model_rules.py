"""The rules that `trainc plan`, `compile` and `run` apply to a spec and a model."""

from __future__ import annotations

from trainc.dsl.text.language_rules import RuleExplanation

MODEL_RULES: dict[str, RuleExplanation] = {
    "selector-matches-nothing": RuleExplanation(
        "A selector matches no module or parameter of the model.",
        "The clause would do nothing, and the run would look as if it worked.",
        "Correct the pattern: `*` stands for one part of a dotted name, `**` for any number of parts. Write "
        "`optional` if the clause may match nothing.",
    ),
    "selector-count": RuleExplanation(
        "A selector matches more or fewer modules or parameters than its `expect` says.",
        "`expect` makes a change of the model visible.",
        "Correct the selector or the number.",
    ),
    "unknown-class": RuleExplanation(
        "A name in `type(...)` is neither a class of the model nor a class of torch.nn.",
        "If other classes match, the layers of a misspelt class would be left out without a message.",
        "Write the name in the help line. In a spec for several models, select with `role(norm)` and the like, or "
        "make the clause `optional`.",
    ),
    "selector-matches-frozen": RuleExplanation(
        "A selector matches parameters that are not trained.",
        "The clause has no effect on a parameter that never changes.",
        "Intersect with `trainable`: `on mats & trainable`.",
    ),
    "claimed-twice": RuleExplanation(
        "Two clauses of one kind act on the same parameter.",
        "trainc does not guess which of the two is meant.",
        "Make the selections disjoint: `on all - norms`.",
    ),
    "unclaimed-parameters": RuleExplanation(
        "No optimizer acts on some trainable parameters.",
        "They would keep their initial values.",
        "Widen a selector, or freeze the parameters in the model.",
    ),
    "conflicting-effects": RuleExplanation(
        "Two clauses, or a clause and a rule, cannot act in the same step.",
        "One of them overwrites what the other one sets, in either order.",
        "Remove one of them.",
    ),
    "no-effect": RuleExplanation(
        "A clause has a value with which it does nothing, such as a weight of 0.",
        "It is left out of the program and costs nothing. Perhaps it was meant to act.",
        "Give the field another value, or remove the clause.",
    ),
    "noise-scale-sees-penalty": RuleExplanation(
        "A gradient noise scale is measured on parameters whose gradient also contains a penalty.",
        "The result is then the noise scale of loss and penalty together. The theory is about the loss alone.",
        "Leave the measured parameters out of the penalty's selector, or measure in steps without the penalty.",
    ),
    "import-failed": RuleExplanation(
        "A module or attribute named in the spec cannot be imported.",
        "Models and data are Python code. The message shows what the import raised.",
        'Correct the path `"module:attribute"`, or run from the directory that contains the module.',
    ),
    "model-failed": RuleExplanation(
        "The callable of the model raised an error, or did not return an `nn.Module`.",
        "Without a model a spec cannot be compiled.",
        "The message shows the error. The arguments of the callable are the fields of the `model` clause.",
    ),
    "data-failed": RuleExplanation(
        "The data callable raised an error, or the object it returned lacks something that trainc needs.",
        "`trainc explain data` describes the object: `train`, `evaluation` and `tokens_per_sample`.",
        "The message shows the error, or says what is missing.",
    ),
    "wrong-argument": RuleExplanation(
        "A callable does not take an argument that the spec or the command line gives.",
        "Fields of `model`, `data` and `torch` clauses are passed to the imported callable as keyword arguments.",
        "Compare the arguments with those in the help line.",
    ),
    "capture-failed": RuleExplanation(
        "The model could not be turned into a graph.",
        "`trainc compile` and `plan --diff` need the graph of a step. The message says where the capture stopped.",
        "Move Python code that depends on the data out of the forward pass. `trainc run` also runs models that cannot "
        "be captured.",
    ),
    "site-not-delivered": RuleExplanation(
        "A layer that should deliver a statistic did not deliver it in the first step.",
        "A missing number could be mistaken for zero.",
        "Check that the layer runs in the forward pass, and that nothing wraps or copies it.",
    ),
    "example-axis-unknown": RuleExplanation(
        "trainc cannot tell which axis of a tensor counts the examples.",
        "Per-example statistics need this axis. A wrong guess would give wrong numbers without an error.",
        "Put the examples on the first axis of the inputs.",
    ),
    "weight-used-elsewhere": RuleExplanation(
        "A measured weight is also used outside the layer that holds it.",
        "The other use adds to the gradient of the weight, so norms taken in the layer alone would be wrong.",
        "Exclude the layer from the selection. A head tied to an embedding can be measured if it is an nn.Linear "
        "whose `weight` is the embedding's, and both are selected.",
    ),
    "examples-mix": RuleExplanation(
        "The model's output for one example depends on the other examples of the batch.",
        "Such an example has no gradient of its own. Its statistics would be wrong without an error.",
        "Remove the operation that mixes examples along the first axis, or measure with `method = micro_batch`.",
    ),
    "loss-not-a-mean": RuleExplanation(
        "The loss of a batch is not the weighted mean of the losses of its examples.",
        "A noise scale compares what each example adds to a mean. A summed or a contrastive loss is not such a "
        "mean.",
        "Divide a summed loss by the number of examples or targets, or remove the noise scale.",
    ),
    "wrong-target-kind": RuleExplanation(
        "A selector finds parameters where the construct acts on modules, or modules where it acts on parameters.",
        "The construct cannot act on what was found.",
        "Select modules with `type(...)` or a module's name, parameters with `ndim(...)` or a parameter's name.",
    ),
    "resume-impossible": RuleExplanation(
        "The run cannot be resumed with this spec.",
        "The change gives the saved state another meaning.",
        "Start a new run, or use the spec that the run was started with.",
    ),
    "resume-needs-accept": RuleExplanation(
        "The spec is not the one that the run was started with.",
        "The run can be resumed, but as a whole it then follows neither of the two specs.",
        "If this is what you want, repeat the command with `--accept`.",
    ),
}
