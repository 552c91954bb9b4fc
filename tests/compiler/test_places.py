"""Where layers stand: what they are comes first, their numbers second."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import trainc
from trainc.compiler.constructs.lr.layer_decay import LayerDecay
from trainc.compiler.model.inventory import build_inventory
from trainc.dsl.values.value_json import Number
from trainc.runtime.step.optimizer import OptimizerStep


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 8)


class Wide(nn.Module):
    """A block with lists of layers inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)


class Sparse(nn.Module):
    """A block whose MLP is a list of experts, each of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.choose = nn.LayerNorm(8), nn.Linear(8, 3)
        self.experts = nn.ModuleList(Expert() for _ in range(3))


class Pair(nn.Module):
    """A block that is a list of two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList([Block(), Expert()])


class Stage(nn.Module):
    def __init__(self, depth: int, smaller: bool) -> None:
        super().__init__()
        if smaller:
            self.down = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
        self.blocks = nn.ModuleList(Wide() for _ in range(depth))


def sequence(*layers: tuple[int, int]) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(a, b) for a, b in layers))


class Model(nn.Module):
    def __init__(
        self, body: nn.Module, head: nn.Module, stem: nn.Module, head_first: bool = False
    ) -> None:
        super().__init__()
        if head_first:
            self.head = head
        self.stem, self.body, self.norm = stem, body, nn.LayerNorm(8)
        if not head_first:
            self.out = head


def levels(model: nn.Module) -> dict[str, int]:
    with torch.device("meta"):
        inventory = build_inventory(model)
    return {p.name.removesuffix(".weight"): p.place.level for p in inventory.parameters}


HEADS = [nn.Linear(8, 3), sequence((8, 8), (8, 3)), nn.Sequential(Expert(), nn.Linear(8, 3))]
STEMS = [
    nn.Linear(6, 8),
    sequence((6, 8), (8, 8)),
    nn.Sequential(nn.Sequential(nn.Linear(6, 8)), nn.LayerNorm(8)),
]
BODIES: list[Callable[[], nn.Module]] = [Block, Wide, Sparse, Pair, lambda: nn.Linear(8, 8)]


@pytest.mark.parametrize("block", BODIES)
@pytest.mark.parametrize("stem", STEMS, ids=["layer", "layers", "nested"])
@pytest.mark.parametrize("head", HEADS, ids=["layer", "layers", "block"])
def test_a_stem_and_a_head_of_several_layers_are_one_level_each(
    block: Callable[[], nn.Module], stem: nn.Module, head: nn.Module
) -> None:
    found = levels(Model(nn.ModuleList(block() for _ in range(3)), head, stem))
    assert {v for n, v in found.items() if n.startswith("stem.")} == {0}
    assert {v for n, v in found.items() if n.startswith(("out.", "out", "norm"))} == {4}
    for i in range(3):
        assert {v for n, v in found.items() if f"{n}.".startswith(f"body.{i}.")} == {i + 1}


@pytest.mark.parametrize("head", HEADS, ids=["layer", "layers", "block"])
def test_a_head_is_at_the_end_wherever_it_is_registered(head: nn.Module) -> None:
    body = nn.ModuleList(Block() for _ in range(2))
    found = levels(Model(body, head, nn.Linear(6, 8), head_first=True))
    assert {v for n, v in found.items() if n.startswith("head")} == {3}
    assert (found["stem"], found["body.0.fc"], found["body.1.fc"]) == (0, 1, 2)


def test_blocks_of_stages_count_one_by_one_and_a_change_of_size_goes_with_the_next() -> None:
    stages = nn.ModuleList(Stage(depth, i > 0) for i, depth in enumerate((2, 1, 3)))
    found = levels(Model(stages, nn.Linear(8, 3), nn.Linear(6, 8)))
    at = [found[f"body.{s}.blocks.{b}.norm"] for s, d in enumerate((2, 1, 3)) for b in range(d)]
    assert at == [1, 2, 3, 4, 5, 6]
    assert (found["body.1.down.1"], found["body.2.down.1"]) == (3, 4)
    assert (found["stem"], found["norm"], found["out"]) == (0, 7, 7)


def test_a_backbone_and_a_head_in_a_sequence_are_no_blocks() -> None:
    backbone = Model(nn.ModuleList(Block() for _ in range(2)), nn.Identity(), nn.Linear(6, 8))
    found = levels(nn.Sequential(backbone, sequence((8, 8), (8, 3))))
    assert [found[n] for n in ("0.stem", "0.body.0.fc", "0.body.1.fc", "1.0", "1.1")] == [
        0,
        1,
        2,
        3,
        3,
    ]


def test_a_sequence_of_layers_ends_with_its_head() -> None:
    found = levels(sequence((6, 8), (8, 8), (8, 3)))
    assert [found[str(i)] for i in range(3)] == [0, 1, 2]
    assert build_inventory(sequence((6, 8), (8, 3))).parameter["1.weight"].place.levels == 1


def test_embeddings_of_a_decoder_stand_at_the_input() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layers = nn.Embedding(9, 8), nn.ModuleList(Block() for _ in range(2))
            self.final = nn.LayerNorm(8)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder, self.score = Half(), Half(), nn.Linear(8, 9)

    found = levels(Both())
    assert (found["encoder.embed"], found["decoder.embed"]) == (0, 0)
    blocks = [found[f"{half}.layers.{i}.fc"] for half in ("encoder", "decoder") for i in (0, 1)]
    assert blocks == [1, 2, 3, 4]
    assert (found["encoder.final"], found["decoder.final"], found["score"]) == (2, 5, 5)


@pytest.mark.parametrize("count", [1, 2])
def test_a_stack_of_one_block_has_one_level_whatever_lists_are_in_it(count: int) -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.score = nn.Embedding(9, 8), nn.Linear(8, 9)
            self.block = nn.ModuleList(Pair() for _ in range(count))

    found = levels(Stack())
    within = [{v for n, v in found.items() if n.startswith(f"block.{i}.")} for i in range(count)]
    assert within == [{i + 1} for i in range(count)]
    assert (found["embed"], found["score"]) == (0, count + 1)


class Grouped(Model):
    """A model that says where its layers stand."""

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        blocks = r"^body" if coarse else [(r"^body\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stem", "blocks": blocks}


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_that_groups_its_layers_is_taken_at_its_word(wrapped: bool) -> None:
    inner = Grouped(nn.ModuleList(Block() for _ in range(2)), nn.Linear(8, 8), nn.Linear(6, 8))
    model = nn.Sequential(inner, nn.Linear(8, 3)) if wrapped else inner
    found = {name.removeprefix("0."): level for name, level in levels(model).items()}
    assert [found[n] for n in ("stem", "body.0.fc", "body.1.fc", "norm", "out")] == [0, 1, 2, 2, 3]
    if wrapped:
        assert found["1"] == 3
    with torch.device("meta"):
        places = {p.name: p.place for p in build_inventory(inner).parameters}
    assert (places["body.0.fc.weight"].depth, places["out.weight"].depth) == (0.0, 1.0)


SPEC = "loss cross_entropy optimizer sgd {{ lr = 1 }} lr layer_decay {{ decay = 0.5, levels = {} }}"


def stages() -> nn.Module:
    return Model(nn.ModuleList(Stage(2, i > 0) for i in range(2)), nn.Linear(8, 3), nn.Linear(6, 8))


def factors(levels: str) -> dict[str, float]:
    program = trainc.compile(SPEC.format(levels), stages())
    steps = [a for a in program._machine.actions if isinstance(a, OptimizerStep)]
    return {slot.name: slot.lr_factors[0].factor for step in steps for slot in step.slots}


def test_levels_of_ones_own_are_one_for_each_name_that_a_pattern_matches() -> None:
    found = factors('["stem", "body.*.blocks.*" | "body.*.down", "norm" | "out"]')
    at = ("stem", "body.0.blocks.1.norm", "body.1.down.1", "body.1.blocks.0.norm", "norm", "out")
    assert [found[f"{n}.weight"] for n in at] == [0.5**n for n in (6, 4, 3, 2, 0, 0)]
    assert len(set(found.values())) == 7


@pytest.mark.parametrize(
    ("levels", "message"),
    [('["stem", "body.*", "out"]', r"gives no level to `norm\.weight`"),
     ('["stem", "body.*", "body.1.down", "norm", "out"]', r"two entries of `levels` select `body\.1\.down"),
     ('["stem", "boddy.*", "norm", "out"]', r"matches nothing"), ("[]", "1 or more"), ('"stem"', "expected a list")],
)  # fmt: skip
def test_levels_that_overlap_or_leave_something_out_are_errors(levels: str, message: str) -> None:
    with pytest.raises(trainc.SpecError, match=message):
        factors(levels)


def test_the_plan_shows_levels_and_how_much_each_clause_reaches() -> None:
    spec = (
        'loss cross_entropy optimizer sgd { lr = 1, weight_decay = 0.1 on matrices, freeze = "stem" }'
        ' lr layer_decay on "body.**" { decay = 0.5 }'
    )
    plan = trainc.compile(spec, stages()).plan
    at = {row["name"]: row["level"] for row in plan.parameters}
    assert (at["stem.weight"], at["body.1.blocks.0.norm.weight"], at["out.bias"]) == (0, 3, 5)
    shares = {(row["clause"], row["what"]): row for row in plan.shares}
    trained = shares["sgd", "trains"]
    assert trained["share"] == 1.0
    assert shares["sgd", "weight decay 0.1"]["parameters"] == 10
    assert 0.8 < shares["sgd", "weight decay 0.1"]["share"] < 1
    assert shares["", "frozen"]["entries"] == 56
    assert shares["layer_decay", "lr layer_decay"]["share"] < 1


def test_the_definition_is_by_level() -> None:
    assert LayerDecay(decay=Number(0.5)).reference(0, 7, 0.5) == 0.5**7
