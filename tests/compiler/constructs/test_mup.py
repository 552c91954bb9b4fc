"""muP: the table of rates, features that learn alike at every width, and what else muP needs."""

import math

import pytest
import torch
from torch import Tensor, nn

import trainc
from tests.conformance import tiny_gpt, tokens
from trainc.compiler.constructs.lr.mup import Mup

PARTS = {"embed.token.weight": "input", "blocks.0.mlp.fc.weight": "hidden", "ln_f.bias": "vector"}
PARTS |= {"blocks.1.attn.proj.weight": "hidden", "head.weight": "output"}


def factors(clauses: str, model: nn.Module | None = None) -> dict[str, float]:
    """Return the product of the factors of each parameter in the plan."""
    plan = trainc.plan(f"loss cross_entropy {clauses}", model or tiny_gpt())
    return {row["name"]: math.prod(float(v) for v in row["lr_values"]) for row in plan.parameters}


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the moves of one step of SGD by the compiled clause, and those without it times the table's factors."""
    found: list[dict[str, Tensor]] = []
    for clause in ("", "lr mup { base_width = 4 }"):
        net = tiny_gpt().double()
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        trainc.compile(f"loss cross_entropy optimizer sgd {{ lr = 0.1 }} {clause}", net).step(
            tokens(0)
        )
        found.append({name: p.detach() - before[name] for name, p in net.named_parameters()})
    mup = Mup(base_width=4)
    expected = {n: mup.reference(part, 4.0, "gradient") * found[0][n] for n, part in PARTS.items()}  # type: ignore[arg-type]
    return {name: found[1][name] for name in PARTS}, expected


@pytest.mark.parametrize("updates", ["adaptive", "gradient"])
def test_the_factors_are_those_of_the_table(updates: str) -> None:
    clause = {"adaptive": "adamw { lr = 1e-3 }", "gradient": "sgd { lr = 0.1 }"}[updates]
    found = factors(f"optimizer {clause} lr mup {{ base_width = 4 }}")
    mup = Mup(base_width=4)
    for name, part in PARTS.items():
        assert found[name] == pytest.approx(mup.reference(part, 4.0, updates))  # type: ignore[arg-type]


def test_a_multiplier_of_the_logits_moves_the_factor_of_the_head() -> None:
    clause = "lr mup { base_width = 4, output = multiplier }"
    assert factors(f"optimizer adamw {{ lr = 1 }} {clause}")["head.weight"] == pytest.approx(1.0)
    assert factors(f"optimizer sgd {{ lr = 1 }} {clause}")["head.weight"] == pytest.approx(4.0)


def test_muon_keeps_its_rate_in_hidden_layers() -> None:
    found = factors(
        "optimizer muon { lr = 1, others = adamw { lr = 1 } } lr mup { base_width = 4 }"
    )
    assert found["blocks.0.mlp.fc.weight"] == pytest.approx(1.0)
    assert found["head.weight"] == pytest.approx(0.25)


def moved(width: int, clause: str) -> float:
    """Return how far the outputs of an MLP move in one step of AdamW, whose head begins at zero."""
    torch.manual_seed(0)
    layers = nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4)
    net = nn.Sequential(*layers)
    nn.init.zeros_(layers[-1].weight)
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(16, 8, generator=draw), torch.randn(16, 4, generator=draw)
    program = trainc.compile(f"loss mse optimizer adamw {{ lr = 1e-3 }} {clause}", net)
    before = net(x).detach()
    for _ in range(2):
        program.step((x, y))
    return float((net(x).detach() - before).abs().mean())


def test_outputs_move_alike_at_every_width() -> None:
    assert moved(1024, "") / moved(32, "") > 8
    ratio = moved(1024, "lr mup { base_width = 32 }") / moved(32, "")
    assert 0.5 < ratio < 2


def test_initial_values_are_checked_and_reported() -> None:
    model = tiny_gpt()
    with torch.no_grad():
        model.get_parameter("head.weight").mul_(1000)
    spec = "loss cross_entropy optimizer adamw { lr = 1e-3 } lr mup { base_width = 4, output = multiplier }"
    program = trainc.compile(spec, model)
    program.step(tokens(0))
    notes = [note for note in program.report().notes if note.startswith("mup norms")]
    assert any("multiply its logits by 0.25" in note for note in notes)
    assert any("`head.weight` (output) begins with" in note for note in notes)
    assert sum("(hidden) begins with" in note for note in notes) == 1
    assert any("norms at the start" in line for line in program.summary())
    weight = tiny_gpt().get_parameter("blocks.0.mlp.fc.weight").detach().double()
    norm = float(torch.linalg.matrix_norm(weight, 2)) / math.sqrt(64 / 16)
    (action,) = [a for a in program._method.actions if type(a).__name__ == "StartingNorms"]
    low, high = action.state_dict()["hidden"]
    assert low * 0.999 <= norm <= high * 1.001


@pytest.mark.parametrize(
    ("clause", "rule"),
    [
        ("lr mup { base_width = 16 }", "no-effect"),
        ("lr mup { base_width = 4 } until 3 steps", "syntax"),
        ("lr mup until 3 steps { base_width = 4 }", "bad-value"),
        ("lr mup { }", "missing-field"),
        ("lr mup { base_width = 0 }", "bad-value"),
    ],
)
def test_what_cannot_be_meant_is_said(clause: str, rule: str) -> None:
    spec = f"loss cross_entropy run {{ length = 9 steps }} optimizer adamw {{ lr = 1e-3 }} {clause}"
    try:
        found = list(trainc.plan(spec, tiny_gpt()).warnings)
    except trainc.SpecError as error:
        found = list(error.diagnostics)
    assert rule in [one.rule for one in found]


class Experts(nn.Module):
    """Three matrices in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 32, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight @ x.T).sum(0).T


def test_a_stack_has_the_norms_of_its_matrices() -> None:
    torch.manual_seed(0)
    experts = Experts()
    model = nn.Sequential(nn.Linear(8, 16), experts, nn.Linear(32, 10))
    spec = "loss cross_entropy optimizer adamw { lr = 1 } lr mup { base_width = 4 }"
    program = trainc.compile(spec, model)
    program.begin()
    (action,) = [a for a in program._method.actions if type(a).__name__ == "StartingNorms"]
    norms = torch.linalg.matrix_norm(experts.weight.detach().double(), 2) / math.sqrt(32 / 16)
    assert action.state_dict()["hidden"] == pytest.approx([float(norms.max())] * 2, rel=1e-5)


def test_complex_weights_have_norms_of_their_own() -> None:
    torch.manual_seed(0)
    layers = nn.Linear(16, 16, dtype=torch.complex64), nn.Linear(16, 16, dtype=torch.complex64)
    model = nn.Sequential(*layers, nn.Linear(16, 4, dtype=torch.complex64))
    program = trainc.compile("optimizer sgd { lr = 1 } lr mup { base_width = 4 }", model)
    program.begin()
    (action,) = [a for a in program._method.actions if type(a).__name__ == "StartingNorms"]
    norm = float(torch.linalg.matrix_norm(layers[1].weight.detach(), 2))
    assert action.state_dict()["hidden"] == pytest.approx([norm] * 2, rel=1e-5)


def test_an_optimizer_that_says_nothing_of_its_updates_is_refused() -> None:
    spec = 'loss cross_entropy optimizer torch("torch.optim:RMSprop") { lr = 1 } lr mup { base_width = 2 }'
    with pytest.raises(trainc.SpecError, match="not known of its optimizer"):
        trainc.plan(spec, tiny_gpt())


def test_a_tied_head_needs_a_multiplier() -> None:
    model = tiny_gpt()
    model.head.weight = model.embed.token.weight  # type: ignore[union-attr]
    with pytest.raises(trainc.SpecError, match="embedding and head in one"):
        trainc.plan(
            "loss cross_entropy optimizer adamw { lr = 1 } lr mup { base_width = 4 }", model
        )
    found = factors(
        "optimizer adamw { lr = 1 } lr mup { base_width = 4, output = multiplier }",
        model,
    )
    assert found["embed.token.weight"] == pytest.approx(1.0)
    # The width is that of the features, 16, not the number of tokens, 24.
    assert found["blocks.0.mlp.fc.weight"] == pytest.approx(1 / 4)
