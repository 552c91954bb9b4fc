"""Stochastic depth: residual branches that are left out, example by example."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainc.compiler.method.layer_hook import LayerContext, LayerHook
from trainc.dsl.reading.construct import Construct, Effect, Probability, Problem

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering


class DropPath(Construct):
    """Leaves out selected residual branches, each with probability `p` for each example: x + m F(x) / (1 - p).

    Select the modules whose output is added to the residual stream: attention and feedforward modules,
    or the last norm of a branch. The mask m is 0 with probability `p` and otherwise 1, drawn for each
    step, branch and example; the mean of m / (1 - p) is 1, and evaluation has all branches. The published
    schedule is 0 in the first block and linear up to p_L in the last: `p_L * block / (blocks - 2)`,
    since `blocks` counts the head as one. Where a regularizer lets the views of an example share dropout
    masks, they share m. A branch that the model drops by itself, as by timm's `drop_path_rate`, is
    dropped twice.
    """

    cite: ClassVar = (
        "Huang et al., Deep Networks with Stochastic Depth, ECCV 2016, arXiv:1603.09382; one mask an example: "
        "Larsson et al., FractalNet, ICLR 2017, arXiv:1605.07648"
    )
    usage: ClassVar = 'regularize drop_path on "blocks.*.attn" | "blocks.*.mlp" { p = 0.1 * block / (blocks - 2) }'
    targets: ClassVar = "modules"
    identity: ClassVar = {"p": "0"}
    effects: ClassVar = (
        Effect("forward", "leave out residual branches", ("inputs", "clock"), ("forward",)),
    )

    p: Probability = Field(
        description="probability that a branch is left out; may use `depth`, `block` and `blocks`"
    )

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report the model itself, and branches inside of others, which would be left out twice."""
        names = {module.name for module in bound.modules}
        for module in bound.modules:
            outer = next((n for n in _around(module.name) if n in names), None)
            if module.name == "":
                yield Problem(
                    "wrong-target-kind",
                    "the model itself is selected, and its output is added to nothing",
                    help='select residual branches, such as `"blocks.*.attn" | "blocks.*.mlp"`',
                )
            elif outer:
                yield Problem(
                    "wrong-target-kind",
                    f"`{module.name}` is part of `{outer}`, which is selected as well",
                    help=f"select the branch as a whole: exclude `{module.name}` from `on`",
                )
                return

    def lower(self, to: Lowering) -> None:
        """Let every branch be dropped with the probability of its place."""
        for module in to.modules():
            to.layer(module.name, Drop(), {"p": to.schedule(self.p, module.place)})

    @staticmethod
    def reference(branch: Tensor, kept: Tensor, p: float) -> Tensor:
        """Return what is left of a branch's output (B, ...), of examples that keep it or not (B,)."""
        return branch * kept.to(branch.dtype).view(-1, *[1] * (branch.dim() - 1)) / (1 - p)


def _around(name: str) -> Iterable[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


@dataclass(frozen=True)
class Drop(LayerHook):
    """Multiplies each example's output by a mask of mean 1; `p` is its scalar."""

    zero_is_identity: ClassVar = True
    of_branch: ClassVar = "stochastic depth may leave out all of the output"

    def change_output(self, y: Tensor, at: LayerContext) -> Tensor:
        """Return the output of the examples that keep it, divided by `1 - p`, and zeros for the others."""
        from trainc.kernels.noise.uniforms import uniform

        at.check_examples(y, "Stochastic depth")
        p = at.scalars["p"]
        kept = at.draw(uniform, y.flatten(1)[:, :1]) >= p
        z = y * (kept / (1 - p)).view(-1, *[1] * (y.dim() - 1))
        return z if z.dtype == y.dtype else z.to(y.dtype)
