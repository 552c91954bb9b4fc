"""A weight that is embedding and head at once: probes add up to the norm of what both contribute."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from trainc.kernels.layer import embedding as embed
from trainc.kernels.layer import linear as lin
from trainc.kernels.layer import tied_embedding, tied_linear
from trainc.kernels.library.contracts import accumulation_dtype

WORDS, WIDTH = 7, 5


@dataclass
class Model:
    """A language model of one hidden layer whose head is its embedding."""

    weight: Tensor
    mix: Tensor
    bias: Tensor | None
    padding: int | None = None

    def hidden(self, y: Tensor) -> Tensor:
        """What lies between embedding and head; positions see the ones before them."""
        return (y.cumsum(-2) @ self.mix).tanh()

    def loss(self, weight: Tensor, bias: Tensor | None, ids: Tensor, targets: Tensor) -> Tensor:
        """The loss by torch's own layers."""
        y = functional.embedding(ids, weight, self.padding)
        return self.cost(functional.linear(self.hidden(y), weight, bias), targets)

    def cost(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy, summed over positions."""
        return functional.cross_entropy(
            logits.reshape(-1, WORDS), targets.reshape(-1), reduction="sum"
        )


def model(dtype: torch.dtype, with_bias: bool = False, padding: int | None = None) -> Model:
    torch.manual_seed(0)
    bias = torch.randn(WORDS).to(dtype) if with_bias else None
    return Model(
        torch.randn(WORDS, WIDTH).to(dtype), torch.randn(WIDTH, WIDTH).to(dtype), bias, padding
    )


def words(*shape: int) -> tuple[Tensor, Tensor]:
    """Ids with repetitions, and targets."""
    torch.manual_seed(1)
    ids = torch.randint(0, WORDS, shape)
    ids[..., -1] = ids[..., 0]
    return ids, torch.randint(0, WORDS, shape)


def run(made: Model, ids: Tensor, targets: Tensor) -> dict[str, Any]:
    """One forward and backward by our operators."""
    wide = accumulation_dtype(made.weight.dtype)
    weight = made.weight.detach().requires_grad_()
    bias = None if made.bias is None else made.bias.detach().requires_grad_()
    first = torch.zeros(ids.shape[0], 1, dtype=wide, requires_grad=True)
    second = torch.zeros(ids.shape[0], 2 - (bias is None), dtype=wide, requires_grad=True)
    y, rows = tied_embedding.tied_embedding(weight, ids, made.padding, first)
    x = made.hidden(y)
    logits = tied_linear.tied_linear(x, weight, bias, second, rows, ids)
    for kept in (y, logits):
        kept.retain_grad()
    made.cost(logits, targets).backward()
    assert first.grad is not None
    assert second.grad is not None
    return {
        "weight": weight.grad, "bias": None if bias is None else bias.grad, "embedding": first.grad,
        "head": second.grad, "both": first.grad[:, 0] + second.grad[:, 0],
        "logits": logits.detach(), "dlogits": logits.grad, "dy": y.grad, "x": x.detach(), "rows": rows,
    }  # fmt: skip


def by_vmap(made: Model, ids: Tensor, targets: Tensor) -> Tensor:
    """(B,) squared norms of every example's gradient of the shared weight, by torch.func."""

    def loss(weight: Tensor, ids: Tensor, targets: Tensor) -> Tensor:
        return made.loss(weight, made.bias, ids, targets)

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(made.weight, ids, targets)
    norms: Tensor = each.flatten(1).square().sum(1)
    return norms


@pytest.mark.parametrize("padding", [None, 2, -1])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 6), (1, 9), (3, 1), (3, 2, 4)], ids=str)
def test_against_gradients_of_every_example(
    shape: tuple[int, ...], with_bias: bool, padding: int | None
) -> None:
    made, (ids, targets) = model(torch.float64, with_bias, padding), words(*shape)
    got = run(made, ids, targets)
    torch.testing.assert_close(got["both"], by_vmap(made, ids, targets), rtol=1e-10, atol=1e-10)
    want = tied_linear.reference(made.weight, ids, padding, got["dy"], got["x"], got["dlogits"])
    torch.testing.assert_close(got["both"], want, rtol=1e-10, atol=1e-10)
    head = lin.reference(got["x"], made.weight, made.bias, got["dlogits"])["norms"]
    torch.testing.assert_close(got["head"], head, rtol=1e-10, atol=1e-10)


@given(
    st.integers(1, 4), st.integers(1, 7), st.sampled_from([None, *range(-WORDS, WORDS)]), st.data()
)
@settings(max_examples=60, deadline=None)
def test_any_words(examples: int, count: int, padding: int | None, data: st.DataObject) -> None:
    entry = st.integers(0, WORDS - 1)
    drawn = data.draw(st.lists(entry, min_size=examples * count, max_size=examples * count))
    ids = torch.tensor(drawn).view(examples, count)
    made, targets = model(torch.float64, padding=padding), ids.roll(1, 1)
    got, want = run(made, ids, targets)["both"], by_vmap(made, ids, targets)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_the_parts_alone_are_not_the_whole() -> None:
    made, (ids, targets) = model(torch.float64), words(4, 6)
    got = run(made, ids, targets)
    alone = torch.zeros(4, 1, dtype=torch.float64, requires_grad=True)
    y, _ = tied_embedding.tied_embedding(made.weight, ids, None, alone)
    y.backward(got["dy"])  # no head: rows have no gradient
    assert alone.grad is not None
    apart = alone.grad[:, 0] + got["head"][:, 0]
    assert ((apart / by_vmap(made, ids, targets) - 1).abs() > 0.01).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gradients_and_logits_are_torchs(dtype: torch.dtype) -> None:
    made, (ids, targets) = model(dtype, True, 2), words(4, 6)
    got = run(made, ids, targets)
    assert made.bias is not None
    leaves = [t.detach().requires_grad_() for t in (made.weight, made.bias)]
    loss = made.loss(leaves[0], leaves[1], ids, targets)
    want = torch.autograd.grad(loss, leaves)
    y = functional.embedding(ids, made.weight, 2)
    assert torch.equal(got["logits"], functional.linear(made.hidden(y), made.weight, made.bias))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    for name, value in zip(("weight", "bias"), want, strict=True):
        torch.testing.assert_close(got[name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype: torch.dtype) -> None:
    made, (ids, targets) = model(dtype, padding=3), words(5, 9)
    got = run(made, ids, targets)
    assert got["both"].dtype == got["rows"].dtype == torch.float32
    exact = tied_linear.reference(
        made.weight.double(), ids, 3, got["dy"].double(), got["x"].double(), got["dlogits"].double()
    )
    torch.testing.assert_close(got["both"].double(), exact, rtol=1e-5, atol=0)


def test_micro_batches_add_up() -> None:
    made, (ids, targets) = model(torch.float64), words(6, 5)
    whole = run(made, ids, targets)["both"]
    parts = [
        run(made, i, t)["both"]
        for i, t in zip(ids.split([1, 3, 2]), targets.split([1, 3, 2]), strict=True)
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=0)


def test_chunks_of_examples_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    made, (ids, targets) = model(torch.float64), words(5, 6)
    whole = run(made, ids, targets)["both"]
    monkeypatch.setattr(tied_linear, "HELD_CPU", 80)  # two examples
    torch.testing.assert_close(run(made, ids, targets)["both"], whole, rtol=1e-12, atol=0)


def test_more_positions_than_ids_and_ids_of_32_bits() -> None:
    torch.manual_seed(0)
    weight, ids = torch.randn(WORDS, WIDTH).double().requires_grad_(), words(3, 4)[0].int()
    probes = [torch.zeros(3, 1, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    y, rows = tied_embedding.tied_embedding(weight, ids, None, probes[0])
    x = torch.randn(3, 2, 5, WIDTH).double()
    logits = tied_linear.tied_linear(x, weight, None, probes[1], rows, ids)
    dy, dlogits = torch.randn_like(y), torch.randn_like(logits)
    got = torch.autograd.grad((y, logits), (*probes, weight), (dy, dlogits))
    want = tied_linear.reference(weight.detach(), ids, None, dy, x, dlogits)
    torch.testing.assert_close((got[0] + got[1]).flatten(), want, rtol=1e-10, atol=1e-10)


def test_rows_that_no_head_used_add_nothing() -> None:
    weight, (ids, _) = torch.randn(WORDS, WIDTH, requires_grad=True), words(3, 4)
    probe = torch.zeros(3, 1, requires_grad=True)
    y, rows = tied_embedding.tied_embedding(weight, ids, 2, probe)
    assert not rows.any()
    assert rows.untyped_storage().nbytes() == 4  # one zero, whatever the batch
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, (weight, probe), dy)
    plain = functional.embedding(ids, weight, 2)
    assert torch.equal(got[0], torch.autograd.grad(plain, weight, dy)[0])
    want = embed.reference(ids, weight.detach(), dy, 2)["norms"]
    torch.testing.assert_close(got[1], want)


def test_a_frozen_weight_still_yields_norms() -> None:
    made, (ids, targets) = model(torch.float64), words(3, 4)
    want = run(made, ids, targets)["both"]
    probes = [torch.zeros(3, 1, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    y, rows = tied_embedding.tied_embedding(made.weight, ids, None, probes[0])
    logits = tied_linear.tied_linear(made.hidden(y), made.weight, None, probes[1], rows, ids)
    made.cost(logits, targets).backward()
    assert probes[0].grad is not None
    assert probes[1].grad is not None
    torch.testing.assert_close((probes[0].grad + probes[1].grad).flatten(), want)


def test_without_probes_they_are_torchs() -> None:
    weight, (ids, _) = torch.randn(WORDS, WIDTH, requires_grad=True), words(3, 4)
    y, rows = tied_embedding.tied_embedding(weight, ids, 2)
    assert torch.equal(y, functional.embedding(ids, weight, 2))
    assert not rows.requires_grad
    assert torch.equal(tied_linear.tied_linear(y, weight, None, None, rows, ids), y @ weight.T)


def test_under_autocast_the_head_is_torchs() -> None:
    weight, (ids, _) = torch.randn(WORDS, WIDTH, requires_grad=True), words(3, 4)
    probes = [torch.zeros(3, 1, requires_grad=True) for _ in range(2)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, rows = tied_embedding.tied_embedding(weight, ids, None, probes[0])
        got = tied_linear.tied_linear(y, weight, None, probes[1], rows, ids)
        want = functional.linear(y, weight)
    assert torch.equal(got, want)
    dlogits = torch.randn_like(got)
    grads = torch.autograd.grad(got, (*probes, y), dlogits)
    assert grads[0].dtype == grads[1].dtype == torch.float32
    x = y.detach().bfloat16().double()
    exact = tied_linear.reference(
        weight.detach().double(), ids, None, grads[2].double(), x, dlogits.double()
    )
    torch.testing.assert_close((grads[0] + grads[1]).flatten().double(), exact, rtol=1e-4, atol=0)


def test_one_probe_without_the_other_is_refused() -> None:
    weight, (ids, _) = torch.randn(WORDS, WIDTH, requires_grad=True), words(3, 4)
    y, rows = tied_embedding.tied_embedding(
        weight, ids, None, torch.zeros(3, 1, requires_grad=True)
    )
    with pytest.raises(ValueError, match="a probe to each, or to neither"):
        tied_linear.tied_linear(y, weight, None, None, rows, ids)


@pytest.mark.parametrize(
    ("x", "rows", "probe", "message"),
    [
        ((3, 4, 6), (3, 4, 5), (3, 1), r"must be \(B, ..., D\)"),
        ((2, 4, 5), (3, 4, 5), (2, 1), r"must be \(B, ..., D\)"),
        ((3, 4, 5), (3, 5, 5), (3, 1), "second result of tied_embedding"),
        ((3, 4, 5), (3, 4, 5), (3, 2), "probe must"),
    ],
)
def test_the_head_names_what_is_wrong(x: Any, rows: Any, probe: Any, message: str) -> None:
    made = (torch.zeros(x), torch.zeros(WORDS, WIDTH), None, torch.zeros(probe), torch.zeros(rows))
    with pytest.raises(RuntimeError, match=message):
        tied_linear.tied_linear(*made, words(3, 4)[0])


def test_the_embedding_names_what_is_wrong() -> None:
    weight, ids = torch.zeros(WORDS, WIDTH), words(3, 4)[0]
    with pytest.raises(RuntimeError, match="must be a row"):
        tied_embedding.tied_embedding(weight, ids, WORDS, torch.zeros(3, 1))
    with pytest.raises(RuntimeError, match="probe must"):
        tied_embedding.tied_embedding(weight, ids, None, torch.zeros(4, 1))
    with pytest.raises(RuntimeError, match="int32 or int64"):
        tied_embedding.tied_embedding(weight, ids.float(), None, torch.zeros(3, 1))
