"""Find weights that are also used outside their layer: a layer's norms, or what changes its weight, would miss that.

While a layer runs, other Parameters replace its own. A result that still depends on its own Parameters uses them
elsewhere: a weight passed to a function, or read by another module.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from trainc.compiler.errors import SiteError
from trainc.compiler.model.eager import eager_operations
from trainc.runtime.soundness.loss_graph import operations_of


class _Held(NamedTuple):
    """A Parameter, its name in the model, and the layer that holds it."""

    parameter: nn.Parameter
    name: str
    module: str
    layer: nn.Module


Owned = dict[int, _Held]
"""Parameters by identity."""

_FRAME = re.compile(r'File "(?P<file>.*)", line (?P<line>\d+), in .*\n\s*(?P<text>.*)')
_NOT_THE_USERS = (Path(torch.__file__).parent, Path(__file__).parents[1])


_MEASURED = "Per-example norms need a weight to be used by one layer only"


class WeightUsedElsewhere(SiteError):
    """A weight that is measured or changed is used outside its layer."""

    rule = "weight-used-elsewhere"


def run_checking_uses(
    run: Callable[[], Tensor],
    modules: Mapping[str, nn.Module],
    names: Collection[str] | None = None,
    reason: str = _MEASURED,
) -> Tensor:
    """Return `run()`, the logits or the loss, if only `modules` use the weights of `modules`, or those of `names`.

    Raises WeightUsedElsewhere otherwise. Gradients have to be enabled. Compiled and checkpointed parts run as they
    are written, so that nothing is hidden.
    """
    with _replaced(modules) as owned:
        result = run()
    if not _elsewhere(result, owned, names):
        return result
    # Again, with the line recorded that each operation comes from.
    with torch.autograd.set_detect_anomaly(True, check_nan=False), _replaced(modules) as owned:
        result = run()  # held until the error is made: its operations go with it
        raise _error(_elsewhere(result, owned, names), reason)


def check_single_uses(loss: Tensor, layers: Mapping[str, tuple[nn.Parameter, int]]) -> None:
    """Raise WeightUsedElsewhere where operations of a loss read a measured weight more often than its layers do.

    `layers` has by name each measured parameter, and how many measured layers share it. Parts under an activation
    checkpoint are not seen.
    """
    left = {id(parameter): number for parameter, number in layers.values()}
    names = {id(parameter): name for name, (parameter, _) in layers.items()}
    for node in operations_of(loss):
        for source, _ in node.next_functions:
            key = id(getattr(source, "variable", None))
            if key in left:
                left[key] -= 1
                if left[key] < 0:
                    raise WeightUsedElsewhere(
                        f"`{names[key]}` is used more than once in the forward pass: by a layer that runs twice, or"
                        " outside its layer. Per-example norms need a weight to be used by one layer only, once:"
                        " exclude that layer from `on`"
                    )


@contextmanager
def _replaced(modules: Mapping[str, nn.Module]) -> Iterator[Owned]:
    """Replace the Parameters of `modules` while these run; yields the modules' own Parameters."""
    owned: Owned = {}
    with ExitStack() as stack:
        stack.enter_context(eager_operations())
        for name, module in modules.items():
            stack.enter_context(_replaced_in(name, module, owned))
        yield owned


@contextmanager
def _replaced_in(name: str, module: nn.Module, owned: Owned) -> Iterator[None]:
    before, run = vars(module).get("forward"), module.forward
    path = f"{name}." if name else ""

    def own() -> dict[str, nn.Parameter]:
        found = {leaf: p for leaf, p in module._parameters.items() if p is not None}
        # Sharded layers hold other Parameters while they run, so this is asked then, too.
        owned.update({id(p): _Held(p, path + leaf, name, module) for leaf, p in found.items()})
        return found

    def forward(*inputs: Any, **named: Any) -> Any:
        mine = own()
        module._parameters.update(
            {leaf: nn.Parameter(p.detach(), p.requires_grad) for leaf, p in mine.items()}
        )
        try:
            return run(*inputs, **named)
        finally:
            module._parameters.update(mine)

    own()
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        if before is not None:
            vars(module)["forward"] = before


def _elsewhere(
    result: Tensor, owned: Owned, names: Collection[str] | None
) -> list[tuple[_Held, Node]]:
    """Return the Parameters of `owned` that a result depends on, each with the operation that reads it."""
    found = [
        (owned[id(variable)], node)
        for node in operations_of(result)
        for source, _ in node.next_functions
        if id(variable := getattr(source, "variable", None)) in owned
    ]
    return [(held, node) for held, node in found if names is None or held.name in names]


def _error(found: list[tuple[_Held, Node]], reason: str) -> WeightUsedElsewhere:
    held, node = found[0]
    others = {other.name for other, _ in found} - {held.name}
    more = f" (so are {len(others)} more such weights)" if others else ""
    message = (
        f"`{held.name}` is also used outside `{held.module}`, {_place(node)}{more}. {reason}: exclude `{held.module}`"
        " from `on`"
    )
    if isinstance(held.layer, nn.Embedding):
        message += (
            "; if that use is the output head, make the head an nn.Linear whose `weight` is this Parameter, and select"
            " both"
        )
    return WeightUsedElsewhere(message)


def _place(node: Node) -> str:
    """Return the user's line that called an operation: the innermost line outside torch."""
    recorded: Any = node.metadata
    for text in reversed(recorded.get("traceback_", [])):
        frame = _FRAME.search(text)
        if frame and not any(Path(frame["file"]).is_relative_to(p) for p in _NOT_THE_USERS):
            return f"at {frame['file']}:{frame['line']}, in `{frame['text'].strip()}`"
    return f"in an operation `{node.name()}`"
