"""The model that a spec trains, named by import path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from trainc.dsl.reading.construct import Construct, ImportPath

if TYPE_CHECKING:
    from trainc.compiler.lower.lowering import Lowering


class Model(Construct):
    """Calls `module:callable` with the given arguments; it returns a torch.nn.Module.

    Imported only by plan, compile, run and verify; `trainc plan` calls it on the meta device. Where the model is
    passed (`trainc.compile(spec, model)`) the clause may be left out.
    """

    cite: ClassVar = "trainc"
    usage: ClassVar = 'model "examples.models:gpt" { layers = 4, width = 128 }'
    open_fields: ClassVar = True

    path: ImportPath = Field(description="what to import, as `module:callable`")
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of the callable"
    )

    def lower(self, to: Lowering) -> None:
        """Do nothing: the model is built before lowering."""
