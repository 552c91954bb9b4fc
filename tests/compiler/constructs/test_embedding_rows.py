"""Rows: the rows of some tokens train, and the others are bit-identical, whatever the optimizer does to them."""

import pytest
import torch
from torch import Tensor

import trainc
from examples.models import gpt
from tests.conformance import Setup, run_step, train_double
from trainc.compiler.constructs.mask.embedding_rows import EmbeddingRows

REST = "loss cross_entropy optimizer {} run {{ length = 9 steps }} "
SGD = "sgd { lr = 0.1, momentum = 0.9, weight_decay = 0.1 }"


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A program's embedding, and that of a loop in which its rows are a tensor of their own."""
    setup, name = Setup(), "embed.token.weight"
    text = REST.format(SGD) + 'mask embedding_rows on "embed.token" { rows = [3, 17, 5] }'
    spec = trainc.check(text).spec
    assert spec is not None
    start = setup.model().double().get_parameter(name).detach().clone()
    found = train_double(spec, setup, 3)
    given = []
    for gradient in found.gradients:  # of the entries that train, by their positions
        whole = torch.zeros_like(start)
        whole[[3, 5, 17]] = gradient[name].view(3, -1)
        given.append(whole)
    want = EmbeddingRows(rows=(3, 17, 5)).reference(
        start,
        given,
        lambda tensors: torch.optim.SGD(tensors, lr=0.1, momentum=0.9, weight_decay=0.1),
    )
    return {name: found.program.module.get_parameter(name).detach()}, {name: want}


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_new_tokens_alone_move_and_nothing_else_decays(tied: bool) -> None:
    torch.manual_seed(0)
    model = gpt(layers=1, width=8, heads=2, context=8, vocabulary=24, tied=tied)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    text = REST.format("adamw { lr = 0.1, weight_decay = 0.1 }")
    program = trainc.compile(
        text + 'mask embedding_rows on "embed.token" { last = 2, rest = freeze }', model
    )
    for seed in range(3):
        run_step(program, Setup().batch(seed))
    for name, parameter in model.named_parameters():
        if name != "embed.token.weight":
            assert torch.equal(parameter, before[name]), name
    moved = (model.embed.token.weight != before["embed.token.weight"]).any(1)
    assert moved.nonzero()[:, 0].tolist() == [22, 23]
    (optimizer,) = (a for a in program.execution.method.actions if hasattr(a, "state_of"))
    assert optimizer.state_of("embed.token.weight")["exp_avg"].shape == (16,)


@pytest.mark.parametrize(
    ("clause", "said"),
    [
        ('"embed.token" { last = 25 }', "`embed.token.weight` has 24 rows, from 0 to 23"),
        ('"embed.token" { rows = [24] }', "`embed.token.weight` has 24 rows, from 0 to 23"),
        ('"embed.token" { rows = [1, 1] }', "row 1 is listed twice"),
        ('"embed.token" { rows = [1], last = 1 }', "write either `rows`"),
        ('"ln_f.bias" { last = 1 }', "`ln_f.bias` is not a matrix, so it has no rows"),
        (
            '"embed.token" every 2 steps { last = 1 }',
            "listed, once for all: remove `every 2 steps`",
        ),
    ],
)
def test_rows_that_are_not_there_are_said_at_the_clause(clause: str, said: str) -> None:
    with pytest.raises(trainc.SpecError) as found:
        trainc.plan(REST.format(SGD) + "mask embedding_rows on " + clause, Setup().model())
    assert said in str(found.value)


def test_a_sparse_gradient_gives_what_a_dense_one_does() -> None:
    class Bag(torch.nn.Module):
        def __init__(self, sparse: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = torch.nn.Embedding(6, 4, sparse=sparse)
            self.head = torch.nn.Linear(4, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids).mean(1))  # type: ignore[no-any-return]

    found = []
    for sparse in (False, True):
        program = trainc.compile(
            REST.format(SGD) + 'mask embedding_rows on "embed" { last = 2 }',
            Bag(sparse),
            executor="module",
        )
        batch = torch.tensor([[4, 5], [5, 0]]), torch.tensor([0, 2])
        for _ in range(2):
            program.step(batch)
        found.append(program.module.get_parameter("embed.weight").detach())
    torch.testing.assert_close(*found)
