"""Weights that layers compute of their parameters: what acts on a parameter acts on the weight, or is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import trainc
from trainc.compiler.model.inventory import build_inventory
from trainc.compiler.structure.weights import read_weight

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
REST = "run { length = 9 steps } loss mse optimizer adamw { lr = 0.01 } "


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def doubled(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", Doubled())


def pruned(layer: nn.Module) -> None:
    prune.random_unstructured(layer, "weight", 0.5)


MADE: dict[str, Callable[[Any], object]] = {
    "prune": pruned,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": doubled,
    "hooked weight_norm": nn.utils.weight_norm,
    "hooked spectral_norm": nn.utils.spectral_norm,
}
ZEROS = [
    "mask magnitude on SELECTED { density = 50% }",
    "mask movement on SELECTED every 2 steps { density = 50% }",
    "mask rigl on SELECTED every 2 steps { density = 50% }",
    "mask set on SELECTED every 2 steps { density = 50% }",
    "mask n_m on SELECTED { n = 2, m = 4 }",
]
CHANGED = [
    "regularize drop_connect on SELECTED { p = 0.2 }",
    "regularize mixout on SELECTED { p = 0.9 }",
    "perturb noise on SELECTED { sigma = 0.5 }",
]
PENALTIES = [
    "regularize orthogonal on SELECTED { weight = 0.1 }",
    "regularize spectral on SELECTED { weight = 0.1 }",
]


def net(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 4)
    )
    MADE[kind](model[2])
    return model


def whole(model: nn.Module) -> str:
    """Return a selector of the parameter that has the shape of the computed weight."""
    (name,) = [n for n, p in model.named_parameters() if n.startswith("2.") and p.shape == (12, 12)]
    return f'"{name}"'


def compiled(clause: str, kind: str) -> trainc.Program:
    model = net(kind)
    return trainc.compile(REST + clause.replace("SELECTED", whole(model)), model)


def data() -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(1)
    return torch.randn(6, 8, generator=made), torch.randn(6, 4, generator=made)


@pytest.mark.parametrize("clause", ZEROS)
@pytest.mark.parametrize("kind", MADE)
def test_zeros_of_a_parameter_are_zeros_of_its_weight_or_an_error(kind: str, clause: str) -> None:
    hooked = kind.startswith("hooked") and "n_m" in clause
    if kind in ("prune", "orthogonal", "own") or hooked:
        with pytest.raises(trainc.SpecError, match=r"`2\.weight` is (computed of|pruned by)"):
            compiled(clause, kind)
        return
    program = compiled(clause, kind)
    for _ in range(3):
        program.step(data())
    with program.evaluation_weights(), torch.no_grad():
        model = program.module.eval()
        model(data()[0])
        weight = model[2].weight  # type: ignore[index]
    found = int((weight == 0).sum())
    assert found == 72 or (
        found > 72 and ("rigl" in clause or "set" in clause)
    )  # what grows begins at 0


@pytest.mark.parametrize("clause", CHANGED)
@pytest.mark.parametrize("kind", MADE)
def test_a_weight_that_is_changed_where_layers_compute_is_changed_or_an_error(
    kind: str, clause: str
) -> None:
    if kind == "prune" or kind.startswith("hooked"):
        by = kind.rpartition(" ")[2]
        with pytest.raises(trainc.SpecError, match=rf"by a hook of\s+torch\.nn\.utils\.{by}"):
            compiled(clause, kind)
        return
    program, plain = compiled(clause, kind), trainc.compile(REST, net(kind))
    losses = [[one.step(data())["loss"] for _ in range(4)] for one in (program, plain)]
    # `mixout` mixes with the start, which is where the first step is.
    assert losses[0][3] != losses[1][3]


@pytest.mark.parametrize("clause", PENALTIES)
@pytest.mark.parametrize("kind", MADE)
def test_a_penalty_on_singular_values_is_of_weights_that_layers_use(kind: str, clause: str) -> None:
    with pytest.raises(
        trainc.SpecError, match=r"whose\s+singular values are not those of the weight"
    ):
        compiled(clause, kind)


@pytest.mark.parametrize(
    "clause", ['lora on "2" { rank = 2, alpha = 2 }', 'lora_mul on "2" { rank = 2 }']
)
@pytest.mark.parametrize("kind", MADE)
def test_an_adapter_of_a_computed_weight_is_refused_by_its_parameter(
    kind: str, clause: str
) -> None:
    with pytest.raises(trainc.SpecError, match=r"its weight is computed of `2\.") as found:
        trainc.compile(f"{REST} adapt {clause}", net(kind))
    assert "remove the parametrization" in str(found.value)


@pytest.mark.parametrize("kind", MADE)
def test_spectra_are_those_of_the_weight_that_the_layer_used(kind: str) -> None:
    model = net(kind).eval()
    model(data()[0])
    used: Any = model[2].weight
    weights = {one.name: one for one in build_inventory(model).weights}
    assert list(weights) == ["0.weight", "2.weight", "4.weight"]
    assert torch.equal(read_weight(model, weights["2.weight"]), used)
