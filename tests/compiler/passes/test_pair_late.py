"""What the views have in common runs once, and every number is that of views that pass the whole model."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from examples import models
from tests.compiler.passes.step_cases import noise_site, norm_sites, paired, step_of, tokens
from trainc.compiler.graph.interface import Outputs
from trainc.compiler.graph.step_graph import StepGraph
from trainc.compiler.method.sites import LayerSite, Rewrite
from trainc.compiler.patterns.operator_axes import Block, block_call
from trainc.kernels.layer import embedding as _embedding  # noqa: F401  (registers the operator)
from trainc.kernels.layer import linear as _linear  # noqa: F401  (registers the operator)
from trainc.kernels.noise.philox import pack_key
from trainc.runtime.data.batch import Batch

EARLY = frozenset(["pair_late"])


def noise(*modules: str) -> tuple[Rewrite, dict[str, Tensor]]:
    """Return a rewrite with noise on these modules, and its scalars."""
    scalars = {f"sigma:{name}": torch.tensor(0.3 + 0.1 * i) for i, name in enumerate(modules)}
    scalars |= {"key": pack_key(7, 3), "weight:consistency": torch.tensor(0.5)}
    scalars |= {"first_example": torch.tensor(5), "loss_weight": torch.tensor(0.25)}
    return paired(Rewrite(hooks=[noise_site(n, i) for i, n in enumerate(modules)])), scalars


def both(
    model: nn.Module, batch: Batch, rewrite: Rewrite, scalars: dict[str, Tensor], **given: Any
) -> tuple[StepGraph, Outputs]:
    """Return the step that pairs late and its outputs, which must be those of one that pairs early."""
    model = model.double().train()
    late = step_of(model, batch, rewrite, scalars=scalars, **given)
    early = step_of(model, batch, rewrite, scalars=scalars, without=EARLY, **given)
    found = []
    for step in (late, early):
        torch.manual_seed(11)
        found.append(step.run(batch, scalars))
    got, want = found
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-12, atol=1e-13)
    for name in ("terms", "grads", "probes"):
        one, other = getattr(got, name), getattr(want, name)
        assert one.keys() == other.keys()
        for key, value in other.items():
            torch.testing.assert_close(one[key], value, rtol=1e-10, atol=1e-13, msg=key)
    return late, got


def rows(step: StepGraph, parameter: str) -> int:
    """Return how many rows the linear layer with a weight is run on."""
    (weight,) = step.graph.find_nodes(op="get_attr", target=parameter)
    (turned, *_) = weight.users
    return int(next(user for user in turned.users if "mm" in user.name).meta["val"].shape[0])


class Dropped(nn.Module):
    """Residual layers with dropout modules, which share their masks, around an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.fc = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.LayerNorm(8)
        self.drop = nn.Dropout(0.4)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        for layer in self.fc:
            x = x + self.drop(F.relu(layer(self.norm(x)), inplace=True))
        return self.head(x[:, 0])  # type: ignore[no-any-return]


def examples(count: int = 4, *shape: int) -> Batch:
    return torch.randn(count, *(shape or (3, 8))).double(), torch.randint(5, (count,))


def test_a_transformer_runs_once_up_to_its_first_noisy_layer_and_repeats_what_joins_later() -> None:
    model = models.gpt(2, 16, 2, 8, 64)
    rewrite, scalars = noise("blocks.1.mlp.fc", "head")
    rewrite.norms = norm_sites(model)
    rewrite.layers = [
        LayerSite(name, "linear", f"{name}.weight", f"{name}.bias")
        for name in ("blocks.0.attn.qkv", "blocks.1.mlp.fc", "blocks.1.mlp.proj")
    ]
    rewrite.layers.append(LayerSite("embed.position", "embedding", "embed.position.weight"))
    step, got = both(model, tokens(3, 8), rewrite, scalars)
    assert got.probes.keys() == {site.module for site in rewrite.measured}
    assert [r.sites for r in step.reports if r.name == "pair_late"] == [("loss",)]
    (note,) = [note for note in step.notes if "run once" in note]
    assert note.endswith("which part at `blocks.1`, `blocks.1.mlp.fc`")
    assert rows(step, "blocks.0.mlp.fc.weight") == rows(step, "blocks.1.attn.qkv.weight") == 24
    assert rows(step, "head.weight") == 48


def test_masks_that_views_share_are_drawn_as_before() -> None:
    rewrite, scalars = noise("fc.2")
    step, _ = both(Dropped(), examples(), rewrite, scalars)
    assert [rows(step, f"fc.{i}.weight") for i in range(4)] == [16, 16, 16, 32]


def test_views_with_masks_of_their_own_part_at_the_first_dropout() -> None:
    rewrite, scalars = noise()
    rewrite.view_requests = [replace(rewrite.view_requests[0], share_dropout=False, mean_loss=True)]
    step, _ = both(Dropped(), examples(), rewrite, scalars)
    assert [rows(step, f"fc.{i}.weight") for i in range(2)] == [16, 32]


def test_views_that_nothing_parts_run_once() -> None:
    model = models.vit(image=4, patch=2, layers=1, width=8, heads=2)
    step, got = both(model, (torch.randn(3, 1, 4, 4).double(), torch.arange(3)), *noise())
    assert float(got.terms["consistency"]) == 0
    assert rows(step, "head.weight") == 3


def test_one_graph_for_many_batch_sizes_pairs_late() -> None:
    rewrite, scalars = noise("fc.2")
    axes = {"inputs": {0: "B"}, "targets": {0: "B"}}
    model = Dropped()
    step, _ = both(model, examples(6), rewrite, scalars, axes=axes)
    early = step_of(model, examples(6), rewrite, scalars=scalars, without=EARLY, axes=axes)
    for count in (3, 7):
        batch = examples(count)
        assert step.accepts(batch)
        out = []
        for one in (step, early):
            torch.manual_seed(3)
            out.append(one.run(batch, scalars))
        torch.testing.assert_close(out[0].loss, out[1].loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(out[0].grads["token"], out[1].grads["token"], rtol=1e-10, atol=0)


class Unsafe(nn.Module):
    """Two linear layers with something between them that is not known to keep examples apart."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.between = between
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.second(self.between(self.first(x))).mean(1))
        return logits


def written(x: Tensor) -> Tensor:
    """Write to memory that a view of it shows again."""
    shown = x[:, :1]
    x.mul_(2.0)
    return x + shown


def joined(x: Tensor) -> Tensor:
    """Order the rows by token before the example, where a view is no block of them."""
    rows: Tensor = x.transpose(0, 1).flatten(0, 1)
    parts: Tensor = rows.unflatten(0, (3, -1))
    return parts.transpose(0, 1)


UNSAFE: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "mixes the examples": (lambda x: x + x.roll(1, 0), 12),
    "normalizes the batch": (lambda x: F.batch_norm(x.flatten(1), None, None, training=True).view_as(x), 12),
    "orders the batch": (lambda x: x.sort(0).values, 12),
    "joins tokens and examples": (joined, 12),
    "writes to what it reads": (written, 24),
    "is not known": (lambda x: torch.cdist(x, x) @ x, 12),
}  # fmt: skip


@pytest.mark.parametrize("what", UNSAFE)
def test_where_an_operator_may_mix_views_they_part_before_it(what: str) -> None:
    between, before = UNSAFE[what]
    step, _ = both(Unsafe(between), examples(), *noise("head"))
    assert [rows(step, f"{name}.weight") for name in ("first", "second")] == [before, 24]


def test_a_mean_of_the_batch_is_one_of_all_views_and_the_same_for_each() -> None:
    step, _ = both(Unsafe(lambda x: x + x.mean(0, keepdim=True)), examples(), *noise("head"))
    assert rows(step, "second.weight") == 12


def test_a_model_that_writes_to_its_inputs_keeps_the_batch_as_it_is() -> None:
    class Writes(Dropped):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2.0))

    batch = examples()
    before = batch[0].clone()
    both(Writes(), batch, *noise("fc.3"))
    torch.testing.assert_close(batch[0], before, rtol=0, atol=0)


def one(*shape: int) -> Tensor:
    return torch.randn(shape).double()


aten = torch.ops.aten
ids = torch.randint(6, (4, 2))
ones, zeros = torch.ones(6).double(), torch.zeros(6).double()
picture = ([1, 1], [0, 0], [1, 1], 1)
LAYERS = torch.ops.trainc
OPERATORS: dict[str, tuple[Any, tuple[Any, ...], set[int]]] = {
    "add": (aten.add.Tensor, (one(4, 5), one(5)), {0}),
    "add all": (aten.add.Tensor, (one(4, 6), one(4, 6)), {0, 1}),
    "where": (aten.where.self, (one(4, 6) > 0, one(4, 6), one(4, 1)), {0, 1}),
    "masked_fill": (aten.masked_fill.Scalar, (one(4, 6), one(1, 6) > 0, 0.0), {0, 1}),
    "cast": (aten.to.dtype, (one(4, 5), torch.float32), {0}),
    "dropout": (aten.dropout.default, (one(4, 6), 0.5, True), set()),
    "no dropout": (aten.dropout.default, (one(4, 5), 0.5, False), {0}),
    "softmax": (aten.softmax.int, (one(4, 6), -1), {0}),
    "sum": (aten.sum.dim_IntList, (one(4, 5, 6), [1]), {0, 1}),
    "sum of all": (aten.sum.default, (one(4, 6),), set()),
    "select": (aten.select.int, (one(4, 5, 6), 1, 2), {0, 1}),
    "slice": (aten.slice.Tensor, (one(4, 6), 1, 0, 4), {0}),
    "chunk": (aten.chunk.default, (one(4, 6), 3, 1), {0}),
    "unbind": (aten.unbind.int, (one(4, 3, 6), 1), {0, 1}),
    "sort": (aten.sort.default, (one(4, 6), 1), {0}),
    "transpose": (aten.transpose.int, (one(4, 5, 6), 0, 2), {0, 2}),
    "permute": (aten.permute.default, (one(4, 5, 6), [2, 0, 1]), {0, 1}),
    "flatten": (aten.flatten.using_ints, (one(4, 5, 6), 1), {0}),
    "flatten first": (aten.flatten.using_ints, (one(3, 4, 5), 0, 1), set()),
    "unflatten": (aten.unflatten.int, (one(8, 5), 0, [2, -1]), {0}),
    "reshape": (aten.reshape.default, (one(4, 6), [4, 2, 3]), {0, 1}),
    "unsqueeze": (aten.unsqueeze.default, (one(4, 5), 0), {1}),
    "same bits": (aten.view.dtype, (one(4, 5), torch.int64), set()),
    "linear": (aten.linear.default, (one(4, 3, 6), one(2, 6), one(2)), {0}),
    "conv1d": (aten.conv1d.default, (one(4, 2, 6), one(2, 2, 3)), {0}),
    "conv2d": (aten.conv2d.default, (one(4, 2, 6, 6), one(2, 2, 3, 3)), {0}),
    "conv2d of one": (aten.conv2d.default, (one(2, 6, 6), one(2, 2, 3, 3)), set()),
    "max_pool2d": (aten.max_pool2d.default, (one(4, 2, 4, 4), [2, 2]), {0}),
    "layer_norm": (aten.layer_norm.default, (one(4, 2, 6), [6]), {0, 1}),
    "group_norm": (aten.group_norm.default, (one(4, 6, 2), 2), {0}),
    "prelu": (aten.prelu.default, (one(4, 6), one(6)), {0}),
    "batch_norm": (aten.batch_norm.default, (one(4, 6), None, None, zeros, ones, True, 0.1, 1e-5, False), set()),
    "fixed batch_norm": (
        aten.batch_norm.default, (one(4, 6), None, None, zeros, ones, False, 0.1, 1e-5, False), {0},
    ),
    "matmul": (aten.matmul.default, (one(4, 6, 5), one(5, 2)), {0, 1, 2}),
    "bmm": (aten.bmm.default, (one(4, 6, 5), one(4, 5, 2)), {0, 1, 2}),
    "addmm": (aten.addmm.default, (one(2), one(4, 5), one(5, 2)), {0, 1}),
    "attention": (aten.scaled_dot_product_attention.default, (one(4, 2, 6, 3),) * 3, {0, 1}),
    "masked attention": (
        aten.scaled_dot_product_attention.default, (*(one(4, 2, 6, 3),) * 3, one(4, 1, 6, 6)), {0, 1},
    ),
    "attention with dropout": (
        aten.scaled_dot_product_attention.default, (*(one(4, 2, 6, 3),) * 3, None, 0.5), set(),
    ),
    "embedding": (aten.embedding.default, (one(6, 3), ids), {0, 1}),
    "embedding by frequency": (aten.embedding.default, (one(6, 3), ids, -1, True), set()),
    "cat": (aten.cat.default, ([one(4, 5), one(4, 1)], 1), {0}),
    "stack": (aten.stack.default, ([one(4, 5), one(4, 5)], 1), {0}),
    "expand": (aten.expand.default, (one(1, 5, 1), [4, -1, 6]), {0, 2}),
    "repeat": (aten.repeat.default, (one(3, 4), [2, 1, 1]), {0, 2}),
    "zeros": (aten.zeros.default, ([4, 3],), {0}),
    "pad": (aten.constant_pad_nd.default, (one(4, 6), [1, 1]), {0}),
    "roll": (aten.roll.default, (one(4, 6), [1], [1]), {0}),
    "roll of all": (aten.roll.default, (one(4, 6), [1]), set()),
    "tril": (aten.tril.default, (one(4, 6, 6),), {0}),
    "unknown": (aten.cdist.default, (one(4, 6, 2), one(4, 6, 2)), set()),
    "our linear": (LAYERS.linear.default, (one(4, 2, 6), one(3, 6), None, one(4, 1), "auto"), {1}),
    "our norm": (LAYERS.rms_norm.default, (one(4, 2, 6), [6], None, one(4, 1), 1e-5, "none"), {1}),
    "our embedding": (LAYERS.embedding.default, (one(6, 3), ids, None, one(4, 1)), {1}),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_a_block_of_a_result_comes_from_blocks_of_the_operands(name: str) -> None:
    target, args, axes = OPERATORS[name]
    graph = fx.Graph()

    def operand(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        node = graph.placeholder("x")
        node.meta["val"] = value
        return node

    node = graph.call_function(target, pytree.tree_map(operand, args))
    node.meta["val"] = target(*args)
    found = {axis: block_call(node, axis, 2) for axis in range(first_of(node.meta["val"]).dim())}
    assert {axis for axis, call in found.items() if call is not None} == axes
    for axis in axes:
        call = found[axis]
        assert call is not None
        blocks = {b.node: (b.axis, b.node.meta["val"].chunk(2, b.axis)[0]) for b in call.blocks}
        whole = {n: torch.cat([block, block], at) for n, (at, block) in blocks.items()}

        def given(value: Any, whole: Any = whole, blocks: Any = blocks) -> Any:
            if isinstance(value, Block):
                return blocks[value.node][1]
            return whole.get(value, value.meta["val"]) if isinstance(value, fx.Node) else value

        is_leaf = lambda value: isinstance(value, Block)  # noqa: E731
        block = call.target(*pytree.tree_map(given, call.args, is_leaf=is_leaf), **call.kwargs)
        every = target(*pytree.tree_map(given, node.args))
        got = torch.cat([first_of(block)] * 2, axis)
        torch.testing.assert_close(got, first_of(every), rtol=1e-12, atol=1e-12)


def first_of(value: Any) -> Tensor:
    found = value[0] if isinstance(value, (list, tuple)) else value
    assert isinstance(found, Tensor)
    return found
