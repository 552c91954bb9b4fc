"""What a plan says of CUDA graphs: what they replay of a step, and what keeps them from it."""

from __future__ import annotations

from collections.abc import Iterator

from trainc.compiler.bind.binding import Binding
from trainc.compiler.bind.report import labels
from trainc.compiler.method.lowered_method import LoweredMethod
from trainc.dsl.text.diagnostic import Diagnostic

_WHOLE = "; gradients of which masks keep a part leave the pass whole"


def replayed_text(method: LoweredMethod) -> str:
    """Return what CUDA graphs replay of the method where the model is on CUDA, or why nothing."""
    if (reason := method.rewrite.modules_only) is not None:
        return f"replay no pass: {reason}"
    masks = _WHOLE if any(mask.separate for mask in method.masks.values()) else ""
    return (
        "replay the passes of the step graph on CUDA (forward, loss, backward and statistics; actions and optimizer"
        f" run as usual){masks}"
    )


def replay_warnings(binding: Binding, method: LoweredMethod) -> Iterator[Diagnostic]:
    """Yield a warning, at the field that asks for them, where CUDA graphs can replay no pass of the method."""
    run = binding.one("run")
    if run is None or not method.replayed or (reason := method.rewrite.modules_only) is None:
        return
    message = f"`graphs` has no effect, since they replay step graphs and none runs: {reason}"
    at = labels((run.part_span("graphs"), ""))
    yield Diagnostic("no-effect", message, at, severity="warning")
