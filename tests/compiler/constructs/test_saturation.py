"""Saturation: by definition, on networks whose saturation is known, and what it leaves as it was."""

import copy
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trainc
from trainc.compiler.constructs.observe.weights.saturation import Saturation
from trainc.compiler.driver.train import train
from trainc.dsl.text.errors import SpecError
from trainc.runtime.companion.attention_weights import AttentionWeights, weights_of
from trainc.runtime.companion.other_parameters import other_parameters
from trainc.runtime.step.action import ClauseFailed

REST = "loss cross_entropy optimizer sgd on trainable { lr = 0.1 } run { length = 4000 steps }"


class Net(nn.Module):
    """Layers over tokens with dropout and BatchNorm, which both passes leave alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.drop, self.norm = nn.Dropout(0.3), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.one(x))
        h = self.norm(h.transpose(1, 2)).transpose(1, 2)
        h = h + self.drop(torch.tanh(self.two(h)))
        logits: Tensor = self.head(h)
        return logits


def batch(size: int = 6) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(1)
    x = torch.randn(size, 5, 4, generator=made, dtype=torch.float64)
    y = torch.randint(3, (size, 5), generator=made)
    y[::2, 0] = -100
    return x, y


M = TypeVar("M", bound=nn.Module)


def scaled_copy(model: M, c: float) -> M:
    made = copy.deepcopy(model).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(c)
    return made


def by_definition(model: nn.Module, c: float) -> dict[str, float]:
    """Return the saturation of the output, and the mean of that of `one` and `two`, over the counted tokens."""
    x, y = batch()
    kept: list[dict[str, Tensor]] = []
    for one in (copy.deepcopy(model).eval(), scaled_copy(model, c)):
        found: dict[str, Tensor] = {}
        for name in ("one", "two"):
            one.get_submodule(name).register_forward_hook(
                lambda m, a, out, name=name, found=found: found.update({name: out.detach()})
            )
        found["output"] = one(x).detach()
        kept.append(found)
    cosines = {
        name: float(F.cosine_similarity(kept[0][name], kept[1][name], dim=-1)[y != -100].mean())
        for name in kept[0]
    }
    return {
        "saturation": cosines["output"],
        "saturation.hidden": (cosines["one"] + cosines["two"]) / 2,
    }


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the saturation by the program, in two micro-batches, and by definition, after two steps."""
    model = Net().double()
    program = trainc.compile(
        f'{REST} observe saturation every 1 steps {{ c = 30, layers = "one" | "two" }}', model
    )
    x, y = batch()
    program.step((x, y))
    before = copy.deepcopy(model)
    program.step([(x[:2], y[:2]), (x[2:], y[2:])])
    # In the step's passes, before the update; the statistics of BatchNorm are those of the last micro-batch.
    program_found = {n: torch.tensor(program.signals[n]).double() for n in _NAMES}
    before.train()
    states = [copy.deepcopy(before)]
    for part in (x[:2], x[2:]):
        before(part)
        states.append(copy.deepcopy(before))
    want = _of_micro_batches(states[1:], [(x[:2], y[:2]), (x[2:], y[2:])])
    return program_found, want


_NAMES = ("saturation", "saturation.hidden")


def _of_micro_batches(models: list[Net], parts: list[Any]) -> dict[str, Tensor]:
    """Return what is measured where the statistics are those after the first micro-batch."""
    sums = {"output": 0.0, "one": 0.0, "two": 0.0}
    count = 0
    model = models[0]
    for x, y in parts:
        outputs = []
        for one in (copy.deepcopy(model).eval(), scaled_copy(model, 30)):
            h1 = one.one(x)
            h = one.norm(torch.tanh(h1).transpose(1, 2)).transpose(1, 2)
            h2 = one.two(h)
            outputs.append({"one": h1, "two": h2, "output": one.head(h + torch.tanh(h2))})
        for name in sums:
            cosine = F.cosine_similarity(outputs[0][name], outputs[1][name], dim=-1)
            sums[name] += float(cosine[y != -100].detach().sum())
        count += int((y != -100).sum())
    return {
        "saturation": torch.tensor(sums["output"] / count).double(),
        "saturation.hidden": torch.tensor((sums["one"] + sums["two"]) / 2 / count).double(),
    }


def test_it_is_its_definition_and_by_layer() -> None:
    model = Net().double()
    program = trainc.compile(
        f'{REST} observe saturation every 1 steps {{ layers = "one" | "two" }}', model
    )
    state = copy.deepcopy(model)
    state.train()(batch()[0])  # the statistics after the step's own pass
    found = program.step(batch())
    for name, value in by_definition(state, 1000).items():
        assert found[name] == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("executor", ["module", "graph"])
def test_training_is_bit_equal_with_and_without(executor: Any) -> None:
    """Weights, statistics, modes, random numbers: also where the model draws masks in the next step."""
    states = []
    for clause in ("", 'observe saturation every 1 steps { layers = "one" }'):
        if executor == "module":
            model: nn.Module = Net().double()
            model.get_submodule("two").eval()  # a mode of its own
        else:
            torch.manual_seed(0)
            parts = {"one": nn.Linear(4, 8), "norm": nn.LayerNorm(8), "head": nn.Linear(8, 3)}
            model = nn.Sequential(OrderedDict(parts)).double()
        program = trainc.compile(f"{REST} {clause}", model, executor=executor)
        torch.manual_seed(5)
        random.seed(5)
        for _ in range(3):
            program.step(batch())
        modes = [module.training for module in model.modules()]
        states.append((model.state_dict(), modes, torch.rand(3), random.random()))
    one, other = states
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    assert one[1] == other[1]
    assert torch.equal(one[2], other[2])
    assert one[3] == other[3]


def test_other_parameters_are_there_in_the_block_alone_and_none_is_written_to() -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(3, 4, batch_first=True)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    for module, x in ((lstm, torch.randn(2, 5, 3)), (tied, torch.randn(2, 4))):
        own = dict(module.named_parameters(remove_duplicate=False))
        bits = {name: p.detach().clone() for name, p in own.items()}
        versions = {name: p._version for name, p in own.items()}
        want = scaled_copy(module, 7.3)(x)
        before = module(x)
        with other_parameters(module, lambda p: p * 7.3):
            found = module(x)
            assert len(set(map(id, module.parameters()))) == len(set(map(id, own.values())))
        assert not any(p.requires_grad for p in [found] if isinstance(p, Tensor))
        for one, other in zip(_tensors(found), _tensors(want), strict=True):
            torch.testing.assert_close(one, other.detach())
        assert all(p is own[n] for n, p in module.named_parameters(remove_duplicate=False))
        assert all(torch.equal(p, bits[name]) for name, p in own.items())
        assert {name: p._version for name, p in own.items()} == versions
        assert all(
            torch.equal(a, b) for a, b in zip(_tensors(module(x)), _tensors(before), strict=True)
        )


def _tensors(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [t for one in found for t in _tensors(one)]


class Fails(nn.Module):
    """Raises where its weight is large."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if float(self.fc.weight.detach().abs().max()) > 10:
            raise ArithmeticError("too large")
        logits: Tensor = self.fc(x)
        return logits


def test_a_pass_that_raises_leaves_the_weights() -> None:
    model = Fails()
    bits = {name: p.detach().clone() for name, p in model.named_parameters()}
    own = dict(model.named_parameters())
    program = trainc.compile(f"{REST} observe saturation from 0 steps every 1 steps", model)
    x, y = torch.randn(4, 4), torch.randint(3, (4,))
    with pytest.raises(ArithmeticError):
        program.step((x, y))
    assert all(p is own[name] for name, p in model.named_parameters())
    assert all(torch.equal(p, bits[name]) for name, p in own.items())
    with pytest.raises(RuntimeError), other_parameters(model, lambda p: p * 2):
        raise RuntimeError
    assert all(torch.equal(p, bits[name]) for name, p in model.named_parameters())


def test_a_saturated_network_has_1_and_a_random_one_less() -> None:
    """Signs of tanh do not change where its inputs are large already; a linear network is saturated at once."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    for model, low, high in (
        (nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False)), 1, 1),
        (nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), -1, 0.99),
    ):
        program = trainc.compile(f"{REST} observe saturation every 1 steps", model)
        assert low - 1e-6 <= program.step((x, y))["saturation"] <= high + 1e-6


class Attention(nn.Module):
    """One layer of attention, causal as it should be or by a mask that multiplies the scores."""

    def __init__(self, *, leaks: bool, heads: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 11)
        self.heads, self.leaks = heads, leaks

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.embed(x)).chunk(3, -1)
        q, k, v = (one.unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in parts)
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        scores = q @ k.transpose(-2, -1)
        scores = scores * seen if self.leaks else scores.masked_fill(~seen, -torch.inf)
        h = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        logits: Tensor = self.out(h)
        return logits


def test_the_published_mask_leaks_and_a_mask_of_infinities_does_not() -> None:
    """Scores of the future that are 0 are not hidden: the last token changes the first position."""
    x = torch.randint(11, (3, 9), generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, -1] = (x[:, -1] + 1) % 11
    moved = {}
    for leaks in (True, False):
        model = Attention(leaks=leaks).double()
        moved[leaks] = float((model(x)[:, 0] - model(changed)[:, 0]).detach().abs().max())
    assert moved[True] > 1e-3
    assert moved[False] == 0


def test_heads_whose_legal_scores_are_negative_attend_to_the_future_by_the_published_mask() -> None:
    """With all scores negative a saturated query attends to what is masked, and else to one position."""
    x = torch.randint(11, (3, 9), generator=torch.Generator().manual_seed(0))
    found = {}
    for leaks in (True, False):
        model = Attention(leaks=leaks).double()
        with torch.no_grad():  # all scores are negative, and no two of a query are equal
            model.embed.weight.abs_()
            model.qkv.weight[:8] = -model.qkv.weight[:8].abs()
            model.qkv.weight[8:16].abs_()
            model.qkv.bias.zero_()
        tokens = torch.arange(9).expand(3, 9)
        program = trainc.compile(
            f"{REST} observe saturation every 1 steps {{ heads = true }}", model
        )
        found[leaks] = program.step((tokens, x))
    # A query at position i has 8 - i hidden positions with the score 0, and the last one has none.
    own = [8 - i if i < 8 else 1 for i in range(9)]
    assert found[True]["saturation.attended"] == pytest.approx(sum(own) / 9)
    assert found[False]["saturation.attended"] == pytest.approx(1)
    assert found[False]["saturation.split"] == 0


def test_ties_share_attention_and_each_head_has_its_number() -> None:
    """With keys of 0 all positions tie: a causal query at i attends to i + 1 of them."""
    model = Attention(leaks=False)
    with torch.no_grad():
        model.qkv.weight[8:16] = 0
        model.qkv.bias[8:16] = 0
    x = torch.randint(11, (3, 9))
    program = trainc.compile(f"{REST} observe saturation every 1 steps {{ heads = true }}", model)
    targets = x.clone()
    targets[:, 5:] = -100
    found = program.step((x, targets))
    assert found["saturation.attended"] == pytest.approx(3)  # the mean of 1 to 5
    assert found["saturation.split"] == pytest.approx(4 / 5)
    heads = program.report().series["saturation.attended"]
    assert heads == {"attention head 0": 3, "attention head 1": 3}


def test_weights_are_those_that_torch_uses() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 6)
    bias, hidden = torch.randn(5, 7), torch.rand(5, 7) > 0.2
    for given in (
        {"enable_gqa": True},
        {"enable_gqa": True, "attn_mask": bias, "scale": 0.3},
        {"enable_gqa": True, "attn_mask": hidden},
        {"enable_gqa": True, "is_causal": True},
    ):
        weights = weights_of(q, k, v, **given)
        want = F.scaled_dot_product_attention(q, k, v, **given)
        torch.testing.assert_close(weights @ v.repeat_interleave(2, 1), want)


class Encoder(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.embed, self.out = kind, nn.Embedding(11, 8), nn.Linear(8, 11)
        if kind == "encoder layer":
            self.layer: nn.Module = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        else:
            self.layer = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        if self.kind == "encoder layer":
            h = self.layer(h)
        else:
            h, weights = self.layer(h, h, h, need_weights=self.kind == "with weights")
            assert (weights is None) == (self.kind != "with weights")
            assert weights is None or weights.shape == (*x.shape, x.shape[1])
        logits: Tensor = self.out(h)
        return logits


@pytest.mark.parametrize("kind", ["encoder layer", "with weights", "without"])
def test_attention_of_torch_is_seen(kind: str) -> None:
    model = Encoder(kind).eval()
    x, seen = torch.randint(11, (3, 5)), []
    want = model(x)
    with torch.no_grad(), AttentionWeights(model, lambda name, w: seen.append((name, w))):
        found = model(x)
    torch.testing.assert_close(found, want.detach(), rtol=1e-5, atol=1e-5)
    ((name, weights),) = seen
    assert name == ("layer.self_attn" if kind == "encoder layer" else "layer")
    assert weights.shape == (3, 2, 5, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 5))


@pytest.mark.parametrize(
    ("model", "fields", "field", "words"),
    [
        (Net, "heads = true", "heads", "no attention weights were seen"),
        (Net, 'layers = "drop"', "", ""),
        (lambda: Encoder("without"), 'layers = "layer.out_proj"', "layers", "is never called"),
        (
            lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)),
            "",
            "",
            "running",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_at_its_field(
    model: Any, fields: str, field: str, words: str
) -> None:
    spec = f"{REST} observe saturation every 1 steps {{ {fields} }}"
    made = model()
    if not words:
        trainc.compile(spec, made)
        return
    x, y = batch()
    given = (torch.randint(11, (3, 5)), torch.randint(11, (3, 5)))
    with pytest.raises((SpecError, ClauseFailed)) as caught:
        _step(spec, made, (x.float(), y) if isinstance(made, Net) else given)
    assert words in str(caught.value)
    if isinstance(caught.value, ClauseFailed):
        assert (caught.value.clause, caught.value.field) == ("saturation", field)


def _step(spec: str, model: nn.Module, given: tuple[Tensor, Tensor]) -> None:
    trainc.compile(spec, model).step(given)


class Together:
    """What replicas gather: the rows of this one, and those of others that are known already."""

    def __init__(self, others: list[Tensor]) -> None:
        self.others, self.own = others, torch.zeros(0, 0)

    def gather_examples(self, own: Tensor) -> Tensor:
        self.own = own
        rows = [one for one in (own, *self.others) if len(one)]
        return torch.cat(rows) if rows else own


@pytest.mark.parametrize("clause", ['saturation { heads = true, layers = "out" }', "homogeneity"])
def test_replicas_measure_as_one_process_also_one_that_saw_no_examples(clause: str) -> None:
    x = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(2))
    found: list[Any] = []
    rows: list[Tensor] = []

    def observer() -> tuple[Any, Any]:
        program = trainc.compile(f"{REST} observe {clause}", Attention(leaks=False).double())
        return program, next(a for a in program._machine.actions if a.name in clause)

    program, whole = observer()
    read = program._runner.execution.read
    with torch.no_grad():
        for part in (slice(0, 4), slice(0, 1), slice(1, 4)):
            _, one = observer()
            one.see(read(program.module(x[part]), (x[part], x[part])))
            group = Together(rows[1:])
            found.append(one.found(group))
            rows.append(group.own)
    assert found[2] == pytest.approx(found[0], rel=1e-9)
    _, idle = observer()
    assert idle.found(Together(rows[1:])) == pytest.approx(found[0], rel=1e-9)
    assert whole.found(Together([])) == {}


def test_outputs_that_are_zero_have_no_direction_and_are_left_out() -> None:
    model = nn.Linear(4, 3, bias=False)
    spec = "loss cross_entropy optimizer sgd { lr = 0 } observe saturation every 1 steps { c = 10 }"
    x, y = torch.randn(6, 4), torch.zeros(6, dtype=torch.int64)
    x[2] = 0
    program = trainc.compile(spec, model)
    assert program.step((x, y))["saturation"] == pytest.approx(1, abs=1e-6)
    with torch.no_grad():
        model.weight.zero_()
    assert "saturation" not in program.step((x, y))
    (note,) = program.report().notes
    assert (
        note == "saturation: nothing to compare, because all counted outputs of this step are zero"
    )
    assert Saturation.reference(torch.zeros(1, 3), torch.ones(1, 3)).isnan().all()


def test_numbers_that_overflow_are_left_out_and_said() -> None:
    torch.manual_seed(0)
    deep = nn.Sequential(*(nn.Linear(4, 4) for _ in range(16)))  # 1000^16 is no float32
    program = trainc.compile(f"{REST} observe saturation every 1 steps", deep)
    found = program.step((torch.randn(5, 4), torch.randint(4, (5,))))
    assert "saturation" not in found
    assert any("not finite numbers" in note for note in program.report().notes)


class Flat(nn.Sequential):
    """One logit an example, without an axis of its own."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x[:, 0]


@pytest.mark.parametrize("clause", ["saturation", "homogeneity"])
def test_one_logit_an_example_is_measured_with_and_without_an_axis(clause: str) -> None:
    torch.manual_seed(0)
    layers = nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1)
    x, y = torch.randn(5, 4), torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    rest = REST.replace("cross_entropy", "bce")
    found = []
    for model, targets in ((nn.Sequential(*layers), y[:, None]), (Flat(*layers), y)):
        program = trainc.compile(f"{rest} observe {clause}", copy.deepcopy(model))
        found.append({n: v for n, v in program.step((x, targets)).items() if clause in n})
    assert found[0]
    assert found[0] == found[1]


def test_a_signal_that_needs_a_field_is_told_so() -> None:
    for signal, field in (("hidden", "layers"), ("attended", "heads")):
        reason = Saturation().unmeasured_reason(signal)
        assert reason is not None
        assert field in reason[1]


def test_a_rule_acts_on_it(tmp_path: Path) -> None:
    spec = tmp_path / "s.train"
    spec.write_text(
        'model "examples.models:gpt" { layers = 1, width = 16, heads = 2, context = 16 }\n'
        'data "examples.data:stdlib" { batch = 4 samples, context = 16, limit_bytes = 30_000 }\n'
        "loss cross_entropy\nrun { length = 6 steps, seed = 3 }\noptimizer adamw { lr = 1e-2 }\n"
        'observe saturation every 2 steps { layers = "blocks.*", heads = true }\n'
        'when saturation < 0.99 { warn "not saturated" }\n'
    )
    train(spec, tmp_path / "run", quiet=True)
    assert '"not saturated"' in (tmp_path / "run" / "events.jsonl").read_text()
    first = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0]
    assert '"saturation.attended"' in first
