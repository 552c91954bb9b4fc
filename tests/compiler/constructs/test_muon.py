"""Muon against torch's class, bit for bit, and the division of a model between it and another optimizer."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainc
from tests.conformance import Setup, tiny_gpt, tokens
from trainc.compiler.constructs.optimizer.muon import Muon
from trainc.compiler.program.program import Program
from trainc.dsl.printing.formatter import format_source
from trainc.dsl.text.source import Source
from trainc.dsl.values.value_json import Number

BOTH = (
    "loss cross_entropy run { length = 40 steps }"
    " optimizer muon { lr = 0.02 * warmup(4 steps), weight_decay = 0.01, others = adamw { lr = 1e-3 } }"
)


def conformance() -> Setup:
    """Return a model of matrices alone."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Linear(6, 12, bias=False), nn.Tanh(), nn.Linear(12, 3, bias=False)
        return nn.Sequential(*layers)

    def batch(seed: int) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        return torch.randn(6, 6, generator=draw), torch.randn(6, 3, generator=draw)

    clause = "optimizer muon on all { lr = 0.02, weight_decay = 0.1 }"
    return Setup(model, batch, "loss mse run { length = 400 steps, seed = 3 }", clause)


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return weights after five updates, by the program and by definition from the gradients it met."""
    compiled, reference = {}, {}
    settings: Any = itertools.product((True, False), ("original", "match_rms_adamw"), (4, 3, 2))
    for nesterov, adjust, rows in settings:
        torch.manual_seed(0)
        model = nn.Linear(3, rows, bias=False).double()
        start, gradients = model.weight.detach().clone(), []
        muon = Muon(lr=Number(0.05), nesterov=nesterov, adjust_lr_fn=adjust)
        fields = f"lr = 0.05, nesterov = {str(nesterov).lower()}, adjust_lr_fn = {adjust}"
        spec = f"loss mse optimizer muon on all {{ {fields}, weight_decay = 0.1 }}"
        program = trainc.compile(spec, model)
        for _ in range(5):
            x, y = torch.randn(2, 8, max(rows, 3), dtype=torch.float64)
            program.loss((x[:, :3], y[:, :rows])).backward()
            assert model.weight.grad is not None
            gradients.append(model.weight.grad.clone())
            program.update()
        key = f"nesterov {nesterov}, {adjust}, {rows} rows"
        compiled[key] = model.weight.detach()
        reference[key] = muon.reference(start, gradients, 0.05, 0.1)
    return compiled, reference


def weights(program: Program) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in program.module.named_parameters()}


def optimizer_of(spec: str, model: nn.Module | None = None) -> dict[str, str]:
    return {
        row["name"]: row["optimizer"] for row in trainc.plan(spec, model or tiny_gpt()).parameters
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "nesterov = false, momentum = 0.5": {"nesterov": False, "momentum": 0.5},
    "adjust_lr_fn = match_rms_adamw": {"adjust_lr_fn": "match_rms_adamw"},
    "ns_coefficients = [2, -1.5, 0.5], ns_steps = 9, eps = 1e-3": {
        "ns_coefficients": (2.0, -1.5, 0.5),
        "ns_steps": 9,
        "eps": 1e-3,
    },
}


@pytest.mark.parametrize("fields", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_matrices_are_those_of_torch_bit_for_bit(fields: str, dtype: torch.dtype) -> None:
    """The rest is torch's AdamW, bit for bit, too."""
    spec = f"loss cross_entropy optimizer muon {{ lr = 0.02, weight_decay = 0.01, {fields}"
    spec += ", " * bool(fields) + "others = adamw { lr = 1e-3, weight_decay = 0.1 } }"
    ours, theirs = tiny_gpt().to(dtype), tiny_gpt().to(dtype)
    chosen = {name for name, optimizer in optimizer_of(spec).items() if optimizer == "muon"}
    assert len(chosen) == 8
    named = dict(theirs.named_parameters())
    matrices = [p for name, p in named.items() if name in chosen]
    rest = [p for name, p in named.items() if name not in chosen]
    optimizers: tuple[Any, ...] = (
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01, **OPTIONS[fields]),
        torch.optim.AdamW(rest, lr=1e-3, weight_decay=0.1),
    )
    program = trainc.compile(spec, ours, executor="module")
    for seed in range(3):
        program.step(tokens(seed))
        x, y = tokens(seed)
        nn.functional.cross_entropy(theirs(x).flatten(0, 1), y.flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for name, weight in weights(program).items():
        assert torch.equal(weight, named[name]), name


def test_others_train_what_is_no_hidden_matrix() -> None:
    found = optimizer_of(BOTH)
    assert {found[n] for n in found if n.startswith(("embed", "head"))} == {"adamw"}
    assert {found[n] for n in found if "bias" in n or "ln" in n} == {"adamw"}
    matrices = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc.weight", "mlp.proj.weight")
    assert {n for n, o in found.items() if o == "muon"} == {
        f"blocks.{block}.{name}" for block in (0, 1) for name in matrices
    }


@pytest.mark.parametrize(
    "on", ["", 'on "blocks.*.mlp.**" & ndim(2)', "on ndim(2) - role(head) expect 10"]
)
def test_a_nested_clause_is_a_second_clause_on_the_rest(on: str) -> None:
    selected = on.removeprefix("on ").partition(" expect")[0] or Muon.default_on
    nested = f"optimizer muon {on} {{ lr = 0.02, others = adamw {{ lr = 1e-3 }} }}"
    two = f"optimizer muon {on} {{ lr = 0.02 }} optimizer adamw on trainable - ({selected}) {{ lr = 1e-3 }}"
    one, other = (trainc.check(f"loss cross_entropy {text}").unwrap() for text in (nested, two))
    assert one == other
    assert one.fingerprint == other.fingerprint
    plans = [trainc.plan(spec, tiny_gpt()) for spec in (one, other)]
    assert plans[0].hash == plans[1].hash


def test_a_nested_clause_may_have_a_path_and_names_of_the_spec() -> None:
    spec = (
        "loss cross_entropy let rate = 1e-3 optimizer muon { lr = 0.02,"
        ' others = torch("torch.optim:NAdam") { lr = rate, betas = [0.5, 0.9] } }'
    )
    assert not trainc.check(spec).diagnostics
    assert set(optimizer_of(spec).values()) == {"muon", "torch"}


@pytest.mark.parametrize(
    ("clauses", "rule", "at"),
    [
        ("optimizer muon { lr = 0.02 }", "unclaimed-parameters", "optimizer muon { lr = 0.02 }"),
        ("optimizer muon on all { lr = 0.02 }", "bad-value", "all"),
        ("optimizer muon { lr = 0.02, others = 3 }", "bad-value", "3"),
        ("optimizer muon { lr = 0.02, others = adam { lr = 1 } }", "unknown-construct", "adam"),
        ("optimizer muon { lr = 0.02, others = adamw { rate = 1 } }", "unknown-field", "rate"),
        ("optimizer muon { lr = 0.02, others = adamw { } }", "missing-field", "adamw"),
        ("optimizer sgd { lr = 0.02, others = adamw { lr = 1 } }", "bad-value", "adamw { lr = 1 }"),
        ("optimizer sgd { lr = adamw { lr = 1 } }", "bad-value", "adamw { lr = 1 }"),
        (
            "optimizer muon { lr = 1, others = sgd { lr = 1 }, others = adamw { lr = 1 } }",
            "duplicate-field",
            "adamw { lr = 1 }",
        ),
        ("optimizer muon { lr = 1, others = torch(3) { lr = 1 } }", "syntax", "(3) { lr = 1"),
        ("optimizer muon { lr = 1, ns_steps = 100, others = sgd { lr = 1 } }", "bad-value", "100"),
    ],
)
def test_what_cannot_be_meant_is_an_error_at_its_place(clauses: str, rule: str, at: str) -> None:
    with pytest.raises(trainc.SpecError) as error:
        trainc.plan(f"loss cross_entropy {clauses}", tiny_gpt())
    found = {(d.rule, d.span.text) for d in error.value.diagnostics if d.span}
    assert (rule, at) in found


@pytest.mark.parametrize(
    "mask", ["sift on ndim(2) { density = 1% }", "magnitude on ndim(2) { density = 50% }"]
)
def test_a_mask_on_a_matrix_is_refused(mask: str) -> None:
    with pytest.raises(trainc.SpecError) as error:
        trainc.plan(f"{BOTH} mask {mask}", tiny_gpt())
    (problem,) = error.value.diagnostics
    assert (problem.rule, len(problem.labels)) == ("conflicting-effects", 2)


def test_a_torch_without_it_is_an_error_at_the_clause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(trainc.SpecError, match=r"no `torch\.optim\.Muon`") as error:
        trainc.plan(BOTH, tiny_gpt())
    (problem,) = error.value.diagnostics
    assert problem.rule == "missing-library"
    assert problem.span is not None
    assert problem.span.text.startswith("optimizer muon")


def test_a_resumed_run_is_bit_equal() -> None:
    whole, first, second = (trainc.compile(BOTH, tiny_gpt()) for _ in range(3))
    for seed in range(6):
        whole.step(tokens(seed))
    for seed in range(3):
        first.step(tokens(seed))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for seed in range(3, 6):
        second.step(tokens(seed))
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(second)[name]), name


def test_the_trust_ratio_scales_its_whole_update() -> None:
    spec = "loss mse optimizer muon on all { lr = 0.1 } lr trust_ratio on all"
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False).double()
    before = model.weight.detach().clone()
    trainc.compile(spec, model).step((torch.randn(5, 4).double(), torch.randn(5, 3).double()))
    moved = (model.weight.detach() - before).norm()
    torch.testing.assert_close(moved, 0.1 * before.norm(), rtol=1e-12, atol=0)


def test_complex_matrices_are_refused_before_the_first_step() -> None:
    model = nn.Linear(4, 3, bias=False, dtype=torch.complex64)
    with pytest.raises(trainc.SpecError, match="`weight` is complex, and Muon takes real matrices"):
        trainc.plan("loss mse optimizer muon on all { lr = 0.1 }", model)


def test_it_is_formatted_with_its_braces_and_comments() -> None:
    text = (
        "optimizer muon { lr = 0.02,\n# for the rest\nothers = adamw { # as before\nlr = 3e-4 * (warmup(5%) then"
        " cosine(to = 10%)), weight_decay = 0.1 on matrices, betas = [0.9, 0.95] }, }\n"
    )
    once = format_source(Source("spec", text))
    assert format_source(Source("again", once)) == once
    assert "# for the rest" in once
    assert "# as before" in once
    assert "    others = adamw {\n        lr = 3e-4" in once
    check = (
        trainc.check("run { length = 9 steps } " + text),
        trainc.check("run { length = 9 steps } " + once),
    )
    assert check[0].unwrap() == check[1].unwrap()
