"""Distillation: the published numbers, and training equal to a loop by hand with a frozen teacher."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.nn import functional as F

import trainc
from tests.conformance import divided, tiny_gpt, tokens
from trainc import functional
from trainc.compiler.constructs.regularize.outputs._prefix import Prefixed
from trainc.compiler.constructs.regularize.outputs.distill import Distill
from trainc.compiler.errors import SiteError
from trainc.runtime.data.batch import Batch

REFERENCE = Path(__file__).parents[2] / "reference/more_methods.json"
SPEC = "loss cross_entropy optimizer sgd { lr = 0.5 } run { length = 20 steps, seed = 1 } regularize distill"
ALL = torch.ones(1, dtype=torch.bool)


def distill(**fields: Any) -> Distill:
    return Distill(**({"weight": 1.0} | fields))


def published() -> tuple[Tensor, Tensor]:
    """Return the logits of teacher and student that the reference numbers are of."""
    i = torch.arange(8, dtype=torch.float64)
    return 2 * torch.sin(1.7 * i + 0.3)[None], torch.sin(1.7 * i + 1.3)[None]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 5)).double()


def batch(seed: int, examples: int = 6) -> Batch:
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 3, 4, generator=made, dtype=torch.float64)
    targets = torch.randint(5, (examples, 3), generator=made)
    targets[0, 1:], targets[4, 0] = -100, -100
    return x, targets


def kl(teacher: Tensor, student: Tensor, counted: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(teacher || student) by torch's kl_div, over the rows that count."""
    p, q = ((z[counted] / temperature).log_softmax(-1) for z in (teacher, student))
    return F.kl_div(q, p, log_target=True, reduction="batchmean") * temperature**2


def by_hand(
    made: nn.Module, batches: Sequence[list[Batch]], start: int, temperature: float
) -> None:
    """Train with weight 0.7, and with the teacher from step `start` on, when it is copied."""
    teacher = None
    for step, parts in enumerate(batches):
        if step == start:
            teacher = copy.deepcopy(made).eval()
        total = sum(int((y != -100).sum()) for _, y in parts)
        made.zero_grad()
        for x, y in parts:
            logits, counted = made(x), y != -100
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
            if teacher is not None:
                with torch.no_grad():
                    fixed = teacher(x)
                loss = loss + 0.7 * kl(fixed, logits, counted, temperature)
            (loss * (int(counted.sum()) / total)).backward()
        torch.optim.SGD(made.parameters(), 0.5).step()


def test_the_divergences_are_the_published_ones() -> None:
    row = json.loads(REFERENCE.read_text())["distill_topk"]
    teacher, student = published()
    assert float(distill().reference(teacher, student, ALL)) == pytest.approx(row["full"], rel=1e-9)
    student.requires_grad_()
    found = distill(top=3).reference(teacher, student, ALL)
    assert float(found.detach()) == pytest.approx(row["topk3"], rel=1e-9)
    found.backward()
    assert student.grad is not None
    assert student.grad[0].tolist() == pytest.approx(row["grad"], abs=1e-6)


def test_all_classes_one_by_one_are_the_whole_divergence() -> None:
    teacher, student = published()
    whole = distill().reference(teacher, student, ALL)
    torch.testing.assert_close(distill(top=8).reference(teacher, student, ALL), whole)
    torch.testing.assert_close(distill(top=7).reference(teacher, student, ALL), whole)


def test_directions_and_temperature_by_kl_div() -> None:
    teacher, student = published()
    forward = distill(temperature=3.0).reference(teacher, student, ALL)
    torch.testing.assert_close(forward, kl(teacher, student, ALL, 3.0))
    reverse = distill(temperature=3.0, direction="reverse").reference(teacher, student, ALL)
    torch.testing.assert_close(reverse, kl(student, teacher, ALL, 3.0))
    both = distill(temperature=3.0, direction="symmetric").reference(teacher, student, ALL)
    torch.testing.assert_close(both, (forward + reverse) / 2)


@pytest.mark.parametrize("direction", ["forward", "reverse", "symmetric"])
def test_masked_classes_add_nothing(direction: Any) -> None:
    teacher, student = published()
    rule = distill(direction=direction)
    wanted = rule.reference(teacher, student, ALL)
    masked = torch.full((1, 2), -torch.inf, dtype=torch.float64)
    own = torch.cat([student, masked], -1).requires_grad_()
    found = rule.reference(torch.cat([teacher, masked], -1), own, ALL)
    torch.testing.assert_close(found, wanted)
    found.backward()
    assert own.grad is not None
    assert own.grad[0, :8].isfinite().all()


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("sizes", [(), (1, 2, 3)], ids=["whole", "micro-batches"])
@pytest.mark.parametrize("executor", ["graph", "module"])
def test_training_is_a_loop_by_hand(executor: Any, sizes: Any, start: int) -> None:
    batches = [divided(b, sizes) if sizes else [b] for b in map(batch, range(5))]
    wanted = model()
    torch.manual_seed(5)
    by_hand(wanted, batches, start, 2.0)
    clause = f" from {start} steps {{ weight = 0.7, temperature = 2 }}"
    program = trainc.compile(SPEC + clause, model(), executor=executor)
    torch.manual_seed(5)
    said = [program.step(parts) for parts in batches]
    for got, want in zip(program.module.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    assert [one["distill"] == 0 for one in said] == [step < start for step in range(5)]


def test_a_resumed_run_has_the_same_teacher() -> None:
    spec = SPEC + " { weight = 0.7 }"
    program = trainc.compile(spec, model())
    torch.manual_seed(1)
    for seed in range(2):
        program.step(batch(seed))
    state = copy.deepcopy(program.state_dict())
    torch.manual_seed(2)
    program.step(batch(2))
    other = trainc.compile(spec, model())
    other.load_state_dict(state)
    torch.manual_seed(2)
    other.step(batch(2))
    for got, want in zip(other.module.parameters(), program.module.parameters(), strict=True):
        assert torch.equal(got, want)


def prompted() -> nn.Module:
    return tiny_gpt().double()


@pytest.mark.parametrize(
    ("executor", "sizes"), [("graph", ()), ("module", (1, 2, 3))], ids=["graph", "module"]
)
def test_a_teacher_that_reads_a_prefix_is_a_loop_by_hand(
    executor: Any, sizes: Any, tmp_path: Path
) -> None:
    (tmp_path / "prompt").write_bytes(bytes([3, 1]))
    batches = [(x[:, :5], y[:, :5]) for x, y in map(tokens, range(3))]
    wanted = prompted()
    teacher = copy.deepcopy(wanted).eval()
    clause = f' {{ weight = 0.7, prefix = "{tmp_path / "prompt"}" }}'
    program = trainc.compile(SPEC + clause, prompted(), executor=executor)
    for x, y in batches:
        program.step(divided((x, y), sizes) if sizes else (x, y))
        wanted.zero_grad()
        with torch.no_grad():
            fixed = teacher(torch.cat([torch.tensor([[3, 1]]).expand(6, 2), x], 1))[:, 2:]
        logits = wanted(x)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        (loss + 0.7 * kl(fixed, logits, y != -100, 1.0)).backward()
        torch.optim.SGD(wanted.parameters(), 0.5).step()
    for got, want in zip(program.module.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


def test_masks_and_positions_of_a_dict_are_those_of_the_whole_text() -> None:
    x = torch.tensor([[5, 6, 7], [8, 9, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    given = {"input_ids": x, "attention_mask": mask, "position_ids": torch.arange(3).expand(2, 3)}
    seen: dict[str, Any] = {}

    def run(inputs: dict[str, Any]) -> Tensor:
        seen.update(inputs)
        found: Tensor = inputs["input_ids"].double()[..., None]
        return found

    logits = Prefixed((1, 2), 5, "distill")(run, {**given, "use_cache": False})
    assert torch.equal(logits[..., 0], x.double())
    assert seen["input_ids"].tolist() == [[1, 2, 5, 6, 7], [1, 2, 8, 9, 0]]
    assert seen["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert seen["position_ids"].tolist() == [[0, 1, 2, 3, 4]] * 2
    assert seen["use_cache"] is False
    with pytest.raises(SiteError, match="`bias` has a value for each token"):
        Prefixed((1, 2), None, "distill")(run, {**given, "bias": mask})
    with pytest.raises(SiteError, match="prefix needs logits at every token"):
        Prefixed((1,), None, "distill")(lambda _: torch.zeros(2, 4), given)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("prefix = [1, 2, 3, 4, 5, 6, 7, 8]", "shorten the prefix to 7 tokens"),
        ('prefix = "no-such-file"', "the prefix cannot be read"),
        ("prefix = []", "`prefix` is empty"),
        ('tokenizer = "m:f"', "name one, or remove `tokenizer`"),
        ('teacher = "no-such-folder"', "the teacher's weights cannot be read"),
        ("top = 3, direction = reverse", "`top` is defined for `direction = forward` alone"),
    ],
)
def test_what_cannot_be_is_an_error_of_the_plan(fields: str, said: str) -> None:
    with pytest.raises(trainc.SpecError, match=said) as caught:
        trainc.plan(SPEC + f" {{ weight = 1, {fields} }}", tiny_gpt())
    assert caught.value.diagnostics[0].labels


def test_a_prefix_that_does_not_fit_before_a_sample_is_a_located_error_of_the_step() -> None:
    program = trainc.compile(SPEC + " { weight = 1, prefix = [1, 2] }", tiny_gpt())
    said = r"`prefix` has 2 tokens and a sample 8, and the model reads 8 at most"
    with pytest.raises(SiteError, match=said) as caught:
        program.step(tokens(0))
    assert (caught.value.clause, caught.value.field) == ("distill", "prefix")
    other = trainc.compile(SPEC + " { weight = 1, prefix = [1, 2] }", model())
    with pytest.raises(SiteError, match="needs inputs of tokens"):
        other.step(batch(0))


def test_a_teacher_of_other_weights_is_read_from_a_file(tmp_path: Path) -> None:
    other = model()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    save_model(other, str(tmp_path / "other.safetensors"))
    clause = f' {{ weight = 0.7, teacher = "{tmp_path / "other.safetensors"}" }}'
    program, own = trainc.compile(SPEC + clause, model()), model()
    x, y = batch(0)
    torch.manual_seed(3)
    said = program.step((x, y))
    torch.manual_seed(3)
    apart = kl(other.eval()(x), own(x), y != -100, 1.0)
    assert said["distill"] == pytest.approx(float(apart.detach()), rel=1e-10)
    with pytest.raises(trainc.SpecError, match="the weights are of another model") as caught:
        trainc.plan(SPEC + clause, nn.Linear(4, 5))
    assert caught.value.diagnostics[0].labels


def test_the_function_is_the_published_loss_and_says_what_it_cannot_take() -> None:
    row = json.loads(REFERENCE.read_text())["distill_topk"]
    teacher, student = published()
    teacher.requires_grad_()
    student.requires_grad_()
    found = functional.distill_loss(teacher, student, top=3)
    assert float(found.detach()) == pytest.approx(row["topk3"], rel=1e-9)
    found.backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert student.grad[0].tolist() == pytest.approx(row["grad"], abs=1e-6)
    p, q = (torch.cat([one, 2 * one]).detach() for one in (teacher, student))
    rows = functional.distill_loss(p, q, reduce="none", temperature=2.0, direction="symmetric")
    assert rows.shape == (2,)
    summed = functional.distill_loss(p, q, reduce="sum", temperature=2.0, direction="symmetric")
    torch.testing.assert_close(summed, rows.sum())
    wrong: Any
    for wrong in ({"top": 0}, {"top": 2, "direction": "reverse"}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="expected"):
            functional.distill_loss(teacher, student, **wrong)
    with pytest.raises(ValueError, match="expected one shape"):
        functional.distill_loss(teacher, student[:, :2])


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return loss and gradients of the second step, by the graph and by definition."""
    made = model().eval().train()
    program = trainc.compile(SPEC + " { weight = 0.7, top = 2 }", made, executor="graph")
    teacher = copy.deepcopy(made).eval()
    program.step(batch(0))
    x, y = batch(1)
    torch.manual_seed(1)
    loss = program.graph((x, y))
    named = dict(made.named_parameters())
    compiled = {"loss": loss} | {n: p.grad for n, p in named.items() if p.grad is not None}
    torch.manual_seed(1)
    logits = made(x)
    with torch.no_grad():
        fixed = teacher(x)
    rule = distill(top=2)
    wanted = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    wanted = wanted + 0.7 * rule.reference(fixed, logits, y != -100)
    found = torch.autograd.grad(wanted, list(named.values()))
    return compiled, {"loss": wanted.detach()} | dict(zip(named, found, strict=True))
