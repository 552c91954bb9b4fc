"""Per-example squared gradient norms of a weight that is word embedding and output head at once.

An example contributes c = c_emb + c_head to the shared weight.grad, and

  ||c||^2 = ||c_emb||^2 + ||c_head||^2 + 2 <c_emb, c_head>

whose last term neither layer knows alone (two probes that leave it out are wrong by it). c_emb has
rows only for the ids the example holds, so the head owes the embedding nothing but its rows for
them. They reach it as a gradient: `tied_embedding` returns beside y a tensor `rows` of zeros that
`tied_linear` takes and does not read, and whose gradient is

  drows[b, t] = c_head_b[ids[b, t]] = sum over t' of dlogits[b, t', ids[b, t]] * x[b, t']

The embedding's backward receives dy and drows and adds 2 sum over t of <dy[b, t], drows[b, t]>.

Contract. `ids` is (B, ...) int32 or int64 with T ids an example, `weight` (V, D), `x` (B, ..., D)
with T' positions, `bias` (V,) or None; an example is dim 0. The embedding's probe is (B, 1), the
head's (B, 2), or (B, 1) without bias, zeros in float32 (float64 for float64 weights). Column 0 of
both *added* is the squared norm of the example's contribution to the shared weight.grad; column 0
of the head alone is its own ||c_head||^2, the embedding's alone is the rest, and may be negative.
padding_idx gets no gradient from the embedding, and one from the head as any other row. One
embedding and one head in a backward pass: a head that takes its rows from two embeddings, or the
other way round, has cross terms between the two that nobody adds.

Beyond the two layers' own this costs 2 T T' D multiplications and additions an example, and holds
(T', T) numbers of as many examples as fit a cache, at least one: B T T' numbers at most, never
V D an example. `rows` is one zero seen as (B, ..., D).
"""

import torch
from torch import Tensor
from torch.nn import functional

from trainc.kernels import tied_head  # noqa: F401  registers trainc::tied_linear
from trainc.kernels.support import autocast
from trainc.kernels.tied_rows import zeros


def tied_embedding(
    weight: Tensor, ids: Tensor, padding_idx: int | None = None, probe: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rows of weight for ids, (B, ..., D), and the zeros to give to `tied_linear`.

    Without a probe this is F.embedding, and the zeros want no gradient.
    """
    if probe is None:
        return functional.embedding(ids, weight, padding_idx), zeros(weight, ids)
    found: tuple[Tensor, Tensor] = torch.ops.trainc.tied_embedding(weight, ids, padding_idx, probe)
    return found


def tied_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    probe: Tensor | None,
    rows: Tensor,
    ids: Tensor,
) -> Tensor:
    """x @ weight.T + bias, (B, ..., V); `rows` and `ids` are the embedding's.

    Without a probe this is F.linear; a ValueError if the embedding's probe then lacks its part.
    """
    if probe is None:
        if rows.requires_grad:
            raise ValueError(
                "tied_linear without a probe leaves the embedding's norms without what embedding "
                "and head share: give tied_embedding and tied_linear a probe each, or neither"
            )
        return functional.linear(x, weight, bias)
    cast = autocast(x, weight, bias)
    y: Tensor = torch.ops.trainc.tied_linear(*cast, probe, rows, ids)
    return y


def reference(
    weight: Tensor, ids: Tensor, padding_idx: int | None, dy: Tensor, x: Tensor, dlogits: Tensor
) -> Tensor:
    """(B,) squared norms by definition, one example at a time, in the dtype of weight."""
    norms = []
    for example in range(ids.shape[0]):
        each = torch.zeros_like(weight)
        each.index_add_(0, ids[example].flatten(), dy[example].reshape(-1, dy.shape[-1]))
        if padding_idx is not None:
            each[padding_idx] = 0
        logits, inputs = dlogits[example].flatten(0, -2), x[example].flatten(0, -2)
        norms.append((each + logits.T @ inputs).square().sum())
    return torch.stack(norms)
