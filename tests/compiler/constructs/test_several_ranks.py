"""Adapters of low rank whose layers have several ranks: clauses of their own here, patterns of names in peft."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainc
from examples.models import gpt
from tests.compiler.constructs.test_lora import (
    BATCH,
    IDS,
    gpt2,
    language_model,
    logits,
    spec,
    trained,
    with_peft,
)
from trainc.compiler.model.inventory import build_inventory
from trainc.compiler.structure.roles import ADAPTER


class Nested(nn.Module):
    """A layer whose name is the end of another's, from ids to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 16)
        self.inner = nn.ModuleDict({"fc": nn.Linear(16, 16)})
        self.fc = nn.Linear(16, 24)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.fc(self.inner["fc"](self.embed(ids)).tanh())
        return found


def nested() -> nn.Module:
    torch.manual_seed(0)
    return Nested().double()


CASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "two ranks": (
        language_model,
        (
            'lora on "**.fc" { rank = 3, alpha = 5 }'
            ' lora as wide on "**.qkv" { rank = 6, alpha = 5, train = "head" }'
            ' lora as strong on "blocks.1.**.proj" { rank = 3, alpha = 9 }'
        ),
    ),
    "rslora": (
        gpt2,
        (
            'lora on "**.c_attn" { rank = 2, alpha = 5, scale = rslora, parts = [q, v] }'
            ' lora as wide on "**.c_fc" { rank = 5, alpha = 5, scale = rslora }'
        ),
    ),
    "the end of another's name": (
        nested,
        'lora on "fc" { rank = 3, alpha = 5 } lora as wide on "inner.fc" { rank = 2, alpha = 6 }',
    ),
    "rows": (
        language_model,
        'dora on "**.fc" { rank = 3, alpha = 5 } dora as wide on "**.qkv" { rank = 6, alpha = 5 }',
    ),
}


def clauses(text: str) -> str:
    """Return clauses of `adapt`, of what stands behind the word."""
    for name in ("lora", "dora"):
        text = text.replace(f"{name} on", f"adapt {name} on").replace(
            f"{name} as", f"adapt {name} as"
        )
    return text


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(("make", "text"), CASES.values(), ids=CASES)
def test_several_ranks_are_one_folder_of_peft(
    make: Callable[[], nn.Module], text: str, tmp_path: Path
) -> None:
    program = trained(clauses(text), make())
    program.save_adapters(tmp_path / "mine")
    theirs, mine = with_peft(make(), tmp_path / "mine"), program.module
    torch.testing.assert_close(logits(theirs), logits(mine), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(logits(mine), logits(make()), rtol=1e-4)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad and not ("parts" in text and "lora_B" in name):
                parameter.add_(torch.arange(parameter.numel()).view_as(parameter).sin() * 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    program.load_adapters(tmp_path / "theirs")
    torch.testing.assert_close(logits(theirs), logits(mine), rtol=1e-12, atol=1e-12)
    again = trainc.compile(spec(clauses(text)), make())
    again.load_adapters(tmp_path / "theirs")
    assert torch.equal(logits(again.module), logits(mine))
    merged = program.merge()
    torch.testing.assert_close(logits(theirs), logits(merged), rtol=1e-12, atol=1e-12)


def saved(text: str, folder: Path, make: Callable[[], nn.Module] = nested) -> dict[str, Any]:
    trained(clauses(text), make()).save_adapters(folder)
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def test_patterns_are_names_but_where_a_name_is_the_end_of_another(tmp_path: Path) -> None:
    one, two = 'on "fc" { rank = 3, alpha = 5 }', 'on "inner.fc" { rank = 2, alpha = 6 }'
    found = saved(
        f"lora {one} lora as wide {two}", tmp_path
    )  # the first clause gives what holds for all
    assert (found["r"], found["lora_alpha"]) == (3, 5)
    assert (found["rank_pattern"], found["alpha_pattern"]) == ({"inner.fc": 2}, {"inner.fc": 6})
    found = saved(f"lora {two} lora as wide {one}", tmp_path)
    assert (found["r"], found["lora_alpha"]) == (2, 6)
    assert (found["rank_pattern"], found["alpha_pattern"]) == ({"^fc": 3}, {"^fc": 5})
    found = saved(
        'lora on "blocks.0.**.fc" { rank = 3, alpha = 6 } lora as b on "blocks.1.**.fc" { alpha = 6 }',
        tmp_path,
        language_model,
    )
    assert (found["r"], found["lora_alpha"]) == (3, 6)
    assert (found["rank_pattern"], found["alpha_pattern"]) == ({"blocks.1.mlp.fc": 8}, {})


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"rank_pattern": {"inner.fc": 4}}, r"`r` = 4 for `inner\.fc`, but this program has 2"),
        ({"rank_pattern": {"fc": 3}}, r"`r` = 3 for `inner\.fc`, but this program has 2"),
        ({"alpha_pattern": {"in.*": 7}}, r"`lora_alpha` = 7 for `inner\.fc`.* rank and alpha that give `r` = 2, "),
        ({"rank_pattern": {}}, "a clause of their own for layers with others"),
        ({"rank_pattern": {"(": 4}}, "`rank_pattern` in .* is no table of patterns"),
        ({"rank_pattern": [4]}, "`rank_pattern` in .* is no table of patterns"),
    ],
)  # fmt: skip
def test_another_rank_of_one_layer_is_refused_before_any_is_loaded(
    patterns: dict[str, Any], message: str, tmp_path: Path
) -> None:
    text = CASES["the end of another's name"][1]
    config = saved(text, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | patterns))
    program = trained(clauses(text), nested(), 1)
    before = logits(program.module)
    with pytest.raises(ValueError, match=message):
        program.load_adapters(tmp_path)
    assert torch.equal(logits(program.module), before)


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ('adapt lora as wide on "**.qkv" { rank = 6, alpha = 5, dropout = 0.5 }', "dropout"),
        ('adapt lora as wide on "**.qkv" { rank = 6, alpha = 5, bias = adapted }', "biases"),
        ('adapt lora as wide on "**.qkv" { rank = 6, alpha = 5, scale = rslora }', "scale"),
        ('adapt dora as wide on "**.qkv" { rank = 6, alpha = 5 }', "lengths of rows"),
    ],
)
def test_what_peft_knows_of_all_layers_alone_needs_a_folder_of_its_own(
    other: str, why: str, tmp_path: Path
) -> None:
    text = 'adapt lora on "**.fc" { rank = 3, alpha = 5 }\n' + other
    program = trained(text, language_model())
    program.save_adapters(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lora", "wide"], why
    again = trainc.compile(spec(text), language_model())
    again.load_adapters(tmp_path)
    assert torch.equal(logits(again.module.eval()), logits(program.module.eval()))


def test_a_folder_of_several_clauses_has_the_name_of_the_first(tmp_path: Path) -> None:
    text = (
        'adapt lora as one on "head" { rank = 2, alpha = 3 } adapt lora as two on "**.fc" { alpha = 3 }'
        ' adapt parallel on "**.mlp" { rank = 2 }'
    )
    trained(text, language_model()).save_adapters(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "parallel"]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_model_of_peft_with_patterns_trains_as_it_is(tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft", reason="peft is not installed")

    def make() -> Any:
        torch.manual_seed(1)
        return peft.get_peft_model(
            language_model(),
            peft.LoraConfig(
                r=2, lora_alpha=4, target_modules=["fc", "qkv"], rank_pattern={"blocks.1.*.fc": 5},
                alpha_pattern={"^blocks.0.attn.qkv": 16}, init_lora_weights=False,
            ),
        )  # fmt: skip

    program, by_hand = trained("", make(), 0), make()
    for entry in build_inventory(program.module).modules:
        adapted = entry.name.endswith((".fc", ".qkv"))
        assert (ADAPTER in entry.roles) == adapted, entry.name
    trains = [p for p in by_hand.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trains, 0.1)
    for _ in range(3):
        program.step(BATCH)
        out = logits(by_hand, IDS)
        nn.functional.cross_entropy(out.flatten(0, 1), BATCH[1].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(logits(program.module), logits(by_hand))
    module: Any = program.module
    module.save_pretrained(tmp_path)
    ours = trainc.compile(
        spec(
            'adapt lora on "blocks.0.**.fc" | "blocks.1.**.qkv" { rank = 2, alpha = 4 }'
            'adapt lora as wide on "blocks.1.**.fc" { rank = 5, alpha = 4 }'
            'adapt lora as strong on "blocks.0.**.qkv" { rank = 2, alpha = 16 }'
        ),
        language_model(),
    )
    ours.load_adapters(tmp_path)
    torch.testing.assert_close(logits(ours.module), logits(by_hand), rtol=1e-12, atol=1e-12)


# a rank above what a weight can have


def warnings_of(clause: str, model: nn.Module) -> list[tuple[str, str]]:
    """Return the messages of warnings about a field without effect, and what they point at."""
    found = trainc.plan(spec(clause), model).warnings
    return [
        (one.message, one.labels[0].span.source.text[slice(one.labels[0].span.start, one.labels[0].span.end)])
        for one in found
        if one.rule == "no-effect"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("clause", "most"),
    [
        ('adapt lora on "**.fc" { rank = N, alpha = 4 }', 16),
        ('adapt dora on "**.qkv" { rank = N, alpha = 4 }', 16),
        ('adapt lora on "**.qkv" { rank = N, alpha = 4, parts = [q, v] }', 16),
        ('adapt lora on "embed.position" { rank = N, alpha = 4 }', 8),
        ("adapt lora on type(Embedding, Linear) { rank = N, alpha = 4 }", 8),
        ('adapt lora_mul on "**.fc" { rank = N }', 16),
        ('adapt apt on "**.attn" { tokens = 5, rank = N }', 5),
    ],
)
def test_a_rank_above_what_there_is_has_no_effect(clause: str, most: int) -> None:
    ((message, at),) = warnings_of(clause.replace("N", str(most + 1)), language_model())
    assert f"above {most}" in message
    assert at == str(most + 1)
    assert warnings_of(clause.replace("N", str(most)), language_model()) == []


def test_the_largest_rank_reaches_any_update() -> None:
    """What the warning says: a product of rank min(out, in) is any matrix."""
    model = nn.Sequential(nn.Embedding(24, 3), nn.Linear(3, 24)).double()
    program = trained('adapt lora on "1" { rank = 3, alpha = 3 }', model, 0)
    layer: Any = program.module.get_submodule("1")
    wanted = torch.randn(24, 3, dtype=torch.float64)
    with torch.no_grad():
        layer.lora.a.weight.copy_(torch.eye(3))
        layer.lora.b.weight.copy_(wanted)
    torch.testing.assert_close(layer.lora.rule.weight_change(layer, layer.lora), wanted)


def test_a_convolution_in_one_channel_has_the_rank_of_its_window() -> None:
    model = nn.Sequential(nn.Conv1d(1, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    ((message, at),) = warnings_of('adapt lora on "0" { rank = 4, alpha = 4 }', model)
    assert ("above 3 give `0`" in message, at) == (True, "4")


def test_settings_of_another_start_are_said() -> None:
    clause = "adapt lora on type(Embedding) { rank = 2, alpha = 4, init = gaussian }"
    ((message, at),) = warnings_of(clause, language_model())
    assert ("`init` is of A" in message, at) == (True, "gaussian")
    assert warnings_of(clause.replace("Embedding", "Embedding, Linear"), language_model()) == []
    with pytest.raises(trainc.SpecError, match="`fan` is the width of a uniform start"):
        trainc.plan(spec('adapt prompt on "blocks.*" { tokens = 2, fan = 9 }'), language_model())


# parameters with several names


def tied() -> nn.Module:
    torch.manual_seed(0)
    return gpt(layers=1, width=16, heads=2, context=8, vocabulary=24, tied=True).double()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", ["head", "embed.token"])
def test_a_trained_head_that_is_tied_is_in_both_places_in_peft(name: str, tmp_path: Path) -> None:
    text = f'adapt lora on "**.fc" {{ rank = 2, alpha = 2, train = "{name}" }}'
    program = trained(text, tied())
    program.save_adapters(tmp_path / "mine")
    theirs = with_peft(tied(), tmp_path / "mine")
    assert not torch.equal(logits(program.module), logits(tied()))
    assert torch.equal(logits(theirs), logits(program.module))
    again = trainc.compile(spec(text), tied())
    theirs.save_pretrained(tmp_path / "theirs")
    again.load_adapters(tmp_path / "theirs")
    assert torch.equal(logits(again.module), logits(program.module))
    one, two = (again.module.get_submodule(n).weight for n in ("head", "embed.token"))
    assert one is two
    with torch.no_grad():
        theirs.base_model.model.head.modules_to_save["default"].weight.add_(1)
    theirs.save_pretrained(tmp_path / "apart")
    before = logits(again.module)
    with pytest.raises(ValueError, match=r"differ in .*, but are one parameter"):
        again.load_adapters(tmp_path / "apart")
    assert torch.equal(logits(again.module), before)


def test_prompts_beside_trained_token_embeddings_have_no_place_in_peft(tmp_path: Path) -> None:
    text = 'adapt prompt on "transformer" { tokens = 2, mode = input, train = "lm_head" }'
    program = trained(text, gpt2(16))
    with pytest.raises(ValueError, match="token embeddings that train beside prompts"):
        program.save_adapters(tmp_path)
