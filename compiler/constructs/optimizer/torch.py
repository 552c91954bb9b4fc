"""Any optimizer with torch's interface, by import path."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from trainc.compiler.constructs.optimizer._base import Optimizer
from trainc.compiler.errors import FieldError
from trainc.compiler.model.import_path import ImportProblem, import_attribute
from trainc.dsl.reading.construct import ImportPath
from trainc.dsl.values.value_json import Number, expressions_in

if TYPE_CHECKING:
    import torch

    from trainc.compiler.lower.lowering import Lowering


_PROBE = 16
"""Rows and columns of the matrix whose state is looked at."""


class Torch(Optimizer):
    """Builds the optimizer `module:class` over the selected parameters; other fields are arguments of the class.

    A class whose `step` needs a closure, such as `torch.optim:LBFGS`, is called with one that returns the loss of the
    whole step (all micro-batches and replicas, all terms) at the weights of now and leaves its gradients. Each call
    after the first costs the passes of a step, with the same dropout and noise; BatchNorm takes its running statistics
    from the first. How many there were is the metric `<label>.evaluations`. It has to be the only optimizer, in
    `program.step`, without `clip`, a GradScaler, masks, and clauses that change gradients, updates or weights.

    Whatever its `state_dict` holds is saved under the names of parameters, bit for bit: entries of any shape and
    nesting, and what it changes in its parameter groups, such as a distance that it estimates. State of a type that no
    checkpoint can hold is an error after the first step of `trainc run`.

    A class with `train()` and `eval()`, such as a schedule-free one, is in training mode in steps, and so is what
    checkpoints have of it. Evaluation, `program.save` and `run { start }` have the weights of `eval()`; the trained
    ones come back bit for bit, so that evaluating changes no training. In a loop of your own:
    `with program.evaluation_weights():`. Running statistics of BatchNorm are those of the trained weights.

    A class that sets the `lr` of its groups itself may do so where `lr` is a constant, from which it begins; with a
    schedule, or clauses that scale rates, it is an error. What it multiplies the rate by inside its step, as a warm-up
    of its own, comes on top of `lr`. Without `weight_decay` the default of the class holds.

    With a `mask`, its update must treat every entry by itself, which trainc cannot check. A clause that changes
    updates is given the difference of the weights here, which is rounded as they are.
    """

    cite: ClassVar = "trainc"
    usage: ClassVar = 'optimizer torch("torch.optim:RMSprop") { lr = 1e-3, alpha = 0.95 }'
    open_fields: ClassVar = True

    path: ImportPath = Field(description="what to import, as `module:class`")
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of the class"
    )

    def examine(self) -> None:
        """Raise ImportProblem when there is no such optimizer class, or it does not take these arguments."""
        found = self._imported()
        try:
            inspect.signature(found).bind([], lr=1.0, **self.arguments)
        except TypeError as error:
            message = f"`{self.path}` does not take these arguments: {error}"
            raise ImportProblem("wrong-argument", message) from error
        if self.arguments.get("differentiable"):
            raise ImportProblem(
                "wrong-argument",
                f"`differentiable = true` of `{self.path}` is for updates of tensors that are no parameters, through"
                " which a gradient passes: remove it",
            )
        decays = any(x != Number(0) for x in expressions_in(self.weight_decay))
        if decays and _default(found, "weight_decay") is None:
            message = f"`{self.path}` has no weight decay: remove `weight_decay`"
            raise ImportProblem("wrong-argument", message)
        if self.asks:
            try:
                inspect.signature(found.step).bind(None, None)
            except TypeError as error:
                message = f"`step` of `{self.path}` cannot be called with a closure alone: {error}"
                raise ImportProblem("wrong-argument", message) from error

    def _imported(self) -> Any:
        """Return the class; raises ImportProblem where it is none of an optimizer."""
        import torch

        found = import_attribute(self.path)
        if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
            message = f"`{self.path}` is not a torch.optim.Optimizer class"
            raise ImportProblem("wrong-argument", message)
        return found

    def _known(self) -> Any:
        """Return the class, or None where there is none: `examine` says what is wrong."""
        try:
            return self._imported()
        except ImportProblem:
            return None

    @property
    def asks(self) -> bool:
        """Whether `step` of the class needs an argument, the closure; False where there is no such class."""
        found = self._known()
        try:
            inspect.signature(found.step if found else len).bind(None)
        except TypeError:
            return True
        except ValueError:  # no signature is known
            return False
        return False

    @property
    def has_modes(self) -> bool:
        """Whether the class has `train()` and `eval()`; False where there is no such class."""
        found = self._known()
        return all(callable(getattr(found, name, None)) for name in ("train", "eval"))

    @property
    def own_decay(self) -> float:
        """The weight decay that the class has by itself."""
        found = self._known()
        default = None if found is None else _default(found, "weight_decay")
        return float(default) if isinstance(default, int | float) else 0.0

    @property
    def own_betas(self) -> tuple[float, ...]:
        """The betas of a class that is Adam, NAdam or RAdam of torch."""
        import torch

        found = self._known()
        kinds = (torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam)
        if found is None or not issubclass(found, kinds):
            return ()
        return tuple(map(float, self.arguments.get("betas") or _default(found, "betas") or ()))

    @property
    def moments(self) -> float:
        """Return what a step of a small matrix leaves, as a multiple of its size; 2 where none can be made."""
        import torch

        probe = torch.nn.Parameter(torch.zeros(_PROBE, _PROBE))
        probe.grad = torch.ones_like(probe)
        try:
            optimizer = self.make([{"params": [probe], "weight_decay": 0.0}])
            optimizer.step()
        # A class may raise anything: it may ask for a closure, or take sparse gradients alone.
        except Exception:
            return 2
        kept = optimizer.state.get(probe, {}).values()
        sizes = (one.numel() for one in kept if isinstance(one, torch.Tensor) and one.dim())
        return sum(sizes) / probe.numel()

    @property
    def moments_known(self) -> bool:
        """Return whether the class is of torch, whose state grows with the parameter."""
        return f"{self.path.module}.".startswith("torch.optim.")

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Build the optimizer; it begins at the rate of the spec where that is one number, as some classes keep it."""
        found = self._imported()
        if _default(found, "weight_decay") is None:
            groups = [{k: v for k, v in g.items() if k != "weight_decay"} for g in groups]
        rate = float(self.lr.value) if isinstance(self.lr, Number) else 1.0
        built: torch.optim.Optimizer = found(groups, lr=rate, **self.arguments)
        return built

    def lower(self, to: Lowering) -> None:
        """Claim the parameters; raises FieldError for one with a dense gradient where the class takes sparse ones."""
        import torch

        found = self._known()
        if found is not None and issubclass(found, torch.optim.SparseAdam):
            names = to.clause.targets
            dense = next((name for name in names if not to.has_sparse_gradient(name)), None)
            if dense is not None:
                raise FieldError(
                    "on",
                    f"`{self.path}` takes sparse gradients alone, and the gradient of `{dense}` is dense: select the"
                    " weights of `nn.Embedding` and `nn.EmbeddingBag` that were built with `sparse=True`, and train the"
                    " others by an `optimizer` clause of their own",
                )
        super().lower(to)

    def reference(self) -> None:
        """Return nothing: the named class is its own definition."""


def _default(optimizer: type, argument: str) -> Any:
    """Return the default of a keyword argument, 0 where it has none; None where the class does not take it."""
    known = inspect.signature(optimizer).parameters.values()
    named = next((one for one in known if one.name == argument), None)
    if named is None:
        return 0.0 if any(one.kind is one.VAR_KEYWORD for one in known) else None
    return 0.0 if named.default in (named.empty, None) else named.default
