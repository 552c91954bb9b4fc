"""Check a site: examples along the first axis, and a measured weight that is used once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from trainc.compiler.errors import SiteUnfit
from trainc.compiler.graph.forward_graph import ForwardGraph
from trainc.compiler.graph.sizes import same_size


def starts_with_examples(
    forward: ForwardGraph, size: int, size_with_one_more: int | None = None
) -> bool:
    """Say whether an axis holds every view of every example.

    `size_with_one_more` is its size in a batch with one more example, which tells it from another
    axis that happens to be as long.
    """
    grown = forward.rows + forward.views
    return same_size(size, forward.rows) and size_with_one_more in (None, grown)


def not_example_axis(forward: ForwardGraph, module: str, tensor: str) -> SiteUnfit:
    """Return the error about a tensor, such as `input [3, 8]`, that does not start with the examples."""
    views = f" in {forward.views} views" if forward.views > 1 else ""
    return SiteUnfit(
        module,
        f"the first axis of its {tensor} does not count the {forward.examples} examples{views}. "
        "Exclude the layer from `on`",
    )


def sizes_with_one_more(
    forward: ForwardGraph, sizes: Callable[[ForwardGraph], Mapping[str, int]]
) -> Mapping[str, int]:
    """Return the `sizes` of the graph of a batch with one more example; empty, and noted, when that fails."""
    if forward.recapture_with_one_more_example is None:
        return {}
    try:
        return sizes(forward.recapture_with_one_more_example())
    except Exception as error:
        forward.notes.append(
            f"the model could not be captured with one more example ({type(error).__name__}): "
            "the first axis of each measured layer's input is taken for the example axis"
        )
        return {}


def check_weight_uses(
    forward: ForwardGraph, module: str, weight: str | None, calls: int, allowed: int = 1
) -> None:
    """Raise SiteUnfit when a layer has more than `allowed` calls, or its weight more readers."""
    uses = calls if weight is None else max(calls, forward.weight_uses(weight))
    if uses > allowed:
        raise SiteUnfit(
            module,
            f"the weight is used {uses} times in one forward pass, but per-example norms need a weight that is used "
            "once. Exclude the layer from `on`",
        )
