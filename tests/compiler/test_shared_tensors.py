"""A tensor under several names: every selector sees all of its owners."""

import pytest
import torch
from torch import Tensor, nn

import trainc
from trainc.compiler.errors import SiteError
from trainc.compiler.model.inventory import build_inventory
from trainc.compiler.model.select import Target, select
from trainc.dsl.reading.field_types import node_of
from trainc.dsl.reading.selectors import selector
from trainc.dsl.text.errors import SpecError


class Tied(nn.Module):
    """An embedding whose table is the weight of the head as well."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.middle = nn.Embedding(12, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 12, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(torch.tanh(self.middle(self.table(x))))
        return out


class Repeated(nn.Module):
    """A layer that has two names, at both ends of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.between = nn.Linear(6, 6)
        self.classifier = self.first

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.between(self.first(x)))
        return out


def names(text: str, model: nn.Module, target: Target = "parameters") -> tuple[str, ...]:
    return select(selector(node_of(text)), build_inventory(model), target)


@pytest.mark.parametrize(
    "text",
    ['"table.*"', '"out.*"', "type(Embedding)", "type(Linear) & type(Embedding)", "role(embedding)", "role(head)",
     "depth(0..0.1)", "depth(0.9..1)", "all where depth == 1", "all where depth == 0", "matrices"],
)  # fmt: skip
def test_every_simple_selector_finds_a_tied_head_and_a_difference_leaves_it_out(text: str) -> None:
    assert "table.weight" in names(text, Tied())
    assert "table.weight" not in names(f"all - ({text})", Tied())


def test_a_module_is_found_under_each_of_its_names() -> None:
    model = Repeated()
    assert names('"classifier"', model, "modules") == ("first",)
    assert "first" in names("role(head)", model, "modules")
    assert names('"classifier.**"', model) == ("first.weight", "first.bias")
    assert set(names("role(head)", model)) == {"first.weight", "first.bias"}


def test_a_shared_tensor_stands_at_the_owner_nearest_to_the_input() -> None:
    table = build_inventory(Tied()).parameter["out.weight"]
    assert (table.name, table.modules, table.place.level) == ("table.weight", ("table", "out"), 0)
    assert {place.depth for place in table.places} == {0.0, 1.0}


@pytest.mark.parametrize(
    "text",
    ['optimizer sgd { lr = 1, weight_decay = [0.1 on "table.*", 0.2 on "out.*"] }',
     'optimizer sgd { lr = 1, weight_decay = [0.1 on type(Embedding), 0.2 on type(Linear)] }',
     'optimizer sgd as a on type(Embedding) { lr = 1 } optimizer sgd as b on type(Linear) { lr = 2 }'],
)  # fmt: skip
def test_two_entries_that_reach_one_tensor_by_two_names_are_an_error_with_all_names(
    text: str,
) -> None:
    with pytest.raises(SpecError, match="claimed-twice") as raised:
        trainc.compile(f"loss cross_entropy {text}", Tied())
    assert "`table.weight` and `out.weight` are one tensor" in str(raised.value)


SPEC = "loss cross_entropy optimizer adamw { lr = 1e-2 }"
BATCH = torch.arange(10).reshape(2, 5), torch.arange(10).reshape(2, 5)


@pytest.mark.parametrize("steps", [0, 2])
def test_to_untie_a_head_later_is_an_error(steps: int) -> None:
    model = Tied()
    program = trainc.compile(SPEC, model)
    for _ in range(steps):
        program.step(BATCH)
    model.out.weight = nn.Parameter(model.table.weight.detach().clone())
    with pytest.raises(SiteError, match=r"`out\.weight`"):
        program.step(BATCH)


@pytest.mark.parametrize("steps", [0, 2])
def test_to_tie_a_head_later_is_an_error(steps: int) -> None:
    model = Tied()
    model.out.weight = nn.Parameter(model.table.weight.detach().clone())
    program = trainc.compile(SPEC, model)
    for _ in range(steps):
        program.step(BATCH)
    model.out.weight = model.table.weight
    with pytest.raises(SiteError, match=r"`out\.weight`"):
        program.step(BATCH)
