"""Any optimizer with torch's interface, by import path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from trainc.compiler.kinds.optimizer import Optimizer
from trainc.dsl.construct import ImportPath

if TYPE_CHECKING:
    import torch


class Torch(Optimizer):
    """Builds `module:class` over the selected parameters; every other field is an argument of the class.

    Its update must act entry by entry if a mask is to bind to it; trainc cannot see inside.
    """

    cite: ClassVar = "trainc"
    example: ClassVar = 'optimizer torch("torch.optim:RMSprop") { lr = 1e-3, alpha = 0.95 }'
    open_fields: ClassVar = True
    moments: ClassVar = 2

    path: ImportPath = Field(description="what to import, as `module:class`")
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of the class"
    )

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        import torch

        from trainc.compiler.imports import ImportProblem, load

        built = load(self.path)
        if not (isinstance(built, type) and issubclass(built, torch.optim.Optimizer)):
            raise ImportProblem(
                "wrong-argument", f"`{self.path}` is not a torch.optim.Optimizer class"
            )
        plain = [{k: v for k, v in g.items() if k != "weight_decay" or v} for g in groups]
        try:
            return built(plain, lr=1.0, **self.arguments)  # type: ignore[call-arg]
        except TypeError as error:
            raise ImportProblem(
                "wrong-argument", f"`{self.path}` does not take these arguments: {error}"
            ) from error

    def reference(self) -> None:
        """Return nothing: the class named is its own definition."""
