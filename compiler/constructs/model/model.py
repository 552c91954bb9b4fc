"""The model that a spec trains, named by import path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from trainc.dsl.reading.construct import Construct, ImportPath

if TYPE_CHECKING:
    from trainc.compiler.lower.lowering import Lowering


class Model(Construct):
    """Calls `module:callable` with the given arguments; it returns a torch.nn.Module.

    With `init` it starts with the weights of a file, as `trainc learn-init` writes them, or of what another run
    evaluated with; a run says where they come from. What a warm start does to the rest of the training is not its own:
    rates and schedules are those of the spec. Of two, `init` is for what a model is, `start` of `run` for a run that
    goes on from another; both together are an error.

    A run that is resumed takes the weights of its checkpoint, and does not read the file again. Where a model is passed
    to `trainc.compile`, path, arguments and `init` are not used; the plan warns of the last.

    Imported only by plan, compile, run and verify; `trainc plan` calls it on the meta device. Where the model is
    passed (`trainc.compile(spec, model)`) the clause may be left out.
    """

    cite: ClassVar = "trainc"
    usage: ClassVar = 'model "examples.models:gpt" { layers = 4, width = 128 }'
    open_fields: ClassVar = True

    path: ImportPath = Field(description="what to import, as `module:callable`")
    init: str | None = Field(
        default=None,
        description=".safetensors file, or folder of a run, with the initial weights. Default: those of the callable",
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of the callable"
    )

    def lower(self, to: Lowering) -> None:
        """Do nothing: the model is built before lowering."""
