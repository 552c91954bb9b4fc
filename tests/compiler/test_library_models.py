"""Models from other libraries: graph, bound modules and one pass per example give the same statistics."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainc
from tests.compiler.image_models import import_library
from trainc.compiler.driver.verify import compare
from trainc.runtime.data.batch import Batch

Built = tuple[nn.Module, Batch, str]


def encoder() -> Built:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16), enable_nested_tensor=False)
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    return model, (x, torch.randn_like(x)), "loss mse"


def hugging_face(name: str, config: dict[str, Any]) -> Built:
    transformers = import_library("transformers")
    settings = getattr(transformers, config.pop("config"))(vocab_size=64, **config)
    model = getattr(transformers, name)(settings)
    ids = torch.randint(0, 64, (3, 9))
    return model, ({"input_ids": ids[:, :-1]}, ids[:, 1:].contiguous()), "loss cross_entropy"


def gpt2() -> Built:
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 16, "use_cache": False}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return hugging_face("GPT2LMHeadModel", {"config": "GPT2Config", **sizes, **dropout, **ends})


def llama() -> Built:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    rest = {"num_key_value_heads": 2, "use_cache": False, "pad_token_id": 0}
    return hugging_face("LlamaForCausalLM", {"config": "LlamaConfig", **sizes, **rest})


def gemma() -> Built:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    rest = {"num_key_value_heads": 2, "head_dim": 8, "use_cache": False, "pad_token_id": 0}
    return hugging_face("GemmaForCausalLM", {"config": "GemmaConfig", **sizes, **rest})


def bert() -> Built:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return hugging_face("BertForMaskedLM", {"config": "BertConfig", **sizes, **dropout})


def timm_vit() -> Built:
    timm = import_library("timm")
    sizes = {
        "depth": 2,
        "img_size": 16,
        "patch_size": 8,
        "num_classes": 5,
        "embed_dim": 24,
        "num_heads": 2,
    }
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    return (
        model,
        (torch.randn(3, 3, 16, 16).double(), torch.tensor([0, 3, 4])),
        "loss cross_entropy",
    )


FOREIGN = [
    pytest.param(build, id=build.__name__, marks=pytest.mark.models)
    for build in (gpt2, llama, gemma, bert, timm_vit)
]
ALL = [pytest.param(encoder, id="encoder"), *FOREIGN]
NORMS = "role(norm)"


@pytest.mark.parametrize("build", ALL)
def test_graph_modules_and_single_examples_agree(build: Callable[[], Built]) -> None:
    torch.manual_seed(0)
    model, batch, loss = build()
    # These norms compute in float32 whatever they are given: there is no double precision to compare.
    model.train() if build in (llama, gemma) else model.double().train()
    keys = list(model.state_dict())
    spec = (
        f"{loss} optimizer adamw {{ lr = 1e-3 }} noise_scale gns on {NORMS} {{ smooth = 5 steps }}"
    )
    program = trainc.compile(spec, model, executor="graph")
    rows = compare(program, batch)
    assert {row.title for row in rows} > {"per-example norms, one pass per example"}
    assert all(row.ok for row in rows), rows
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("build", ALL)
def test_noise_and_two_views_agree_between_graph_and_modules(build: Callable[[], Built]) -> None:
    torch.manual_seed(0)
    model, batch, loss = build()
    model.double().train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    sites = 'type(Linear) - "**.out_proj" - "lm_head" - "cls.**" - "head"'
    spec = f"{loss} optimizer sgd {{ lr = 0.1 }} regularize pace on {sites} optional {{ sigma = 0.3, weight = 0.5 }}"
    program = trainc.compile(spec, model, executor="graph")
    # Norms of some compute in float32 whatever they are given, of one view where the graph pairs late.
    assert [row for row in compare(program, batch) if row.error > max(row.allowed, 1e-6)] == []


@pytest.mark.parametrize("build", ALL)
def test_a_step_trains_them(build: Callable[[], Built]) -> None:
    torch.manual_seed(0)
    model, batch, loss = build()
    model.double().train()
    spec = f"{loss} optimizer sgd {{ lr = 0.05 }} noise_scale gns on {NORMS} {{ smooth = 5 steps }}"
    program = trainc.compile(spec, model)
    losses = [program.step(batch)["loss"] for _ in range(4)]
    assert program.graph_refused is None
    assert losses[-1] < losses[0]


@pytest.mark.models
@pytest.mark.parametrize("build", [gpt2, llama])
def test_all_layers_are_measured_tied_heads_too(build: Callable[[], Built]) -> None:
    torch.manual_seed(0)
    model, batch, loss = build()
    model.train()
    spec = f"{loss} optimizer sgd {{ lr = 0 }} noise_scale gns on all"
    program = trainc.compile(spec, model)
    expected = program.execution.contributions(batch)
    assert set(expected) == {name for name, _ in model.named_parameters()}
    found = program.execution.trial(batch, "module").squares
    for name, squares in expected.items():
        torch.testing.assert_close(
            found[name], squares.to(found[name].dtype), rtol=1e-4, atol=1e-9, msg=name
        )


class Unexportable(nn.Module):
    """Decides by a value in the middle of its forward pass, which cannot be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(x))
        return out * 2 if float(out.detach().sum()) > 1e9 else out


def test_a_model_that_cannot_be_captured_runs_by_its_modules_and_says_so() -> None:
    torch.manual_seed(0)
    model = Unexportable()
    spec = "loss cross_entropy optimizer sgd { lr = 0.1 } noise_scale gns on type(LayerNorm) { smooth = 5 steps }"
    program = trainc.compile(spec, model)
    metrics = program.step((torch.randn(6, 6), torch.tensor([0, 1, 2, 0, 1, 2])))
    assert "gns.noise" in metrics
    assert program.graph_refused is not None
    assert any("bound modules" in note for note in program.report().notes)
    assert any("bound modules" in line for line in program.summary())
