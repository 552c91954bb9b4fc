"""Models of transformers under their own losses: uneven micro-batches, single examples and graphs are that loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainc
from tests.compiler.image_models import import_library
from tests.own_losses import rows
from trainc.compiler.method.loss import LossMismatch
from trainc.compiler.per_example.loss_counting import LossNotAMean
from trainc.runtime.data.batch import WrongPick

pytestmark = pytest.mark.models
Batch = dict[str, Any]
WORDS, LENGTH, COUNT, IGNORED = 32, 8, 5, -100
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "use_cache": False}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BERT = {**SIZES, **STILL, "vocab_size": WORDS, "max_position_embeddings": LENGTH}


def built(model: str, config: str, **settings: Any) -> nn.Module:
    transformers = import_library("transformers")
    torch.manual_seed(0)
    found: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**settings))
    return found.double().train()


def words(ignored: bool = True) -> Batch:
    """Return tokens with labels of which some do not count, and padding."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(2, WORDS, (COUNT, LENGTH), generator=g)
    labels, mask = ids.clone(), torch.ones_like(ids)
    for row in range(COUNT) if ignored else ():
        labels[row, :row], mask[row, LENGTH - row % 3 :] = IGNORED, 0
        labels[row, LENGTH - row % 3 :] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def with_labels(labels: Tensor, name: str = "labels") -> Batch:
    batch = words()
    del batch["labels"]
    return {**batch, name: labels}


def gpt2() -> tuple[nn.Module, Batch]:
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": LENGTH}
    return built(
        "GPT2LMHeadModel", "GPT2Config", vocab_size=WORDS, **sizes, **drop, **ENDS
    ), words()


def llama() -> tuple[nn.Module, Batch]:
    sizes = {**SIZES, "num_key_value_heads": 2, "vocab_size": WORDS}
    return built("LlamaForCausalLM", "LlamaConfig", **sizes, **ENDS), words()


def t5() -> tuple[nn.Module, Batch]:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return (
        built("T5ForConditionalGeneration", "T5Config", vocab_size=WORDS, dropout_rate=0.0,
              decoder_start_token_id=0, use_cache=False, **sizes),
        words(),
    )  # fmt: skip


def masked() -> tuple[nn.Module, Batch]:
    return built("BertForMaskedLM", "BertConfig", **BERT), words()


def tokens() -> tuple[nn.Module, Batch]:
    batch = words()
    batch["labels"] = batch["labels"].where(batch["labels"] == IGNORED, batch["labels"] % 3)
    return built("BertForTokenClassification", "BertConfig", num_labels=3, **BERT), batch


def sentences() -> tuple[nn.Module, Batch]:
    model = built("BertForSequenceClassification", "BertConfig", num_labels=3, **BERT)
    return model, with_labels(torch.tensor([0, 2, 1, IGNORED, 1]))


def regression() -> tuple[nn.Module, Batch]:
    model = built("BertForSequenceClassification", "BertConfig", num_labels=1, **BERT)
    return model, with_labels(torch.tensor([0.3, -1.0, 2.0, 0.5, 0.1]).double())


def several_labels() -> tuple[nn.Module, Batch]:
    more = {"num_labels": 3, "problem_type": "multi_label_classification"}
    model = built("BertForSequenceClassification", "BertConfig", **more, **BERT)
    return model, with_labels((torch.arange(15).reshape(5, 3) % 2).double())


def answers() -> tuple[nn.Module, Batch]:
    batch = with_labels(torch.tensor([0, 2, 1, 4, 1]), "start_positions")
    return (
        built("BertForQuestionAnswering", "BertConfig", **BERT),
        {**batch, "end_positions": torch.tensor([3, 2, 5, 6, 1])},
    )


def images() -> tuple[nn.Module, Batch]:
    sizes = {**SIZES, **STILL, "image_size": 16, "patch_size": 8, "num_labels": 4}
    pixels = torch.randn(COUNT, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.tensor([0, 3, 1, 2, 2])
    return built("ViTForImageClassification", "ViTConfig", **sizes), {
        "pixel_values": pixels,
        "labels": labels,
    }


CASES = (gpt2, llama, t5, masked, tokens, sentences, regression, several_labels, answers, images)
ROUNDED = (gpt2, llama, t5)
"""They compute a part in float32 whatever they are given."""
each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
FOUND = {"gpt2": "shifted_targets", "llama": "shifted_targets", "answers": "targets"}


def close(case: object, got: Tensor, want: Tensor, what: str) -> None:
    rtol, atol = (1e-4, 1e-6) if case in ROUNDED else (1e-8, 1e-11)
    torch.testing.assert_close(got.to(want.dtype), want, rtol=rtol, atol=atol, msg=what)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@each
def test_uneven_micro_batches_are_the_loss_of_the_whole_batch(
    case: Callable[[], tuple[nn.Module, Batch]],
) -> None:
    model, batch = case()
    model(**batch).loss.backward()
    want, loss = gradients(model), model(**batch).loss.item()
    model, _ = case()
    program = trainc.compile("loss model", model)
    found = program.step([rows(batch, 0, 1), rows(batch, 1, COUNT)])
    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    got = gradients(model)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        close(case, got[name], gradient, name)
    wanted = FOUND.get(case.__name__, "targets")
    assert program.loss_fn.found == wanted  # type: ignore[attr-defined]


@each
def test_a_dict_reaches_the_model_whole_and_one_step_is_plain_torch(
    case: Callable[[], tuple[nn.Module, Batch]],
) -> None:
    (ours, batch), (plain, _) = case(), case()
    trainc.compile("loss model optimizer sgd { lr = 0.1 }", ours).step(batch)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    plain(**batch).loss.backward()
    optimizer.step()
    assert all(map(torch.equal, ours.state_dict().values(), plain.state_dict().values()))


@each
def test_single_examples_and_the_graph_agree(
    case: Callable[[], tuple[nn.Module, Batch]],
) -> None:
    model, batch = case()
    program = trainc.compile("loss model noise_scale gns on role(norm)", model)
    program.step(batch)
    assert program.graph_refused is None
    pair = program.execution.losses.batch(batch)
    weights = program.execution.losses.example_weights(pair[1], {})
    for name, squares in program.execution.trial(pair, "graph").squares.items():
        want = torch.zeros(COUNT, dtype=torch.float64)
        parameter = model.get_parameter(name)
        for i, weight in enumerate(weights):
            if weight:
                loss = model(**rows(batch, i, i + 1)).loss
                (own,) = torch.autograd.grad(loss, [parameter])
                want[i] = (weight * own).square().sum()
        close(case, squares, want, name)


def test_two_passes_read_the_logits_of_the_next_tokens() -> None:
    (model, batch), (plain, _) = gpt2(), gpt2()
    program = trainc.compile("loss model regularize r_drop { weight = 1 }", model)
    found = program.step(batch)  # without dropout both passes are the same
    assert found["loss"] == pytest.approx(plain(**batch).loss.item(), rel=1e-9)
    assert found["r_drop"] == pytest.approx(0, abs=1e-12)


def test_labels_in_the_inputs_of_a_loss_that_ignores_them_are_refused() -> None:
    model, batch = gpt2()
    program = trainc.compile("loss cross_entropy", model)
    with pytest.raises((WrongPick, LossMismatch), match="write `loss model`"):
        program.step((batch, batch["labels"]))


def test_the_loss_of_a_router_is_part_of_the_loss() -> None:
    sizes = {**SIZES, "num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": WORDS}
    model = built("MixtralForCausalLM", "MixtralConfig", output_router_logits=True, **sizes, **ENDS)
    model.float()  # its experts take no other
    batch = words()
    want = model(**batch)
    assert want.aux_loss is not None
    found = trainc.compile("loss model", model).step(batch)
    assert found["loss"] == pytest.approx(want.loss.item(), rel=1e-6)


def test_the_loss_of_a_second_head_is_refused_or_summed() -> None:
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.0}
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": LENGTH, "num_labels": 1}
    model = built("GPT2DoubleHeadsModel", "GPT2Config", vocab_size=WORDS, **sizes, **drop, **ENDS)
    ids = torch.randint(2, WORDS, (3, 2, LENGTH), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids, "mc_labels": torch.tensor([0, 1, 1])}
    with pytest.raises(WrongPick, match="`mc_loss` beside its loss"):
        trainc.compile("loss model", model).step(batch)
    spec = 'loss model as words { output = "loss" } loss model as choice { output = "mc_loss" }'
    want = model(**batch)
    found = trainc.compile(spec, model).step(batch)
    assert found["loss"] == pytest.approx((want.loss + want.mc_loss).item(), rel=1e-6)


def test_a_loss_that_compares_examples_takes_one_micro_batch() -> None:
    text = {**SIZES, "vocab_size": WORDS, "max_position_embeddings": LENGTH,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}  # fmt: skip
    image = {**SIZES, "image_size": 16, "patch_size": 8}
    model = built("CLIPModel", "CLIPConfig", text_config=text, vision_config=image,
                  projection_dim=16)  # fmt: skip
    batch: Batch = {
        "input_ids": words()["input_ids"],
        "pixel_values": images()[1]["pixel_values"],
        "return_loss": True,
    }
    want = model(**batch).loss.item()
    program = trainc.compile('loss model { labels = "input_ids" } optimizer sgd { lr = 0 }', model)
    assert program.step(batch)["loss"] == pytest.approx(want, rel=1e-9)
    parts = [{n: v if v is True else v[a:b] for n, v in batch.items()} for a, b in ((0, 2), (2, 5))]
    with pytest.raises(LossNotAMean):
        program.step(parts)
