"""`adapt lora`: by hand, against peft, and merged again."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainc
from examples.models import gpt
from trainc.compiler.constructs.adapt.lora import Lora
from trainc.compiler.model.adapters import adapters_of
from trainc.compiler.program.program import Program

BASE = "loss cross_entropy run { length = 10 steps, seed = 3 } optimizer sgd { lr = 0.1 }\n"
IDS = torch.randint(0, 24, (4, 8), generator=torch.Generator().manual_seed(1))
BATCH = (IDS, IDS.roll(-1, 1))


def language_model() -> nn.Module:
    torch.manual_seed(0)
    return gpt(layers=2, width=16, heads=2, context=8, vocabulary=24).double()


def gpt2(positions: int = 8) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=24, n_embd=16, n_layer=2, n_head=2, n_positions=positions, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model: nn.Module = transformers.GPT2LMHeadModel(config).double()
    return model


class Mixed(nn.Module):
    """An embedding, convolutions and a linear layer, from ids to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 16, padding_idx=0)
        self.conv = nn.Conv1d(16, 12, 3, padding=1)
        self.image = nn.Conv2d(1, 2, 3, stride=(2, 1), padding=1)
        self.out = nn.Linear(12, 24)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.embed(ids).transpose(1, 2)).tanh()
        found: Tensor = self.out(self.image(x.unsqueeze(1)).flatten(1, 2).transpose(1, 2))
        return found


def mixed() -> nn.Module:
    torch.manual_seed(0)
    return Mixed().double()


class ScaledEmbedding(nn.Embedding):
    """Multiplies what it looks up, as Gemma's."""

    embed_scale: Tensor

    def __init__(self, count: int, width: int) -> None:
        super().__init__(count, width)
        self.register_buffer("embed_scale", torch.tensor(width**0.5), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


def scaled() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(ScaledEmbedding(24, 16), nn.Tanh(), nn.Linear(16, 24)).double()


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    found = model(ids)
    result: Tensor = getattr(found, "logits", found)
    return result


def spec(clause: str) -> str:
    return BASE + clause


def trained(clause: str, model: nn.Module, steps: int = 3, executor: Any = "auto") -> Program:
    program = trainc.compile(spec(clause), model, executor=executor)
    for _ in range(steps):
        program.step(BATCH)
    return program


def pairs_of(program: Program, layer: str) -> dict[str, tuple[Tensor, Tensor]]:
    (one,) = [one for one in adapters_of(program.module) if one.layer_name == layer]
    rule: Any = one.adapter.rule
    return {
        part: (pair.a.weight.detach(), pair.b.weight.detach())
        for part, pair in rule.pairs(one.adapter).items()
    }


SETTINGS = {
    "plain": "rank = 3, alpha = 6",
    "rslora": "rank = 3, alpha = 6, scale = rslora",
    "parts": "rank = 2, alpha = 5, parts = [v, q]",
}


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compare the outputs of adapted layers, after training, with loops over the entries of W, A and B."""
    compiled, reference = {}, {}
    x = torch.linspace(-1, 1, 48, dtype=torch.float64).view(3, 16)
    for name, setting in SETTINGS.items():
        program = trained(f'adapt lora on "**.qkv" {{ {setting} }}', language_model())
        layer: Any = program.module.get_submodule("blocks.1.attn.qkv")
        rule: Any = layer.lora.rule
        with torch.no_grad():
            compiled[name] = layer(x)
        pairs = pairs_of(program, "blocks.1.attn.qkv")
        assert all(b.any() for _, b in pairs.values())
        reference[name] = rule.reference(x, layer.weight.detach(), layer.bias.detach(), pairs)
    return compiled, reference


@pytest.mark.parametrize("executor", ["graph", "module"])
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_a_step_is_that_of_the_weights_written_out(setting: str, executor: Any) -> None:
    program = trained(f'adapt lora on "**.qkv" {{ {setting} }}', language_model(), 1, executor)
    before = {n: p.detach().clone() for n, p in program.module.named_parameters()}
    by_hand = language_model()
    leaves: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = dict(by_hand.named_parameters())
    rule = Lora.model_validate({"rank": 1, "alpha": 1.0})
    for one in adapters_of(program.module):
        rule = one.adapter.rule  # type: ignore[assignment]
        layer = one.layer_name
        blocks = []
        for part in ("",) if rule.parts is None else ("q", "k", "v"):
            if part and part not in (rule.parts or ()):
                blocks.append(torch.zeros(16, 16, dtype=torch.float64))
                continue
            names = [f"{layer}.lora.{part + '.' if part else ''}{letter}.weight" for letter in "ab"]
            a, b = (before[name].clone().requires_grad_() for name in names)
            leaves |= dict(zip(names, (a, b), strict=True))
            blocks.append(b @ a)
        factor = rule.alpha / (math.sqrt(rule.rank) if rule.scale == "rslora" else rule.rank)
        weights[f"{layer}.weight"] = weights[f"{layer}.weight"].detach() + factor * torch.cat(
            blocks
        )
    out = torch.func.functional_call(by_hand, weights, (IDS,))
    loss = nn.functional.cross_entropy(out.flatten(0, 1), BATCH[1].flatten())
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    assert program.step(BATCH)["loss"] == pytest.approx(float(loss.detach()), rel=1e-12)
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        got = program.module.get_parameter(name).detach()
        torch.testing.assert_close(got, leaf.detach() - 0.1 * gradient, rtol=1e-12, atol=1e-14)
    for name, parameter in language_model().named_parameters():
        assert torch.equal(program.module.get_parameter(name), parameter), name


def test_it_starts_as_the_model_and_takes_no_random_number() -> None:
    model = language_model()
    want, state = logits(model).detach(), torch.get_rng_state()
    program = trainc.compile(spec('adapt lora on "blocks.**" & type(Linear) { alpha = 16 }'), model)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(program.module), want)


@pytest.mark.parametrize(("init", "most"), [("kaiming", 1 / 4), ("gaussian", 5 / 8)])
def test_initial_values_depend_on_seed_and_name_alone(init: str, most: float) -> None:
    clause = f'adapt lora on "blocks.**" & type(Linear) {{ alpha = 16, init = {init} }}'
    one = trainc.compile(spec(clause), language_model()).module
    torch.manual_seed(99)
    two = trainc.compile(spec(clause), language_model()).module
    other = trainc.compile(spec(clause).replace("seed = 3", "seed = 4"), language_model()).module
    fewer = trainc.compile(
        spec(clause.replace("blocks.**", "blocks.1.**")), language_model()
    ).module
    name = "blocks.1.attn.qkv.lora.a.weight"
    a = one.get_parameter(name)
    assert torch.equal(a, two.get_parameter(name))
    assert torch.equal(a, fewer.get_parameter(name))
    assert not torch.equal(a, other.get_parameter(name))
    assert not torch.equal(a, one.get_parameter("blocks.0.attn.qkv.lora.a.weight"))
    assert float(a.detach().abs().max()) <= most
    deviation = 1 / 8 if init == "gaussian" else 1 / math.sqrt(3 * 16)
    assert float(a.detach().std()) == pytest.approx(deviation, rel=0.2)
    assert not one.get_parameter("blocks.1.attn.qkv.lora.b.weight").any()


@pytest.mark.parametrize(
    ("fields", "trained_too"),
    [
        ("", set()),
        (', train = "head" | "ln_f"', {"head.weight", "ln_f.weight", "ln_f.bias"}),
        (", bias = adapted", {"blocks.0.attn.qkv.bias", "blocks.1.attn.qkv.bias"}),
        (", bias = all", {n for n, _ in language_model().named_parameters() if n.endswith("bias")}),
    ],
)
def test_only_adapters_train_and_what_the_clause_says(fields: str, trained_too: set[str]) -> None:
    clause = f'adapt lora on "**.qkv" {{ rank = 2, alpha = 4{fields} }}'
    program = trained(clause, language_model())
    changed = {
        name
        for name, parameter in language_model().named_parameters()
        if not torch.equal(program.module.get_parameter(name), parameter)
    }
    assert changed == trained_too


def test_dropout_is_on_the_inputs_of_a_in_training_alone() -> None:
    clause = 'adapt lora on "**.qkv" { rank = 2, alpha = 4, dropout = 0.5 }'
    program = trained(clause, language_model())
    layer: Any = program.module.get_submodule("blocks.0.attn.qkv")
    x = torch.ones(5, 16, dtype=torch.float64)
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    torch.manual_seed(7)
    got = layer(x)
    torch.manual_seed(7)
    update = layer.lora.b(layer.lora.a(nn.functional.dropout(x, 0.5))) * 2.0
    torch.testing.assert_close(got, plain + update, rtol=1e-12, atol=1e-14)
    program.module.eval()
    assert torch.equal(layer(x), layer(x))


def test_dropout_by_graph_is_that_of_the_modules() -> None:
    clause = 'adapt lora on "**.qkv" { rank = 2, alpha = 4, dropout = 0.5 }'
    measured = clause + ' noise_scale gns on "**.lora.b" { smooth = 2 steps }'
    losses = []
    for executor in ("graph", "module"):
        program = trainc.compile(spec(measured), language_model(), executor=executor)
        torch.manual_seed(3)
        program.step(BATCH)
        torch.manual_seed(4)
        losses.append([program.step(BATCH)["loss"], program.step(BATCH)["loss"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_half_precision_keeps_adapters_in_float32() -> None:
    model = language_model().bfloat16()
    program = trained('adapt lora on "**.qkv" { rank = 2, alpha = 4 }', model)
    assert program.module.get_parameter("blocks.0.attn.qkv.lora.a.weight").dtype == torch.float32
    assert logits(program.module).dtype == torch.bfloat16
    before = logits(program.module).detach()
    torch.testing.assert_close(logits(program.merge()), before, rtol=0.05, atol=0.01)


# merged


CASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "linear": (language_model, 'on "blocks.**" & type(Linear) { rank = 3, alpha = 5 }'),
    "fused": (language_model, 'on "**.qkv" { rank = 2, alpha = 5, parts = [q, v] }'),
    "rslora": (
        language_model,
        'on "**.fc" { rank = 2, alpha = 5, scale = rslora, train = "head" }',
    ),
    "biases": (language_model, 'on "**.fc" { rank = 2, alpha = 5, bias = all }'),
    "mixed": (mixed, "on type(Embedding, Conv1d, Conv2d, Linear) { rank = 2, alpha = 5 }"),
    "xavier": (
        mixed,
        "on type(Conv2d, Linear) { rank = 2, alpha = 2, init = xavier, bias = update }",
    ),
    "scaled": (scaled, "on type(Embedding, Linear) { rank = 3, alpha = 5 }"),
    "conv1d": (gpt2, "on type(Conv1D) { rank = 3, alpha = 5 }"),
    "fused conv1d": (
        gpt2,
        'on "**.c_attn" { rank = 2, alpha = 5, parts = [v, q], scale = rslora, bias = adapted }',
    ),
}
each_case = pytest.mark.parametrize(("make", "clause"), CASES.values(), ids=CASES)


@each_case
def test_merging_gives_the_users_model_back(
    make: Callable[[], nn.Module], clause: str, tmp_path: Path
) -> None:
    program = trained(f"adapt lora {clause}", make())
    before = logits(program.module).detach()
    base = make()
    assert not torch.equal(before, logits(base))
    merged = program.merge()
    assert merged is program.module
    torch.testing.assert_close(logits(merged), before, rtol=1e-12, atol=1e-12)
    assert list(merged.state_dict()) == list(base.state_dict())
    assert [type(m) for m in merged.modules()] == [type(m) for m in base.modules()]
    assert not any(m._forward_hooks or m._forward_hooks_with_kwargs for m in merged.modules())
    for mine, theirs in zip(merged.parameters(), base.parameters(), strict=True):
        assert mine.requires_grad == theirs.requires_grad
    folder = tmp_path / "saved"
    for act in (
        program.merge,
        program.state_dict,
        partial(program.step, BATCH),
        partial(program.save, folder),
    ):
        with pytest.raises(RuntimeError, match="compile a spec again"):
            act()
    assert not folder.exists()
    trainc.compile(BASE, merged).step(BATCH)


@pytest.mark.parametrize("late", [False, True])
def test_a_hook_of_the_user_gets_the_output_with_the_update(late: bool) -> None:
    """So that merging changes nothing, whether the hook was there before the adapter or not."""
    module = language_model().double()
    calls: list[Any] = []

    def squash(_: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.tanh() * 2

    def add() -> None:
        module.get_submodule("blocks.0.mlp.fc").register_forward_hook(squash)
        module.get_submodule("blocks.0.mlp.fc").register_forward_hook(lambda *_: calls.append(1))

    clause = 'adapt lora on "**.mlp.**" & type(Linear) { rank = 2, alpha = 4 }'
    if late:
        program = trainc.compile(spec(clause), module)
        add()
    else:
        add()
        program = trainc.compile(spec(clause), module)
    for _ in range(3):
        program.step(BATCH)
    before = logits(module).detach()
    torch.testing.assert_close(logits(program.merge()), before, rtol=1e-12, atol=1e-12)
    assert calls


def test_a_layer_of_whole_numbers_has_no_adapter() -> None:
    module = nn.Sequential(nn.Embedding(24, 6), nn.Linear(6, 24))
    module[1].weight = nn.Parameter(torch.ones(24, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(trainc.SpecError, match=r"`1` cannot have an adapter: .* of floating-point"):
        trainc.compile(spec("adapt lora on type(Linear) { rank = 2, alpha = 4 }"), module)


def test_a_shared_weight_is_not_merged() -> None:
    torch.manual_seed(0)
    model = gpt(layers=1, width=16, heads=2, context=8, vocabulary=24, tied=True).double()
    program = trained('adapt lora on "head" | "**.fc" { rank = 2, alpha = 4 }', model)
    before = copy.deepcopy(program.module.state_dict())
    with pytest.raises(ValueError, match=r"`head.lora` cannot be merged.*`embed.token.weight`"):
        program.merge()
    assert all(torch.equal(v, before[n]) for n, v in program.module.state_dict().items())
    program.step(BATCH)


# peft


def with_peft(base: nn.Module, folder: Path) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    return peft.PeftModel.from_pretrained(base, folder, is_trainable=True)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape")  # peft's own biases
@each_case
def test_peft_reads_it_computes_the_same_and_is_read_back(
    make: Callable[[], nn.Module], clause: str, tmp_path: Path
) -> None:
    program = trained(f"adapt lora {clause}", make())
    program.save_adapters(tmp_path / "mine")
    theirs = with_peft(make(), tmp_path / "mine")
    fused = "parts" in clause  # of another form there: one matrix with zeros
    mine = program.module

    def compare() -> None:
        for model in (mine, theirs):
            model.zero_grad()
            logits(model).square().sum().backward()
        torch.testing.assert_close(logits(mine), logits(theirs), rtol=1e-12, atol=1e-12)
        if not fused:
            assert torch.equal(logits(mine), logits(theirs))
            got = {n: p.grad for n, p in mine.named_parameters() if p.requires_grad}
            want = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
            assert len(got) == len(want)
            for (name, a), b in zip(got.items(), want.values(), strict=True):
                assert a is not None
                assert b is not None
                assert torch.equal(a, b if a.shape == b.shape else b.T), name

    compare()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad and not (fused and "lora_B" in name):
                parameter.add_(torch.arange(parameter.numel()).view_as(parameter).sin() * 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    before = logits(mine).detach()
    program.load_adapters(tmp_path / "theirs")
    assert not torch.equal(logits(mine), before)
    compare()
    again = trainc.compile(spec(f"adapt lora {clause}"), make())
    again.load_adapters(tmp_path / "theirs")
    assert torch.equal(logits(again.module), logits(mine))


def test_peft_finds_a_layer_whose_name_is_the_end_of_another(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        inner = nn.ModuleDict({"fc": nn.Linear(4, 4)})

        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner, self.fc = inner, nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                found: Tensor = self.fc(self.inner["fc"](x))
                return found

        return Two().double()

    x = torch.ones(3, 4, dtype=torch.float64)
    program = trainc.compile(
        'loss mse optimizer sgd { lr = 0.1 } adapt lora on "fc" { rank = 2, alpha = 4 }', make()
    )
    program.step((x, x))
    program.save_adapters(tmp_path)
    theirs = with_peft(make(), tmp_path)
    assert sum("lora_A" in name for name, _ in theirs.named_parameters()) == 1
    assert torch.equal(theirs(x), program.module(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 4}, r"`r` = 4 for `blocks\.0\.attn\.qkv`, but this program has 2"),
        ({"lora_alpha": 8}, "`lora_alpha` = 8 for .*, but this program has 4"),
        ({"use_rslora": True}, "`use_rslora` = True"),
        ({"use_dora": True}, "`use_dora` = True.*`adapt dora` trains lengths"),
        ({"lora_bias": True}, "`lora_bias` = True.*`bias = update`"),
        ({"layer_replication": [[0, 1]]}, "uses peft's `layer_replication`"),
        ({"alora_invocation_tokens": [3]}, "uses peft's `alora_invocation_tokens`"),
        ({"init_lora_weights": "pissa"}, "pissa, which changes the model"),
        ({"init_lora_weights": "olora"}, "olora, which changes the model"),
        ({"peft_type": "IA3"}, "an adapter of the type IA3"),
    ],
)
def test_another_adapter_of_peft_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    program = trained('adapt lora on "**.qkv" { rank = 2, alpha = 4 }', language_model())
    program.save_adapters(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        program.load_adapters(tmp_path)


def test_adapters_of_other_layers_are_refused_before_any_is_loaded(tmp_path: Path) -> None:
    trained('adapt lora on "**.qkv" { rank = 2, alpha = 4 }', language_model()).save_adapters(
        tmp_path
    )
    fewer = trained('adapt lora on "blocks.0.**.qkv" { rank = 2, alpha = 4 }', language_model(), 1)
    more = trained('adapt lora on "**.qkv" | "**.fc" { rank = 2, alpha = 4 }', language_model(), 1)
    for program, message in ((fewer, "which this program does not"), (more, "has no `base_model")):
        before = copy.deepcopy(program.module.state_dict())
        with pytest.raises(ValueError, match=message):
            program.load_adapters(tmp_path)
        assert all(torch.equal(v, before[n]) for n, v in program.module.state_dict().items())


def test_an_adapter_of_all_outputs_does_not_fit_parts(tmp_path: Path) -> None:
    trained('adapt lora on "**.qkv" { rank = 4, alpha = 8 }', language_model()).save_adapters(
        tmp_path
    )
    parts = trainc.compile(
        spec('adapt lora on "**.qkv" { rank = 2, alpha = 4, parts = [q, v] }'), language_model()
    )
    with pytest.raises(ValueError, match="outside of `parts`"):
        parts.load_adapters(tmp_path)


def test_what_peft_cannot_hold_is_said(tmp_path: Path) -> None:
    program = trained(
        'adapt lora on "**.qkv" { rank = 2, alpha = 4, train = "**.qkv" }', language_model()
    )
    with pytest.raises(ValueError, match=r"peft has no place for `blocks\.0\.attn.qkv.bias`"):
        program.save_adapters(tmp_path)


# refused


class Positions(nn.Embedding):
    """Looks up places of the ids that it is given, as those of BART and OPT."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(torch.arange(ids.shape[1]))


def test_a_weight_that_is_computed_from_others_is_refused() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(trainc.SpecError, match="its weight is computed of"):
        trainc.compile(
            "loss mse optimizer sgd { lr = 0.1 } adapt lora on type(Linear) { alpha = 4 }", model
        )


@pytest.mark.parametrize(
    ("clause", "message"),
    [
        ("adapt lora on type(LayerNorm) { alpha = 4 }", "it is no nn.Linear"),
        ('adapt lora on "head" { alpha = 4, parts = [q] }', "has 16 outputs, which are not"),
        ("adapt lora on type(Linear) { alpha = 4, parts = [q, q] }", "twice"),
        ("adapt lora on type(Linear) { alpha = 4, parts = [] }", "at least one part"),
        ("adapt lora on type(Linear) { rank = 0, alpha = 4 }", "rank"),
        ("adapt lora on type(Linear) { alpha = -1 }", "alpha"),
        ("adapt lora on type(Linear) { alpha = 4, dropout = 1 }", "dropout"),
        ("adapt lora on type(Linear) { rank = 4 }", "alpha"),
    ],
)
def test_bad_input_is_an_error_at_its_place(clause: str, message: str) -> None:
    torch.manual_seed(0)
    model = gpt(layers=1, width=16, heads=2, context=8, vocabulary=16)
    with pytest.raises(trainc.SpecError) as raised:
        trainc.compile(BASE + clause, model)
    (first, *_) = raised.value.diagnostics
    assert message in str(first)
    assert first.labels
    assert ":2:" in str(first.labels[0].span)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("layer", "clause", "message"),
    [
        (nn.Conv1d(8, 8, 3, groups=2), "alpha = 4", "a convolution in 2 groups"),
        (nn.Embedding(24, 8, max_norm=1.0), "alpha = 4", "an embedding with `max_norm`"),
        (nn.Embedding(24, 8), "alpha = 4, dropout = 0.1", "inputs are ids"),
        (
            Positions(24, 8),
            "alpha = 4",
            r"class, Positions, has a `forward` of its own.*type\(Positions\)",
        ),
        (nn.Linear(8, 8, bias=False), "alpha = 4, bias = update", "has no bias, into which"),
        (nn.Conv1d(8, 9, 3), "alpha = 4, parts = [q]", "is no linear layer"),
        (nn.ConvTranspose1d(8, 8, 3), "alpha = 4", "it is no nn.Linear, no nn.Conv1d"),
        (nn.EmbeddingBag(24, 8), "alpha = 4", "it is no nn.Linear, no nn.Conv1d"),
    ],
)
def test_a_layer_that_it_cannot_wrap_is_an_error_at_its_place(
    layer: nn.Module, clause: str, message: str
) -> None:
    with pytest.raises(trainc.SpecError, match=message) as raised:
        trainc.compile(BASE + f'adapt lora on "0" {{ {clause} }}', nn.Sequential(layer))
    assert ":2:" in str(raised.value.diagnostics[0].labels[0].span)


@pytest.mark.parametrize("form", [{"dilation": 2}, {"padding_mode": "circular"}])
def test_a_convolution_that_peft_has_no_place_for_merges_all_the_same(
    form: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 3, padding=2, **form), nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(5, 3, 6, dtype=torch.float64)
    model.double()(x)
    program = trainc.compile(
        'loss mse optimizer sgd { lr = 0.1 } adapt lora on "0" { alpha = 4 }', model
    )
    for _ in range(2):
        program.step((x, torch.ones(5, 2, dtype=torch.float64)))
    with pytest.raises(ValueError, match="peft has no place for the adapter of `0`"):
        program.save_adapters(tmp_path)
    before = model(x).detach()
    assert model.get_parameter("0.lora.b.weight").any()
    torch.testing.assert_close(program.merge()(x), before, rtol=1e-12, atol=1e-12)


def test_biases_that_are_not_there_are_warned_of() -> None:
    (warning,) = trainc.plan(
        spec('adapt lora on "head" { alpha = 4, bias = adapted }'), language_model()
    ).warnings
    assert warning.rule == "no-effect"
    assert "no selected layer has a bias" in warning.message


def test_a_projection_that_is_never_called_is_refused() -> None:
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1, enable_nested_tensor=False
    )
    text = "loss mse optimizer sgd { lr = 0.1 } adapt lora on type(Linear) { alpha = 4 }"
    with pytest.raises(trainc.SpecError, match="never calls the layer"):
        trainc.compile(text, model)
    mine = text.replace("type(Linear)", "type(Linear) - type(NonDynamicallyQuantizableLinear)")
    program = trainc.compile(mine, model)
    x = torch.randn(2, 3, 16)
    program.step((x, x.clone()))
    model.eval()
    with (
        torch.no_grad()
    ):  # torch's fast path reads the weights of layers directly, but not where hooks are
        fast = model(x)
    torch.testing.assert_close(fast, model(x.clone().requires_grad_()), rtol=1e-5, atol=1e-6)
