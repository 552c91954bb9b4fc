"""A residual sum and its norm become one operator, bit for bit."""

import pytest
import torch
from torch import Tensor, nn

from tests.compiler.passes.step_cases import (
    check_against_eager,
    gpt,
    norm_sites,
    one_by_one,
    step_of,
    tokens,
    vectors,
)
from trainc.compiler.graph.step_graph import StepGraph
from trainc.compiler.method.sites import Rewrite
from trainc.compiler.passes.fuse_norms import FuseNorms
from trainc.compiler.passes.fuse_residual_adds import FuseResidualAdds
from trainc.compiler.passes.instrument_norms import InstrumentNorms


def summed(step: StepGraph) -> list[str]:
    """The fused operators of a sum and a norm in a graph, without their backward."""
    names = [str(node.target) for node in step.graph.nodes]
    return [n for n in names if "trainc.add_" in n and "backward" not in n]


@pytest.mark.parametrize("probed", [False, True])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_residual_sums_fuse_with_their_norms_bit_for_bit(
    norm: str, probed: bool, dtype: torch.dtype
) -> None:
    model, batch = gpt(norm).to(dtype), tokens()
    rewrite = Rewrite(norms=norm_sites(model))
    rest = (InstrumentNorms(),) if probed else ()
    plain = step_of(model, batch, rewrite, passes=(FuseNorms(), *rest))
    passes = (FuseNorms(), FuseResidualAdds(always=True), *rest)
    fused = step_of(model, batch, rewrite, passes=passes)
    # The first norm reads the sum of two embeddings, one of them broadcast.
    assert (len(summed(plain)), len(summed(fused))) == (0, 4)
    assert "4 residual sums" in fused.notes[0]
    got, want = (step.run(batch, {}) for step in (fused, plain))
    assert torch.equal(got.loss, want.loss)
    torch.testing.assert_close(got.grads, want.grads, rtol=0, atol=0)
    assert list(got.probes) == ([site.module for site in rewrite.norms] if probed else [])
    assert all(torch.equal(got.probes[name], want.probes[name]) for name in want.probes)


class Summed(nn.Module):
    """A norm whose input is one of several sums."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.norm, self.last = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y, early = self.first(x), 0.0
        if self.how == "broadcast":
            total = y + self.first.bias
        elif self.how == "scaled":
            total = torch.add(y, x, alpha=2)
        elif self.how == "number":
            total = y + 2.0
        else:
            total = y + x
            early = total * 0.5 if self.how == "read-before" else 0.0
        out: Tensor = self.last(self.norm(total)) + early
        return out + total if self.how == "read-after" else out


@pytest.mark.parametrize(
    ("how", "count"),
    [
        ("plain", 1),
        ("read-after", 1),
        ("read-before", 0),
        ("broadcast", 0),
        ("scaled", 0),
        ("number", 0),
    ],
)
def test_only_plain_sums_that_the_norm_reads_first_are_fused(how: str, count: int) -> None:
    model, batch = Summed(how).double().train(), vectors()
    passes = (FuseNorms(), FuseResidualAdds(always=True), InstrumentNorms())
    step = step_of(model, batch, Rewrite(norms=norm_sites(model)), passes=passes)
    assert len(summed(step)) == count
    out = step.run(batch, {})
    check_against_eager(model, batch, out)
    want = one_by_one(model, batch, norm_sites(model))
    torch.testing.assert_close(out.probes["norm"], want["norm"], rtol=1e-10, atol=0)
