"""A captured step gives what eager training gives, on the user's own tensors."""

import contextlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from examples import models
from tests.compiler.image_models import import_library
from trainc.compiler.execution.capture import CaptureFailed, capture, signature
from trainc.compiler.graph.dynamo_capture import dynamo_capture
from trainc.compiler.graph.export_capture import export_capture
from trainc.compiler.graph.interface import Outputs
from trainc.compiler.graph.step_graph import StepGraph
from trainc.compiler.method.sites import NormSite, Rewrite
from trainc.compiler.method.term import Forward, Term
from trainc.runtime.data.batch import Batch, compute_logits


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


class CrossEntropy:
    """Cross-entropy as the loss construct writes it."""

    name = "cross_entropy"
    ignore_index = -100
    label_smoothing = 0.0

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))


LOSS = CrossEntropy()


class Encoder(nn.Module):
    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Embedding(64, 32)
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.1, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor, scale: Tensor | None = None) -> Any:
        x = self.embed(ids)
        x = self.encoder(x if self.batch_first else x.transpose(0, 1))
        x = x if self.batch_first else x.transpose(0, 1)
        x = x if scale is None else x * scale[:, None, None]
        return x @ self.embed.weight.T


class Answer:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def tokens(examples: int = 3, length: int = 16, vocabulary: int = 64) -> Batch:
    ids = torch.randint(vocabulary, (examples, length + 1))
    return ids[:, :-1], ids[:, 1:]


def images() -> Batch:
    return torch.randn(4, 1, 8, 8), torch.randint(10, (4,))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    "gpt": (lambda: models.gpt(2, 32, 4, 16, 64), tokens),
    "gpt-rms-tied-dropout": (
        lambda: models.gpt(2, 32, 4, 16, 64, norm="rms", dropout=0.1, tied=True),
        tokens,
    ),
    "vit": (lambda: models.vit(layers=2, width=32), images),
    "resnet": (models.resnet, images),
    "encoder": (Encoder, tokens),
    "encoder-length-first": (lambda: Encoder(batch_first=False), tokens),
}


def eager(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor | None]]:
    loss = LOSS(compute_logits(model, batch[0]), batch[1])
    names = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
    return loss.detach(), dict(zip(names, grads, strict=True))


def same(a: Tensor | None, b: Tensor | None) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


def of_parameters(value: Callable[[Forward], Tensor]) -> Rewrite:
    return Rewrite(terms={"pull": Term("pull", value, "parameters")})


def empty(model: nn.Module, batch: Batch, **changes: Any) -> StepGraph:
    given: dict[str, Any] = {"rewrite": Rewrite(), "scalars": {}} | changes
    return capture(model, LOSS, batch, **given)


@pytest.mark.parametrize("name", CASES)
def test_an_empty_rewrite_is_eager_training_bit_for_bit(name: str) -> None:
    make, data = CASES[name]
    model, batch = make().train(), data()
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    torch.manual_seed(1)
    loss, grads = eager(model, batch)
    after = {n: b.clone() for n, b in model.named_buffers()}
    for n, b in model.named_buffers():
        b.copy_(buffers[n])
    loss_weight = {"loss_weight": torch.tensor(1.0)}
    step = empty(model, batch, scalars=loss_weight)
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    torch.manual_seed(1)
    out = step.run(batch, loss_weight)
    assert torch.equal(out.loss, loss)
    assert out.grads.keys() == grads.keys()
    assert all(same(out.grads[n], grads[n]) for n in grads)
    assert all(torch.equal(b, after[n]) for n, b in model.named_buffers())


def test_running_statistics_move_in_the_users_own_buffers() -> None:
    model, batch = models.resnet().train(), images()
    step = empty(model, batch)
    mean = model.get_buffer("bn.running_mean")
    before = mean.clone()
    step.run(batch, {})
    step.run(batch, {})
    assert not torch.equal(mean, before)
    assert int(model.get_buffer("bn.num_batches_tracked")) == 2


def test_the_graph_holds_the_users_tensors_under_their_names() -> None:
    model = models.gpt(1, 32, 4, 16, 64, tied=True)
    step = empty(model.train(), tokens())
    assert list(step.state_dict()) == list(model.state_dict())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert step.get_parameter(name) is parameter
    assert "head.weight" in step.state_dict()
    assert "head.weight" not in dict(step.named_parameters())
    read = {str(n.target) for n in step.graph.nodes if n.op == "get_attr"}
    assert read <= set(dict(model.named_parameters()))


def test_a_gradient_step_shows_in_the_next_run() -> None:
    model, batch = models.vit(layers=1, width=32).train(), images()
    step = empty(model, batch)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    loss, grads = eager(model, batch)
    out = step.run(batch, {})
    assert torch.equal(out.loss, loss)
    assert all(same(out.grads[n], grads[n]) for n in grads)


def test_the_loss_weight_multiplies_loss_and_terms() -> None:
    model, batch = models.vit(layers=1, width=32).double().train(), images()
    batch = (batch[0].double(), batch[1])
    scalars = {
        "loss_weight": torch.tensor(0.25, dtype=torch.float64),
        "strength": torch.tensor(0.1),
    }
    anchor = {"anchor": torch.randn_like(model.head.weight)}

    def pull(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
        gap: Tensor = parameters["head.weight"] - tensors["anchor"]
        return gap.square().sum() * tensors["strength"]

    rewrite = of_parameters(lambda forward: pull(forward.parameters, forward.tensors))
    step = empty(model, batch, rewrite=rewrite, scalars=scalars | anchor)
    for strength in (0.1, 0.3):
        scalars["strength"] = torch.tensor(strength)
        out = step.run(batch, scalars | anchor)
        loss = LOSS(model(batch[0]), batch[1])
        total = (loss + pull(dict(model.named_parameters()), scalars | anchor)) * 0.25
        want = torch.autograd.grad(total, list(model.parameters()))
        torch.testing.assert_close(out.total, total.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(out.loss, loss.detach(), rtol=1e-12, atol=0)
        for got, expected in zip(out.grads.values(), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)


def test_a_term_that_bypasses_its_argument_is_refused() -> None:
    model = models.vit(layers=1, width=32).train()
    with pytest.raises(ValueError, match=r"`head\.weight` directly"):
        empty(model, images(), rewrite=of_parameters(lambda _: model.head.weight.square().sum()))
    both = of_parameters(
        lambda f: f.parameters["head.bias"].sum() * model.head.weight.square().sum()
    )
    with pytest.raises(ValueError, match=r"`head\.weight` directly"):
        empty(model, images(), rewrite=both)


def test_frozen_parameters_get_no_gradient_and_no_backward() -> None:
    model, batch = models.vit(layers=2, width=32).train(), images()
    full = len(empty(model, batch).graph.nodes)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head."))
    step = empty(model, batch)
    assert list(step.run(batch, {}).grads) == ["head.weight", "head.bias"]
    assert len(step.graph.nodes) < 0.6 * full


def test_gradients_never_share_memory() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.a + self.b

    batch = (torch.randn(3, 4), torch.randint(4, (3,)))
    grads = empty(Twice().train(), batch).run(batch, {}).grads
    first, second = grads["a"], grads["b"]
    assert first is not None
    assert second is not None
    want = second.clone()
    first.zero_()
    assert torch.equal(second, want)


def test_dense_gradients_come_from_expanded_ones() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2, 3))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.w.sum()

    def mean(logits: Tensor, targets: Tensor) -> Tensor:
        return logits.mean() + 0 * targets.sum()

    batch = (torch.randn(4, 3), torch.randint(3, (4,)))
    step = capture(Sum().train(), mean, batch, rewrite=Rewrite(), scalars={})
    grad = step.run(batch, {}).grads["w"]
    assert grad is not None
    assert grad.is_contiguous()
    torch.testing.assert_close(grad, torch.ones(2, 3))


@pytest.mark.parametrize("form", ["tuple", "dict", "object"])
def test_inputs_and_outputs_come_in_every_form_of_the_contract(form: str) -> None:
    class Model(Encoder):
        def forward(self, ids: Tensor, scale: Tensor | None = None) -> Any:
            logits = super().forward(ids, scale)
            return Answer(logits) if form == "object" else (logits, None)

    model = Model().eval()
    ids, targets = tokens()
    scale = torch.rand(3)
    assert isinstance(ids, Tensor)
    inputs: Any = {"tuple": (ids, scale), "dict": {"scale": scale, "ids": ids}, "object": ids}[form]
    step = empty(model, (inputs, targets))
    loss, grads = eager(model, (inputs, targets))
    out = step.run((inputs, targets), {})
    assert torch.equal(out.loss, loss)
    assert all(same(out.grads[n], grads[n]) for n in grads)


def test_one_tensor_as_inputs_and_targets_stays_two_ports() -> None:
    model = models.gpt(1, 32, 4, 16, 64).train()
    ids = torch.randint(64, (2, 16))
    step = empty(model, (ids, ids))
    batch = tokens(2)
    assert torch.equal(step.run(batch, {}).loss, eager(model, batch)[0])


def test_autocast_at_capture_is_part_of_the_graph() -> None:
    model, batch = models.gpt(1, 32, 4, 16, 64).train(), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        loss = LOSS(model(batch[0]), batch[1])
        step = empty(model, batch)
        inside = step.run(batch, {})
    want = torch.autograd.grad(loss, list(model.parameters()))
    outside = step.run(batch, {})
    for out in (inside, outside):
        assert torch.equal(out.loss, loss)
        assert all(same(g, w) for g, w in zip(out.grads.values(), want, strict=True))


def test_the_signature_tells_what_a_graph_is_good_for() -> None:
    model, batch = models.gpt(1, 32, 4, 16, 64).train(), tokens()
    here = signature(model, batch)
    assert signature(model, tokens()) == here
    assert signature(model, tokens(4)) != here
    with torch.autocast("cpu", torch.bfloat16):
        assert signature(model, batch) != here
    model.head.weight.requires_grad_(False)
    assert signature(model, batch) != here


def test_capture_leaves_the_random_stream_alone() -> None:
    model, batch = models.gpt(1, 32, 4, 16, 64, dropout=0.1).train(), tokens()
    state = torch.get_rng_state()
    empty(model, batch)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["gpt-rms-tied-dropout", "resnet"])
def test_both_front_ends_give_the_same_step(name: str) -> None:
    make, data = CASES[name]
    model, batch = make().train(), data()
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    outs: list[Outputs] = []
    for front_end in (export_capture, dynamo_capture):
        for n, b in model.named_buffers():
            b.copy_(buffers[n])
        step = empty(model, batch, front_end=front_end)
        assert list(step.state_dict()) == list(model.state_dict())
        torch.manual_seed(1)
        outs.append(step.run(batch, {}))
    assert torch.equal(outs[0].loss, outs[1].loss)
    torch.testing.assert_close(outs[0].grads, outs[1].grads, rtol=1e-5, atol=1e-7)


def test_the_second_front_end_serves_norm_sites_by_name() -> None:
    model, batch = models.gpt(2, 32, 4, 16, 64).train(), tokens()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
    sites = [NormSite(n, "layer", f"{n}.weight", f"{n}.bias", 1e-5) for n in names]
    first, second = (
        empty(model, batch, rewrite=Rewrite(norms=sites), front_end=front_end).run(batch, {}).probes
        for front_end in (export_capture, dynamo_capture)
    )
    assert list(first) == list(second) == names
    assert all(torch.equal(first[n], second[n]) for n in names)


class Checkpointed(nn.Module):
    """Blocks under activation checkpointing, a constant, and statistics taken without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.Dropout(0.2), nn.Tanh())
        self.register_buffer("scale", torch.rand(6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            centre = x.mean()
        x = (x - centre) * self.get_buffer("scale") + torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
        y: Tensor = checkpoint(self.first, x, use_reentrant=False)
        return y


@pytest.mark.parametrize("front_end", [export_capture, dynamo_capture])
def test_checkpointing_constants_and_no_grad_blocks_are_captured(front_end: Any) -> None:
    model, batch = Checkpointed().train(), (torch.randn(3, 6), torch.randint(6, (3,)))
    torch.manual_seed(1)
    loss, grads = eager(model, batch)
    sites = [NormSite("first.0", "layer", "first.0.weight", "first.0.bias", 1e-5)]
    step = empty(model, batch, front_end=front_end, rewrite=Rewrite(norms=sites))
    assert list(step.state_dict()) == list(model.state_dict())
    assert step.constants == ("forward_constant_0",)
    torch.manual_seed(1)
    out = step.run(batch, {})
    torch.testing.assert_close(out.loss, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.grads, grads, rtol=1e-5, atol=1e-7)
    assert list(out.probes) == ["first.0"]


def test_the_second_front_end_does_not_run_out_of_recompilations() -> None:
    batch = (torch.randn(2, 4), torch.randint(3, (2,)))
    for _ in range(10):
        empty(nn.Linear(4, 3), batch, front_end=dynamo_capture)


def test_a_model_that_export_refuses_takes_the_second_front_end_with_a_note() -> None:
    class Picky(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
                raise TypeError("not like this")
            return super().forward(x)

    batch = (torch.randn(2, 4), torch.randint(3, (2,)))
    model = Picky(4, 3)
    step = empty(model, batch)
    assert "torch.export cannot capture the model: TypeError: not like this" in step.notes[0]
    assert torch.equal(step.run(batch, {}).loss, eager(model, batch)[0])


class Sized(nn.Module):
    """Takes as many rows as there are positive numbers, which no graph knows before."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        print("a word of the model", file=sys.stderr)
        rows = torch.where(x[:, 0] > 0)[0]
        logits: Tensor = self.layer(x)
        return logits if len(rows) else logits * 2


def test_an_attempt_that_fails_shows_no_graph_and_what_the_model_says(
    capsys: pytest.CaptureFixture[str],
) -> None:
    batch = torch.randn(4, 4), torch.tensor([0, 1, 2, 0])
    with pytest.raises(CaptureFailed):
        capture(Sized(), CrossEntropy(), batch, rewrite=Rewrite(), scalars={})
    said = set(capsys.readouterr().err.splitlines())
    assert said == {"a word of the model"}


def test_a_model_that_no_front_end_can_take_is_refused_with_both_reasons() -> None:
    class Peeks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.sum()) > 0 else super().forward(-x)

    with pytest.raises(CaptureFailed) as refusal:
        empty(Peeks(4, 3), (torch.randn(2, 4), torch.randint(3, (2,))))
    assert "torch.export cannot" in str(refusal.value)
    assert "torch.compile cannot" in str(refusal.value)


def huggingface(name: str) -> nn.Module:
    transformers = import_library("transformers")
    shared = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if name == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=32, **shared)
        return transformers.GPT2LMHeadModel(config)  # type: ignore[no-any-return]
    if name == "llama":
        config = transformers.LlamaConfig(**small, intermediate_size=64, **shared)
        return transformers.LlamaForCausalLM(config)  # type: ignore[no-any-return]
    config = transformers.BertConfig(**small, intermediate_size=64, vocab_size=64)
    return transformers.BertForMaskedLM(config)  # type: ignore[no-any-return]


@pytest.mark.models
@pytest.mark.parametrize("kind", ["tensor", "dict", "autocast"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_hugging_face_models_train_alike(name: str, kind: str) -> None:
    model = huggingface(name).train()
    ids, targets = tokens(2)
    assert isinstance(ids, Tensor)
    inputs: Any = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch = (inputs if kind == "dict" else ids, targets)
    mixed = (
        torch.autocast("cpu", torch.bfloat16) if kind == "autocast" else contextlib.nullcontext()
    )
    torch.manual_seed(1)
    with mixed:
        loss = LOSS(compute_logits(model, batch[0]), targets)
    want = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    with mixed:
        step = empty(model, batch)
    torch.manual_seed(1)
    out = step.run(batch, {})
    assert set(step.state_dict()) == set(model.state_dict())
    torch.testing.assert_close(out.loss, loss.detach(), rtol=1e-6, atol=0)
    limit = 2e-2 if kind == "autocast" else 1e-5
    for got, expected in zip(out.grads.values(), want, strict=True):
        assert (got is None) == (expected is None)
        if expected is not None:
            assert got is not None
            assert (got - expected).norm() <= limit * expected.norm() + 1e-7
