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
    "ambiguous-clip": RuleExplanation(
        "Two optimizer clauses clip to the same norm, each the gradients of its own parameters.",
        "All gradients together can then have a larger norm, which is mostly not what was meant.",
        "Write `clip` in `run`, which clips the gradients of all optimizers together, or give the clauses different "
        "limits.",
    ),
    "claimed-twice": RuleExplanation(
        "Two clauses of one kind, or two entries of one field, act on the same parameter.",
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
    "statistic-sees-penalty": RuleExplanation(
        "A clause measures gradients of parameters on which a penalty acts.",
        "The result is then that of loss and penalty together, where mostly the loss alone is meant.",
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
    "processes": RuleExplanation(
        "`trainc run` cannot divide the run over the processes that a launcher such as torchrun started.",
        "The processes would wait for each other, or train other models than the spec says.",
        "Follow the message: it names the clause, or how many processes this machine takes.",
    ),
    "hardware": RuleExplanation(
        "This machine does not have the device that the run asks for, or cannot train in its precision.",
        "A run that fell back to another device or precision in silence would take longer, or give other numbers.",
        "Write `device = auto`, or one of the devices in the message; `--device` is used in place of the spec's field."
        " `precision = bf16` works on every device that a run trains on, and needs no scaled losses.",
    ),
    "missing-library": RuleExplanation(
        "A field names a library that is not installed, such as `log = wandb` of `run`.",
        "The run would go on without what was asked of it, or end when it is needed.",
        "Install the package that the message names in the environment in which trainc runs, or remove the field.",
    ),
    "out-of-memory": RuleExplanation(
        "A step ran out of memory: of the device, or of the machine or the container where it trains on the CPU.",
        "Of the step nothing is left. trainc then tries its passes with half of the samples, and half of these, until"
        " they fit, so that the message can name a number that does.",
        "Write that number as `micro` of `data`: the batch stays as it is, and so do the numbers of the run, to"
        " rounding. With `micro = auto` the step is repeated with it, and the run goes on.",
    ),
    "does-not-fit": RuleExplanation(
        "A run needs more memory or disk than there is: by its plan, or as its first step measured it.",
        "Memory is that of the GPU, or of the machine, the container and the process where it trains on the CPU. A run"
        " that is killed there, or whose checkpoints fill the disk, has cost its hours.",
        "The message says what the run needs, and what to write instead. `trainc run --no-preflight` starts it all the"
        " same.",
    ),
    "loss-mismatch": RuleExplanation(
        "The loss cannot be computed from what the model returns and the targets that the data gives.",
        "Each loss needs its own form of targets: class indices or probabilities of classes for `cross_entropy`, the"
        " output's shape for the others; and one output, which `output` chooses where the model returns several.",
        "Compare the shapes and dtypes in the message, and change the model, the data, or the loss.",
    ),
    "data-failed": RuleExplanation(
        "The data callable raised an error, or the object it returned lacks something that trainc needs.",
        "`trainc explain data` has what it may return: data sets, loaders, pairs and dicts of them, or splits.",
        "The message shows the error, or says what is missing.",
    ),
    "wrong-argument": RuleExplanation(
        "A callable does not take an argument that the spec or the command line gives.",
        "Fields of `model`, `data` and `torch` clauses are passed to the imported callable as keyword arguments.",
        "Compare the arguments with those in the help line.",
    ),
    "optimizer-failed": RuleExplanation(
        "An optimizer did something in its step that its clause cannot carry out.",
        "An optimizer that sets its own learning rate would undo a schedule. State that no checkpoint can hold would "
        "be lost when the run is resumed.",
        "The message says what the optimizer did, and what to write instead.",
    ),
    "clause-failed": RuleExplanation(
        "What a clause does in a step is not possible with this batch or model.",
        "Shapes and targets are known only when the clause sees a batch: a margin, for one, needs class indices.",
        "The message says what the clause found, and what to write instead.",
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
        "Remove the operation that mixes examples along the first axis, put BatchNorm in eval mode, or measure "
        "micro-batches.",
    ),
    "views-over-batch-norm": RuleExplanation(
        "Two passes of the same examples are compared through a BatchNorm layer in train mode.",
        "Each pass is then normalized with the statistics of both, so that it depends on the other one, and running "
        "averages are updated with both.",
        "Keep the BatchNorm layers in eval mode, take their statistics of parts of a batch by `normalize`, or replace "
        "them with GroupNorm.",
    ),
    "loss-not-a-mean": RuleExplanation(
        "The loss of a batch is not the weighted mean of the losses of its examples.",
        "A statistic of examples is of what each of them adds to a mean. A summed or a contrastive loss is not such a "
        "mean.",
        "Divide a summed loss by the number of examples or targets, or remove the clause that measures examples.",
    ),
    "wrong-target-kind": RuleExplanation(
        "A selector finds parameters where the construct acts on modules, or modules where it acts on parameters.",
        "The construct cannot act on what was found.",
        "Select modules with `type(...)` or a module's name, parameters with `ndim(...)` or a parameter's name.",
    ),
    "resume-impossible": RuleExplanation(
        "The run cannot be resumed with this spec.",
        "The change gives the saved state another meaning. The notes list every difference; "
        "those that begin with `impossible` are the reason.",
        "Start a new run, or use the spec that the run was started with.",
    ),
    "resume-needs-accept": RuleExplanation(
        "The spec or the data is not what the run's newest checkpoint was made with.",
        "The run can be resumed, but as a whole it then follows neither of the two specs. The notes list every "
        "difference: `safe` ones change no number of the training, and alone need no `--accept`.",
        "If this is what you want, repeat the command with `--accept`: the state that fits is kept, and a checkpoint "
        "of the new spec is saved at once.",
    ),
}
