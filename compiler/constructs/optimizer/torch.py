"""Any optimizer with torch's interface, by import path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from trainc.compiler.constructs.optimizer._base import Optimizer
from trainc.dsl.reading.construct import ImportPath

if TYPE_CHECKING:
    import torch


class Torch(Optimizer):
    """Builds the optimizer `module:class` over the selected parameters; other fields are arguments of the class.

    With a `mask`, its update must treat every entry by itself, which trainc cannot check. A clause that changes
    updates is given the difference of the weights here, which is rounded as they are.
    """

    cite: ClassVar = "trainc"
    usage: ClassVar = 'optimizer torch("torch.optim:RMSprop") { lr = 1e-3, alpha = 0.95 }'
    open_fields: ClassVar = True
    moments: ClassVar = 2

    path: ImportPath = Field(description="what to import, as `module:class`")
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of the class"
    )

    def examine(self) -> None:
        """Raise ImportProblem when there is no such optimizer class, or it does not take these arguments."""
        import inspect

        import torch

        from trainc.compiler.model.import_path import ImportProblem, import_attribute

        found = import_attribute(self.path)
        if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
            message = f"`{self.path}` is not a torch.optim.Optimizer class"
            raise ImportProblem("wrong-argument", message)
        try:
            inspect.signature(found).bind([], lr=1.0, **self.arguments)
        except TypeError as error:
            message = f"`{self.path}` does not take these arguments: {error}"
            raise ImportProblem("wrong-argument", message) from error
        try:
            inspect.signature(found.step).bind(None)
        except TypeError as error:
            message = (
                f"`{self.path}` needs arguments in `step`, as a closure that computes the loss anew, and a step of"
                " trainc calls it without: choose an optimizer that steps from the gradients alone"
            )
            raise ImportProblem("wrong-argument", message) from error

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        from trainc.compiler.model.import_path import import_attribute

        plain = [{k: v for k, v in g.items() if k != "weight_decay" or v} for g in groups]
        built: torch.optim.Optimizer = import_attribute(self.path)(plain, lr=1.0, **self.arguments)
        return built

    def reference(self) -> None:
        """Return nothing: the named class is its own definition."""
