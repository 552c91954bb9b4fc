"""Roles of parts of models: by what they are and where they stand, whatever their names."""

import pytest
import torch
from torch import Tensor, nn

from trainc.compiler.model.inventory import Inventory, build_inventory
from trainc.compiler.model.select import select
from trainc.dsl.reading.field_types import node_of
from trainc.dsl.reading.selectors import selector


class ScaleOnly(nn.Module):
    """A norm of which no name says so."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.g * self.scaled(x)

    def scaled(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class NormWithActivation(nn.BatchNorm1d):
    """A norm with children, as in image models."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.drop, self.act = nn.Identity(), nn.ReLU()


class NormedLinear(nn.Linear):
    """A layer with `norm` in its name that is none."""


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Mixer(nn.Module):
    """Attention of which no name says so, but that it computes queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))


class FusedExperts(nn.Module):
    """Weights of all experts in two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (
            nn.Parameter(torch.randn(4, 16, 8)),
            nn.Parameter(torch.randn(4, 8, 16)),
        )
        self.up_bias = nn.Parameter(torch.zeros(4, 16))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.mix = ScaleOnly(8), Mixer()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)
        self.fused, self.router = FusedExperts(), nn.Linear(8, 4, bias=False)
        self.residual = LayerScale(8)
        self.fc_out = nn.Linear(8, 8)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_tokens = nn.Parameter(torch.zeros(1, 2, 8))
        self.summary = nn.Parameter(torch.zeros(1, 1, 8))
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.words = nn.EmbeddingBag(9, 8)
        self.stack = nn.ModuleList(Block() for _ in range(2))
        self.last = ScaleOnly(8)
        self.activated = NormWithActivation(8)
        self.answer = nn.Sequential(nn.Linear(8, 8), nn.GELU(), NormedLinear(8, 3))


@pytest.fixture(scope="module")
def inventory() -> Inventory:
    with torch.device("meta"):
        return build_inventory(Model())


def names(text: str, inventory: Inventory) -> set[str]:
    return set(select(selector(node_of(text)), inventory, "parameters"))


def test_what_normalises_is_a_norm(inventory: Inventory) -> None:
    assert names("role(norm)", inventory) == {
        "stack.0.scale.g", "stack.1.scale.g", "last.g", "activated.weight", "activated.bias",
    }  # fmt: skip


def test_tables_and_tokens_are_embeddings_and_a_projection_is_none(inventory: Inventory) -> None:
    assert names("role(embedding)", inventory) == {"register_tokens", "summary", "words.weight"}


def test_what_computes_queries_keys_and_values_is_attention(inventory: Inventory) -> None:
    found = names('role(attention) & "stack.0"', inventory)
    assert found == names('"stack.0.mix"', inventory)


def test_linear_layers_and_experts_beside_attention_are_the_mlp(inventory: Inventory) -> None:
    found = names('role(mlp) & "stack.0" - role(bias)', inventory)
    wanted = {
        f"stack.0.{n}" for n in ("fc1.weight", "fc2.weight", "router.weight", "fc_out.weight")
    }
    assert found == wanted | {"stack.0.fused.up", "stack.0.fused.down"}


def test_linear_layers_behind_the_last_block_are_the_head(inventory: Inventory) -> None:
    assert names("role(head)", inventory) == {
        f"answer.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")
    }


def test_matrices_are_what_layers_multiply_by_and_tables_look_up(inventory: Inventory) -> None:
    block = {
        f"{n}.weight"
        for n in ("mix.q", "mix.k", "mix.v", "mix.o", "fc1", "fc2", "router", "fc_out")
    }
    block |= {"fused.up", "fused.down"}
    outside = {"patches.weight", "words.weight", "answer.0.weight", "answer.2.weight"}
    assert names("matrices", inventory) == outside | {
        f"stack.{i}.{n}" for i in (0, 1) for n in block
    }


def test_biases_of_experts_are_biases(inventory: Inventory) -> None:
    assert "stack.0.fused.up_bias" in names("role(bias)", inventory)


def test_a_module_is_a_matrix_where_its_weight_is_one(inventory: Inventory) -> None:
    chosen = set(select(selector(node_of('matrices & "stack.0.**"')), inventory, "modules"))
    assert {"stack.0.fc1", "stack.0.fused", "stack.0.mix.q"} <= chosen
    assert not chosen & {"stack.0.scale", "stack.0.residual", "stack.0.mix"}


def test_nothing_decays_that_is_no_matrix(inventory: Inventory) -> None:
    plain = names("all - role(norm) - role(bias) - role(embedding)", inventory)
    assert plain - names("matrices", inventory) == {
        "temperature", "stack.0.residual.gamma", "stack.1.residual.gamma",
    }  # fmt: skip


class MlpHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 3)


class TableBeside(nn.Module):
    """A model that calls its table by a child's name, and has a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.embedding = nn.Parameter(torch.zeros(8)), nn.Embedding(12, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.embeddings = nn.ModuleDict({"norm": nn.LayerNorm(8)})
        self.classify = MlpHead()

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embedding(ids) + self.shift
        return x


def test_what_calls_a_table_by_the_name_of_a_child_is_no_table_nor_are_norms_beside_it() -> None:
    assert names("role(embedding)", build_inventory(TableBeside())) == {"embedding.weight"}


def test_the_head_is_no_mlp_whatever_its_class_is_called() -> None:
    inventory = build_inventory(TableBeside())
    assert names("role(head) - role(bias) - role(norm)", inventory) == {"classify.fc.weight"}
    assert not names("role(head) & role(mlp)", inventory)
    assert names("role(mlp)", inventory)


class ExpertsBetween(nn.Module):
    """A model named after a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(4, 8), nn.LayerNorm(8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 3)


def test_the_name_of_a_model_makes_not_all_of_it_an_mlp() -> None:
    inventory = build_inventory(ExpertsBetween())
    assert names("role(mlp)", inventory) == {
        f"experts.{i}.{leaf}" for i in range(4) for leaf in ("weight", "bias")
    }
    levels = {p.name: p.place.level for p in inventory.parameters if p.name.endswith("weight")}
    assert levels == {"stem.weight": 0, "norm.weight": 1, "head.weight": 3} | {
        f"experts.{i}.weight": 2 for i in range(4)
    }


def test_what_a_parametrization_holds_stands_and_acts_as_its_layer() -> None:
    normed = nn.utils.parametrizations.weight_norm
    model = nn.Sequential(normed(nn.Linear(4, 8)), nn.LayerNorm(8), normed(nn.Linear(8, 3)))
    inventory = build_inventory(model)
    levels = {p.name.partition(".")[0]: p.place.level for p in inventory.parameters}
    assert levels == {"0": 0, "1": 1, "2": 2}
    assert {p.place.level for p in inventory.parameters if p.name.startswith("2.")} == {2}
    assert names("role(head)", inventory) == {p.name for p in inventory.parameters[-3:]}
