"""`adapt prompt`: by definition, masks and positions of real blocks, and where prompts have no place."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainc
from examples.models import gpt, vit
from trainc.compiler.constructs.adapt._longer import Longer
from trainc.compiler.errors import SiteError
from trainc.compiler.model.adapters import adapters_of
from trainc.compiler.program.program import Program

BASE = "loss cross_entropy run { length = 10 steps, seed = 3 } optimizer sgd { lr = 0.5 }\n"
IDS = torch.randint(0, 24, (4, 8), generator=torch.Generator().manual_seed(1))
IMAGES = torch.linspace(-1, 1, 256, dtype=torch.float64).sin().view(4, 1, 8, 8)
REFERENCE = json.loads(
    (Path(__file__).parents[2] / "reference/more_methods.json").read_text(encoding="utf-8")
)["forecast_peft"]


def language_model() -> nn.Module:
    torch.manual_seed(0)
    return gpt(layers=2, width=16, heads=2, context=8, vocabulary=24).double()


def image_model() -> nn.Module:
    torch.manual_seed(0)
    return vit(layers=3, width=16, heads=2, patch=4).double()


CASES: dict[str, tuple[Any, str, list[int]]] = {
    "deep": (language_model, 'on "blocks.*" { tokens = 3 }', [0, 1]),
    "shallow": (language_model, 'on "blocks.*" { tokens = 3, mode = shallow }', [0, 1]),
    "behind a class token": (image_model, 'on "blocks.*" { tokens = 2, at = 1 }', [0, 1, 2]),
    "the middle": (image_model, 'on "blocks.[12]" { tokens = 2, mode = shallow, at = 1 }', [1, 2]),
}


def trained(make: Any, clause: str, steps: int = 3) -> Program:
    program = trainc.compile(BASE + f"adapt prompt {clause}", make())
    batch = (IDS, IDS.roll(-1, 1)) if make is language_model else (IMAGES, torch.arange(4))
    for _ in range(steps):
        program.step(batch)
    return program


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compare what selected blocks give, after training, with the bare blocks on lists of tokens."""
    compiled, reference = {}, {}
    x = torch.linspace(-1, 1, 160, dtype=torch.float64).view(2, 5, 16)
    for name, (make, clause, at) in CASES.items():
        module: Any = trained(make, clause).module
        rule: Any = adapters_of(module)[0].adapter.rule
        prompts = [p.detach() for n, p in module.named_parameters() if n.endswith("prompts")]
        assert len(prompts) == (1 if rule.mode == "shallow" else len(at))
        with torch.no_grad():
            y = x
            for i in at:
                y = module.blocks[i](y)
            compiled[name] = y
            bare = make()
            reference[name] = rule.reference(x, [bare.blocks[i] for i in at], prompts)
    return compiled, reference


def test_the_published_bound_of_their_start() -> None:
    module = gpt(layers=1, width=128, heads=2, context=8, vocabulary=8)
    clause = 'adapt prompt on "blocks.0" { tokens = 50, init = uniform }'
    trainc.compile(BASE + clause, module)
    values = module.get_parameter("blocks.0.prompt.prompts").detach()
    bound = REFERENCE["prompt_bound"]
    assert 0.99 * bound < float(values.abs().max()) <= bound


# masks


def longer(at: int, layer: nn.Module | None = None, length: int = 4) -> Any:
    layer = nn.Linear(2, 2) if layer is None else layer
    adapter: Any = nn.Module()
    adapter.layer_name, adapter.label = "block", "prompt"
    return Longer(layer, adapter, at, 2, torch.zeros(3, length, 2), 0)


def sees(causal: bool, padded: int, at: int) -> list[list[bool]]:
    """Return which of 4 tokens and 2 prompts from `at` on see which: rows see columns."""
    order = [("token", i) for i in range(4)]
    order[at:at] = [("prompt", 0), ("prompt", 1)]
    return [
        [(not causal or j <= i) and (two[0] == "prompt" or two[1] < 4 - padded) for j, two in enumerate(order)]
        for i in range(6)
    ]  # fmt: skip


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("causal", [False, True])
def test_a_mask_of_attention_has_prompts_in_their_order(causal: bool, at: int) -> None:
    token = torch.ones(3, 1, 4, 4, dtype=torch.bool)
    token = token.tril() if causal else token
    token[1, ..., 3:] = False
    want = torch.tensor([sees(causal, padded, at) for padded in (0, 1, 0)])[:, None]
    assert torch.equal(longer(at)._mask("attention_mask", token), want)
    added = torch.where(token, 0.0, float("-inf"))
    assert torch.equal(longer(at)._mask("attention_mask", added) > -1, want)
    layer = nn.TransformerEncoderLayer(2, 1, 2, batch_first=True)
    hidden = ~token[0, 0]
    assert torch.equal(~longer(at, layer)._mask("src_mask", hidden), want[0, 0])


def test_a_mask_of_ones_and_zeros_shows_prompts_to_a_block_in_any_dtype() -> None:
    mask = torch.tensor([[1, 1, 1, 0]])
    for dtype in (torch.int64, torch.float32, torch.bool):
        found = longer(1)._fitting("attention_mask", mask.to(dtype))
        assert found.dtype == dtype
        assert found.tolist() == torch.tensor([[1, 1, 1, 1, 1, 0]]).to(dtype).tolist()


def test_masks_of_padding_and_positions_have_entries_for_prompts() -> None:
    kept = torch.tensor([[1, 1, 1, 0]])
    assert longer(1)._mask("attention_mask", kept).tolist() == [[1, 1, 1, 1, 1, 0]]
    assert longer(0)._mask("key_padding_mask", kept == 0).tolist() == [[0, 0, 0, 0, 0, 1]]
    assert longer(0)._mask("mask", kept[:, None, None]).shape == (1, 1, 1, 6)
    places = torch.arange(4)
    assert longer(2)._fitting("position_ids", places).tolist() == [0, 1, 1, 1, 2, 3]
    rotary = places[None, :, None] * torch.ones(2)
    both = longer(0)._fitting("position_embeddings", (rotary, rotary))
    assert both[0][0, :, 0].tolist() == [0, 0, 0, 1, 2, 3]


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, pad_token_id=0, use_cache=False,
    )  # fmt: skip
    model: nn.Module = transformers.LlamaForCausalLM(config).double()
    return model


@pytest.mark.parametrize("mode", ["deep", "shallow"])
def test_a_language_model_of_transformers_stays_causal_and_sees_no_padding(mode: str) -> None:
    clause = f'adapt prompt on "model.layers.*" {{ tokens = 3, mode = {mode} }}'
    module: Any = trainc.compile(BASE.replace("cross_entropy", "model") + clause, llama()).module
    with torch.no_grad():
        for one in adapters_of(module):
            for parameter in one.adapter.parameters():
                parameter.copy_(torch.arange(48.0).sin().view(3, 16))
        whole = module(input_ids=IDS).logits
        assert whole.shape == (4, 8, 24)
        other = IDS.clone()
        other[:, 5] = (other[:, 5] + 1) % 24
        torch.testing.assert_close(module(input_ids=other).logits[:, :5], whole[:, :5])
        mask = torch.ones(4, 8, dtype=torch.long)
        mask[1, 6:] = 0
        padded = module(input_ids=IDS, attention_mask=mask).logits
        torch.testing.assert_close(padded[1, :6], module(input_ids=IDS[1:2, :6]).logits[0])
        torch.testing.assert_close(padded[0], whole[0])
        assert not torch.allclose(whole, llama()(input_ids=IDS).logits)
        with pytest.raises(SiteError, match="cache is not supported"):
            module.generate(IDS[:, :4], max_new_tokens=3, use_cache=True)
        text = module.generate(IDS[:1, :4], max_new_tokens=2, use_cache=False, do_sample=False)
        assert torch.equal(text[:, 4], module(input_ids=IDS[:1, :4]).logits[:, -1].argmax(-1))


# in front of the embeddings, as peft has them

SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 16,
}  # fmt: skip


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=24, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


def classifier() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=24, num_labels=3, **SMALL)
    model: nn.Module = transformers.BertForSequenceClassification(config)
    return model


def opt() -> nn.Module:
    """Return a model that calls what is inside of its `model`."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=24, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0,
        max_position_embeddings=16, dropout=0.0, word_embed_proj_dim=8, use_cache=False,
    )  # fmt: skip
    model: nn.Module = transformers.OPTForCausalLM(config)
    return model


def mpt() -> nn.Module:
    """Return a model with biases by distance, whose sizes have other names."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MptConfig(
        vocab_size=24, d_model=16, n_heads=2, n_layers=2, max_seq_len=16, use_cache=False
    )
    model: nn.Module = transformers.MptForCausalLM(config)
    return model


PEFT: dict[str, tuple[Any, str]] = {
    "rotary": (lambda: llama().float(), 'on "model" { tokens = 3, mode = input }'),
    "learned positions": (gpt2, 'on "transformer" { tokens = 3, mode = input }'),
    "a decoder": (opt, 'on "model.decoder" { tokens = 3, mode = input }'),
    "distances": (mpt, 'on "transformer" { tokens = 3, mode = input }'),
    "the whole model": (gpt2, "on type(GPT2LMHeadModel) { tokens = 3, mode = input }"),
    "a frozen head": (classifier, 'on "bert" { tokens = 3, mode = input }'),
    "a trained head": (classifier, 'on "bert" { tokens = 3, mode = input, train = "classifier" }'),
}


def batch_of(make: Any) -> tuple[Tensor, Tensor]:
    return IDS, torch.tensor([0, 1, 2, 0]) if make is classifier else IDS.roll(-1, 1)


def in_front(make: Any, clause: str, executor: Any = "auto") -> Program:
    program = trainc.compile(BASE + f"adapt prompt {clause}", make(), executor=executor)
    for _ in range(2):
        program.step(batch_of(make))
    program.module.eval()
    return program


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(("make", "clause"), PEFT.values(), ids=PEFT)
def test_prompts_in_front_of_the_embeddings_are_those_of_peft(
    make: Any, clause: str, tmp_path: Path
) -> None:
    peft: Any = pytest.importorskip("peft", reason="peft is not installed")
    program = in_front(make, clause)
    module: Any = program.module
    program.save_adapters(tmp_path / "mine")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "mine").eval()
    mask = torch.ones_like(IDS)
    mask[1, 5:] = 0

    def both() -> tuple[Tensor, Tensor]:
        found: Tensor = theirs(input_ids=IDS, attention_mask=mask).logits
        return module(input_ids=IDS, attention_mask=mask).logits, (
            found[:, 3:] if found.dim() == 3 else found
        )

    with torch.no_grad():
        assert torch.equal(*both())
        theirs.prompt_encoder["default"].embedding.weight.add_(0.5)
        theirs.save_pretrained(tmp_path / "theirs")
        program.load_adapters(tmp_path / "theirs")
        assert torch.equal(*both())


@pytest.mark.parametrize(("make", "clause"), PEFT.values(), ids=PEFT)
def test_prompts_in_front_train_the_same_by_graph_and_by_modules(make: Any, clause: str) -> None:
    states = [in_front(make, clause, e).module.state_dict() for e in ("graph", "module")]
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], msg=name)


@pytest.mark.parametrize("mode", ["deep", "input"])
@pytest.mark.parametrize("make", [llama, mpt])
def test_what_comes_behind_may_ask_for_states_in_one_piece(make: Any, mode: str) -> None:
    module: Any = make()
    where = "model" if make is llama else "transformer"
    selected = (
        where if mode == "input" else f"{where}.layers.*" if make is llama else f"{where}.blocks.*"
    )
    seen: list[torch.Size] = []

    def view(_: Any, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0].view(-1).shape)

    head: Any = module.lm_head
    head.register_forward_pre_hook(view)
    norm: Any = module.model.norm if make is llama else module.transformer.norm_f
    norm.register_forward_pre_hook(view)
    text = BASE + f'adapt prompt on "{selected}" {{ tokens = 3, mode = {mode} }}'
    trainc.compile(text, module, executor="module").step((IDS, IDS.roll(-1, 1)))
    assert len(seen) >= 2


@pytest.mark.parametrize("selected", ["role(norm)", '"**.fc"', '"head"'])
def test_prompts_that_no_token_would_see_are_refused(selected: str) -> None:
    with pytest.raises(trainc.SpecError, match="computes each token by itself") as raised:
        trainc.plan(BASE + f"adapt prompt on {selected} {{ tokens = 2 }}", language_model())
    assert raised.value.diagnostics[0].labels


def test_prompts_that_no_token_saw_are_told_of() -> None:
    program = trainc.compile(BASE + 'adapt prompt on "**.mlp" { tokens = 2 }', language_model())
    program.step((IDS, IDS.roll(-1, 1)))
    assert any("`blocks.1.mlp.prompt` had a gradient of 0" in n for n in program.report().notes)
    program = trainc.compile(BASE + 'adapt prompt on "blocks.*" { tokens = 2 }', language_model())
    program.step((IDS, IDS.roll(-1, 1)))
    assert not any("gradient of 0" in note for note in program.report().notes)


@pytest.mark.parametrize("executor", ["graph", "module"])
def test_a_model_that_is_never_called_is_named(executor: Any) -> None:
    with pytest.raises(SiteError, match=r"`model\.prompt` takes no part in the loss") as raised:
        in_front(opt, 'on "model" { tokens = 3, mode = input }', executor)
    assert raised.value.clause == "prompt"


def test_peft_has_no_place_for_prompts_of_an_encoder_alone(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=24, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, pad_token_id=0,
        decoder_start_token_id=0, dropout_rate=0.0, use_cache=False,
    )  # fmt: skip
    module = transformers.T5ForConditionalGeneration(config)
    program = trainc.compile(
        BASE + 'adapt prompt on "encoder" { tokens = 3, mode = input }', module
    )
    program.step(({"input_ids": IDS, "decoder_input_ids": IDS}, IDS.roll(-1, 1)))
    with pytest.raises(ValueError, match=r"an encoder or a decoder alone.*`program\.save`"):
        program.save_adapters(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_a_mask_of_padding_shows_prompts_in_any_dtype(dtype: torch.dtype) -> None:
    module: Any = in_front(gpt2, PEFT["learned positions"][1]).module
    mask = torch.ones_like(IDS)
    mask[1, 5:] = 0
    with torch.no_grad():
        whole = module(IDS).logits
        found = module(IDS, attention_mask=mask.to(dtype)).logits
        assert torch.equal(found, module(IDS, attention_mask=mask).logits)
    torch.testing.assert_close(found[0], whole[0])
    torch.testing.assert_close(found[1, :5], whole[1, :5])


def test_positions_of_prompts_come_first() -> None:
    module: Any = gpt2()
    trainc.compile(BASE + f"adapt prompt {PEFT['learned positions'][1]}", module)
    with torch.no_grad():
        want = module(input_ids=IDS).logits
        assert torch.equal(module(IDS, position_ids=torch.arange(8)[None]).logits, want)
        text = module.generate(IDS[:1, :4], max_new_tokens=2, use_cache=False, do_sample=False)
        assert torch.equal(text[:, 4], module(IDS[:1, :4]).logits[:, -1].argmax(-1))
        states = module(IDS, output_hidden_states=True).hidden_states
        assert {len(state[0]) for state in states} == {8}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": IDS.repeat(1, 2)}, "has 16 positions .*, and needs 19"),
        ({"input_ids": IDS, "labels": IDS}, "select `transformer` inside it"),
        ({"input_ids": IDS, "past_key_values": ((),)}, "cache is not supported"),
        ({"input_ids": IDS, "attention_mask": torch.ones(4, 3)}, "cache is not supported"),
        ({}, "prompts need a sequence"),
    ],
)
def test_what_a_model_cannot_be_given_with_prompts_in_front(
    given: dict[str, Any], message: str
) -> None:
    module: Any = gpt2()
    trainc.compile(BASE + f"adapt prompt {PEFT['the whole model'][1]}", module)
    with pytest.raises(SiteError, match=message):
        module(**given)


def test_states_without_a_sequence_are_refused() -> None:
    clause = "adapt prompt on type(BertForSequenceClassification) { tokens = 2, mode = input }"
    program = trainc.compile(BASE + clause, classifier())
    with pytest.raises(SiteError, match="select the model whose states its head uses"):
        program.step(batch_of(classifier))


@pytest.mark.parametrize(
    ("clause", "message"),
    [
        ('on "model.layers.*" { tokens = 2, mode = input }', "selects 2 modules"),
        ('on "model.layers.0" { tokens = 2, mode = input }', "takes no `inputs_embeds`"),
        ('on "model" { tokens = 2, mode = input, at = 1 }', "remove `at`"),
        ('on "model" { tokens = 2, mode = input, width = 16 }', "remove `width`"),
    ],
)
def test_only_one_model_takes_prompts_in_front(clause: str, message: str) -> None:
    with pytest.raises(trainc.SpecError) as raised:
        trainc.compile(BASE + "adapt prompt " + clause, llama())
    assert message in str(raised.value)
    assert all(d.labels for d in raised.value.diagnostics)


def test_an_encoder_takes_prompts_in_front_and_both_halves_do_not() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=24, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    base = BASE.replace("cross_entropy", "model")
    whole = "adapt prompt on type(T5ForConditionalGeneration) { tokens = 2, mode = input }"
    with pytest.raises(trainc.SpecError, match="the model itself has an encoder and a decoder"):
        trainc.compile(base + whole, model)
    program = trainc.compile(base + 'adapt prompt on "encoder" { tokens = 2, mode = input }', model)
    before = program.module.get_parameter("encoder.prompt.prompts").detach().clone()
    program.step({"input_ids": IDS, "labels": IDS})
    assert not torch.equal(before, program.module.get_parameter("encoder.prompt.prompts"))


def test_files_of_other_adapters_are_refused_with_what_to_write(tmp_path: Path) -> None:
    program = in_front(gpt2, PEFT["learned positions"][1])
    program.save_adapters(tmp_path)
    more = trainc.compile(
        BASE + 'adapt prompt on "transformer" { tokens = 4, mode = input }', gpt2()
    )
    with pytest.raises(ValueError, match="write `tokens = 3`"):
        more.load_adapters(tmp_path)
    blocks = 'adapt prompt on "transformer.h.*" { tokens = 3, mode = shallow }'
    with pytest.raises(ValueError, match="write `mode = input`"):
        trainc.compile(BASE + blocks, gpt2()).load_adapters(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace("PROMPT_TUNING", "PREFIX_TUNING"))
    with pytest.raises(ValueError, match="of the type PREFIX_TUNING"):
        program.load_adapters(tmp_path)


# refused


class Blocks(nn.Module):
    """Blocks that a sequence may not fit."""

    def __init__(self, first: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=first) for _ in range(3)
        )
        self.pool = nn.Sequential(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.pool(x.mean(1))
        return found


X = torch.linspace(-1, 1, 96).view(2, 6, 8)
PAIR = "loss mse optimizer sgd { lr = 0.1 }\n"


@pytest.mark.parametrize(
    ("clause", "message"),
    [
        ('on "blocks.0" | "blocks.2" { tokens = 2, mode = shallow }', "`blocks.2` does not follow `blocks.0`"),
        ('on "blocks.0" | "blocks.0.linear1" { tokens = 2 }', "`blocks.0.linear1` is inside `blocks.0`"),
        ('on "blocks" { tokens = 2 }', "`blocks` is a list of modules"),
        ('on "blocks.0" until 2 steps { tokens = 2 }', "remove `until 2 steps`"),
        ('on "blocks.0" { tokens = -1 }', "tokens"),
    ],
)  # fmt: skip
def test_what_has_no_place_for_prompts_is_refused_where_it_is_written(
    clause: str, message: str
) -> None:
    with pytest.raises(trainc.SpecError) as raised:
        trainc.compile(PAIR + "adapt prompt " + clause, Blocks())
    assert message in str(raised.value)
    assert all(d.labels for d in raised.value.diagnostics)


@pytest.mark.parametrize(
    ("clause", "message"),
    [
        ('on "pool" { tokens = 2 }', r"`pool` gets \(2, 8\) first"),
        ('on "blocks.*" { tokens = 2, width = 9 }', "gets 8 channels, but its prompts have 9"),
        ('on "blocks.*" { tokens = 2, at = 7 }', "gets 6 tokens, and `at` is 7"),
    ],
)
def test_what_only_a_pass_shows_is_refused_there(clause: str, message: str) -> None:
    program = trainc.compile(PAIR + "adapt prompt " + clause, Blocks())
    with pytest.raises(SiteError, match=message) as raised:
        program.step((X, torch.zeros(2, 8)))
    assert raised.value.clause == "prompt"


class Grid(nn.Module):
    """A block that lays its tokens out as a square image."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        side = int(x.shape[1] ** 0.5)
        image = self.fc(x.view(len(x), side, side, 8))
        found: Tensor = image.flatten(1, 2)
        return found


@pytest.mark.parametrize("executor", ["auto", "module"])
def test_a_block_that_makes_an_image_of_its_tokens_is_named(executor: Any) -> None:
    model = nn.Sequential(Grid(), nn.Flatten(), nn.Linear(72, 3))
    clause = 'adapt prompt on "0" { tokens = 2 }'
    program = trainc.compile(BASE + clause, model, executor=executor)
    batch = torch.zeros(2, 9, 8), torch.tensor([0, 1])
    message = "`0` fails on a sequence with 2 prompts more: .*expects a square number.*`adapt lora`"
    for run in (program.step, lambda pair: program.evaluate(*pair)):
        with pytest.raises(SiteError, match=message) as raised:
            run(batch)
        assert raised.value.clause == "prompt"
        assert isinstance(raised.value.__cause__, RuntimeError)


def test_a_fault_in_another_layer_stays_what_it_is() -> None:
    model = nn.Sequential(
        nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True)), nn.Linear(9, 3)
    )
    program = trainc.compile(BASE + 'adapt prompt on "0.0" { tokens = 2 }', model)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        program.step((torch.zeros(2, 9, 8), torch.zeros(2, 9, dtype=torch.long)))


def test_examples_must_be_on_the_first_axis() -> None:
    program = trainc.compile(PAIR + 'adapt prompt on "blocks.*" { tokens = 2 }', Blocks(False))
    with pytest.raises(SiteError, match="batch_first=True"):
        program.step((X, torch.zeros(2, 8)))


def test_an_input_that_nobody_knows_is_refused() -> None:
    with pytest.raises(SiteError, match="gets `pair_bias` of shape"):
        longer(0)._fitting("pair_bias", torch.zeros(4, 4))
    with pytest.raises(SiteError, match="gets `attention_mask`, a str"):
        longer(0)._fitting("attention_mask", "block mask")


# masks of models that nobody told of


class Attends(nn.Module):
    """A block of attention whose mask is torch's: where it is true, a token is hidden."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor, attn_mask: Tensor) -> Tensor:
        y = self.norm(x)
        found: Tensor = x + self.attention(y, y, y, attn_mask=attn_mask, need_weights=False)[0]
        return found


class Sees(nn.Module):
    """A block of attention whose mask is that of sdpa: where it is true, a token is visible."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor, attn_mask: Tensor) -> Tensor:
        y = self.qkv(self.norm(x))
        attend = nn.functional.scaled_dot_product_attention
        return x + attend(y, y, y, attn_mask=attn_mask)


class Masked(nn.Module):
    """A language model with a causal mask, of numbers to add or true and false."""

    def __init__(self, block: nn.Module, added: bool, shows: bool) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Embedding(24, 16), block, nn.Linear(16, 24)
        self.added, self.shows = added, shows

    def forward(self, ids: Tensor) -> Tensor:
        size = ids.shape[1]
        hidden = torch.ones(size, size, dtype=torch.bool).triu(1)
        mask = torch.zeros(size, size).double().masked_fill(hidden, -torch.inf)
        if not self.added:
            mask = ~hidden if self.shows else hidden
        found: Tensor = self.head(self.block(self.embed(ids), mask))
        return found


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize(
    ("block", "executor"),
    [
        (encoder, "module"),  # torch's encoder looks into its mask, which no graph can
        *((one, executor) for one in (Attends, Sees) for executor in ("graph", "module")),
    ],
)
def test_a_mask_means_the_same_whichever_way_it_is_written(block: Any, executor: Any) -> None:
    losses = []
    for added in (False, True):
        torch.manual_seed(0)
        module = Masked(block(), added, block is Sees).double()
        text = BASE + 'adapt prompt on "block" { tokens = 2 }'
        program = trainc.compile(text, module, executor=executor)
        losses.append([program.step((IDS, IDS.roll(-1, 1)))["loss"] for _ in range(3)])
        other = IDS.clone()
        other[:, 5] = (other[:, 5] + 1) % 24
        with torch.no_grad():
            one, two = module(IDS), module(other)
        torch.testing.assert_close(one[:, :5], two[:, :5], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(one[:, 5:], two[:, 5:])
        assert not torch.allclose(one, Masked.forward(bare(module), IDS))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert len(set(losses[0])) == 3


def bare(module: nn.Module) -> Any:
    found = copy.deepcopy(module)
    for one in adapters_of(found):
        one.remove()
    return found
