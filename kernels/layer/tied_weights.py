"""Per-example squared gradient norms of a weight that is word embedding and output head at once.

An example contributes c = c_emb + c_head to the shared weight.grad, and

  ||c||^2 = ||c_emb||^2 + ||c_head||^2 + 2 <c_emb, c_head>

whose last term neither layer knows alone (two probes that leave it out are wrong by it). c_emb has
rows only for the ids the example holds, so the head owes the embedding nothing but its rows for
them. They reach it as a gradient, that of the zeros `rows`, one zero seen as (B, ..., D):

  drows[b, t] = c_head_b[ids[b, t]] = sum over t' of dlogits[b, t', ids[b, t]] * x[b, t']

The embedding's backward receives dy and drows and adds 2 sum over t of <dy[b, t], drows[b, t]>.

With T ids and T' positions an example, this costs 2 T T' D multiplications and additions an example
beyond the two layers' own, and holds (T', T) numbers of as many examples as fit a cache, at least
one: B T T' numbers at most, never V D an example.
"""

import torch
from torch import Tensor
from torch.nn import functional

from trainc.kernels.layer import tied_head  # noqa: F401  registers trainc::tied_linear
from trainc.kernels.layer.tied_rows import zeros
from trainc.kernels.library.contracts import autocast

__all__ = ["tied_embedding", "tied_linear"]


def tied_embedding(
    weight: Tensor, ids: Tensor, padding_idx: int | None = None, probe: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Look up the rows of `weight` for `ids`, where `tied_linear` uses the same weight for the output head.

    `weight` is (V, D), floating; `ids` is (B, ...) int32 or int64 in [0, V), an example being dim 0. `padding_idx` is a
    row (negative counts from the end) that gets no gradient from the embedding, and one from the head as any other row,
    or None. `probe` is None, or zeros (B, 1) in float32 (float64 for float64 weights) that require grad. It is not
    read: its gradient *added to column 0 of the head's probe's* is, per example, the squared norm of its contribution
    to the shared weight.grad, in the units of that gradient. Alone it is what the embedding's part adds to the head's,
    and may be negative. Take a new probe for each backward pass, in which one embedding and one head take part: a head
    that takes its rows from two embeddings, or the other way round, has cross terms between the two that nobody adds.

    Returns (y, rows): y (B, ..., D) in weight's dtype, and zeros (B, ..., D) to give to `tied_linear`. Without a probe
    y is F.embedding's, and the zeros want no gradient. Raises RuntimeError for other shapes and dtypes and for a
    `padding_idx` that is no row (AssertionError, F.embedding's, without a probe), and IndexError for ids outside of
    weight; CUDA fails with a device assertion on those. With a probe, second derivatives raise RuntimeError and
    forward-mode ones NotImplementedError.
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
    """Compute x @ weight.T + bias with the weight of `tied_embedding`.

    `x` is (B, ..., D), `weight` (V, D) and `bias` (V,) or None, of one floating dtype; an example is dim 0, as in the
    embedding. `rows`, (*ids.shape, D), and `ids` are what tied_embedding returned and what it looked up. `probe` is
    None, or zeros (B, 2), (B, 1) without bias, in float32 (float64 for float64 x) that require grad. It is not read:
    column 0 of its gradient is, per example, the squared norm of what the head alone contributes to the shared
    weight.grad, to which the embedding's probe has the rest; column 1 that of its contribution to bias.grad; in the
    units of those gradients. Take a new probe for each backward pass.

    Returns (B, ..., V) in x's dtype, under autocast in its 16-bit one (float64 stays). Without a probe this is
    F.linear. Raises ValueError without a probe where the embedding had one, whose norms would lack what the two share,
    and RuntimeError for other shapes and dtypes. With a probe, second derivatives raise RuntimeError and forward-mode
    ones NotImplementedError.
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
