"""`trainc.functional.per_example_sq_norms` against torch.func, on many kinds of models."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from trainc.compiler.errors import ExampleAxisUnknown, SiteError
from trainc.functional import measured_parameters, per_example_sq_norms

CASES = json.loads((Path(__file__).parents[1] / "reference/noise_scale.json").read_text())["cases"]


def by_vmap(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Return each example's squared gradient norms under the mean over the batch, by torch.func."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor], one: Tensor, target: Tensor) -> Tensor:
        out = functional_call(model, values, (one[None],))
        return F.mse_loss(out, target[None], reduction="sum") / len(x)

    found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    return {name: g.flatten(1).square().sum(1) for name, g in found.items()}


def agrees(model: nn.Module, x: Tensor) -> None:
    model = model.double()
    with torch.no_grad():
        y = torch.randn_like(model(x))
    expected = by_vmap(model, x, y)
    found = per_example_sq_norms(model, lambda out: F.mse_loss(out, y, reduction="sum") / len(x), x)
    names = measured_parameters(model)
    assert set(names) == set(expected)
    for name, column in zip(names, found.T, strict=True):
        torch.testing.assert_close(column, expected[name], rtol=1e-9, atol=1e-14)
    assert all(p.grad is None for p in model.parameters())
    assert not any("trainc" in vars(module) for module in model.modules())


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_convolutions_of_any_shape(data: st.DataObject) -> None:
    dims = data.draw(st.integers(1, 3))
    groups = data.draw(st.sampled_from([1, 2, 3]))
    inner, outer = (groups * data.draw(st.integers(1, 2)) for _ in range(2))
    kernel = [data.draw(st.integers(1, 3)) for _ in range(dims)]
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](
        inner,
        outer,
        kernel,  # type: ignore[arg-type]
        stride=data.draw(st.integers(1, 2)),
        padding=data.draw(st.integers(0, 2)),
        dilation=data.draw(st.integers(1, 2)),
        groups=groups,
        bias=data.draw(st.booleans()),
    )
    x = torch.randn(data.draw(st.integers(1, 4)), inner, *[6] * dims, dtype=torch.float64)
    agrees(nn.Sequential(layer, nn.Tanh()), x)


@settings(max_examples=12, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    inputs=st.integers(1, 5),
    outputs=st.integers(1, 5),
    bias=st.booleans(),
)
def test_linear_layers_and_norms_of_any_shape(
    shape: list[int], inputs: int, outputs: int, bias: bool
) -> None:
    model = nn.Sequential(
        nn.LayerNorm(inputs), nn.Linear(inputs, outputs, bias=bias), nn.Tanh(), nn.RMSNorm(outputs)
    )
    agrees(model, torch.randn(*shape, inputs, dtype=torch.float64))


@pytest.mark.parametrize(
    "norm", [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(4, 4)]
)
def test_norms_over_channels(norm: nn.Module) -> None:
    agrees(nn.Sequential(norm, nn.Tanh()), torch.randn(3, 4, 5, 6, dtype=torch.float64))


@pytest.mark.parametrize("padding", [None, 2])
def test_embeddings(padding: int | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4, padding_idx=padding), nn.Linear(4, 3))
    agrees(model, torch.randint(7, (4, 5)))


def test_a_selector_chooses_columns_in_the_models_order() -> None:
    model = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3), nn.RMSNorm(3))
    x = torch.randn(4, 3)
    whole = per_example_sq_norms(model, lambda out: out.square().mean(), x)
    norms = per_example_sq_norms(model, lambda out: out.square().mean(), x, on="role(norm)")
    assert measured_parameters(model) == tuple(n for n, _ in model.named_parameters())
    assert measured_parameters(model, "role(norm)") == ("0.weight", "0.bias", "2.weight")
    torch.testing.assert_close(norms, whole[:, [0, 1, 4]])
    one = per_example_sq_norms(model, lambda out: out.square().mean(), x, on=["2.weight", "1"])
    assert measured_parameters(model, ["2.weight", "1"]) == ("1.weight", "1.bias", "2.weight")
    torch.testing.assert_close(one, whole[:, 2:])


def test_a_model_in_eval_mode_is_measured_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.BatchNorm1d(3)).eval()
    x = torch.randn(4, 3)
    found = per_example_sq_norms(model, lambda out: out.square().mean(), x, on=["0"])
    assert found.shape == (4, 2)
    assert not model.training


class Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)  # type: ignore[no-any-return]


def test_what_cannot_be_measured_says_why() -> None:
    x = torch.randn(4, 3)
    mixing = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="`1` is a BatchNorm in train mode"):
        per_example_sq_norms(mixing, lambda out: out.sum(), x)
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="must return one number"):
        per_example_sq_norms(model, lambda out: out, x)
    with pytest.raises(ValueError, match="`9` is neither"):
        per_example_sq_norms(model, lambda out: out.sum(), x, on=["9"])
    with pytest.raises(ValueError, match="selects no parameter"):
        per_example_sq_norms(model, lambda out: out.sum(), x, on="type(LayerNorm)")
    odd = nn.Sequential(nn.Flatten(0, 1), nn.Linear(3, 3))
    with pytest.raises(ExampleAxisUnknown, match="first axis"):
        per_example_sq_norms(odd, lambda out: out.sum(), torch.randn(4, 5, 3))
    with pytest.raises(ValueError, match=r"PReLU.* cannot be measured"):
        per_example_sq_norms(nn.PReLU(3), lambda out: out.sum(), x)
    apart: nn.Module = Idle()
    with pytest.raises(SiteError, match="`idle` does not affect the loss"):
        per_example_sq_norms(apart, lambda out: out.sum(), x)
    assert not any("trainc" in vars(module) for module in apart.modules())


class SharedNorms(nn.Module):
    """Two norms of one weight, or of one bias."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.a, self.b = nn.LayerNorm(3), nn.LayerNorm(3)
        setattr(self.b, what, getattr(self.a, what))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_norms_that_share_a_parameter_are_refused(what: str) -> None:
    with pytest.raises(
        ValueError, match=rf"`a`, `b` share `a.{what}`; per-example norms of shared weights"
    ):
        per_example_sq_norms(SharedNorms(what), lambda out: out.sum(), torch.randn(4, 3))


def test_frozen_parameters_have_no_column() -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double(), torch.randn(4, 3).double()
    every = per_example_sq_norms(model, lambda out: out.square().mean(), x)
    model[0].weight.requires_grad_(False)
    names = ("0.bias", "1.weight", "1.bias")
    for on in (None, "type(Linear)", ["0", "1"]):
        assert measured_parameters(model, on) == names
    found = per_example_sq_norms(model, lambda out: out.square().mean(), x, on="type(Linear)")
    torch.testing.assert_close(found, every[:, 1:])
    with pytest.raises(ValueError, match=r"`0.weight` is frozen"):
        measured_parameters(model, ["0.weight"])
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing to measure.*requires a gradient"):
        measured_parameters(model, '"0"')


def test_a_selectors_expectation_is_checked() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    assert len(measured_parameters(model, "type(Linear) expect 2")) == 4
    with pytest.raises(ValueError, match="matches 2 modules, not 5"):
        measured_parameters(model, "type(Linear) expect 5")


def test_inputs_without_examples_are_an_error() -> None:
    with pytest.raises(ValueError, match="no tensor with the examples"):
        per_example_sq_norms(nn.Linear(3, 3), lambda out: out.sum(), {"input": 3.0})


COMPUTED: dict[str, tuple[Callable[[], nn.Module], list[int]]] = {
    "linear": (lambda: nn.Linear(3, 3), [4, 3]),
    "linear without bias": (lambda: nn.Linear(3, 3, bias=False), [4, 3]),
    "conv": (lambda: nn.Conv1d(3, 2, 1), [4, 3, 5]),
    "norm": (lambda: nn.LayerNorm(3), [4, 3]),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("layer", COMPUTED)
def test_a_weight_computed_from_other_parameters_is_an_error(layer: str, hooked: bool) -> None:
    make, shape = COMPUTED[layer]
    by = nn.utils.weight_norm if hooked else nn.utils.parametrizations.weight_norm
    model = nn.Sequential(by(make(), dim=0))
    with pytest.raises(ValueError, match=r"`0\..*computed from"):
        per_example_sq_norms(model, lambda out: out.sum(), torch.randn(shape))


def test_a_heads_bias_that_its_parent_names_too_is_measured() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(3))
            self.decoder = nn.Linear(3, 3)
            self.decoder.bias = self.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.decoder(x)  # type: ignore[no-any-return]

    model = nn.Sequential(nn.LayerNorm(3), Head())
    assert measured_parameters(model)[2:] == ("1.bias", "1.decoder.weight")
    agrees(model, torch.randn(4, 5, 3, dtype=torch.float64))
    found = per_example_sq_norms(
        model, lambda out: out.square().mean(), torch.randn(4, 3).double(), on="type(Linear)"
    )
    assert found.shape == (4, 2)


def test_a_weight_that_an_unknown_layer_holds_as_well_is_refused_by_both_names() -> None:
    class Scaled(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * 3

    model = nn.Sequential(Scaled(7, 3), nn.Linear(3, 7, bias=False))
    model[1].weight = model[0].weight
    ids = torch.randint(7, (4, 5))
    with pytest.raises(ValueError, match=r"`0` shares `0.weight` with `1`.*Exclude `1`, `0` from"):
        per_example_sq_norms(model, lambda out: out.sum(), ids, on="type(Linear) - type(Embedding)")


def test_a_projection_that_attention_never_runs_is_refused_by_its_name() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    x = torch.randn(3, 5, 8).double()
    with pytest.raises(ValueError, match=r"`self_attn.out_proj` is the output projection"):
        per_example_sq_norms(layer, lambda out: out.square().mean(), x, on="type(Linear)")
    on = "type(Linear) - type(NonDynamicallyQuantizableLinear)"
    assert per_example_sq_norms(layer, lambda out: out.square().mean(), x, on=on).shape == (3, 4)


def lcg(shape: list[int], seed: int, scale: float = 1.0, plus: float = 0.0) -> Tensor:
    x, values = seed & 0x7FFFFFFF, []
    for i in range(math.prod(shape) + 8):
        x = (1103515245 * x + 12345) & 0x7FFFFFFF
        if i >= 8:
            values.append(scale * (2 * (x >> 8) / 2**23 - 1))
    return torch.tensor(values, dtype=torch.float64).view(*shape) + plus


def layer_of(case: str) -> nn.Module:
    """Return the reference file's layer with its weights."""
    given = CASES[case]["inputs"]
    kinds: dict[str, Callable[[], nn.Module]] = {
        "linear_3d": lambda: nn.Linear(5, 6),
        "layernorm_3d": lambda: nn.LayerNorm(8, eps=given["eps"]),
        "rmsnorm_2d": lambda: nn.RMSNorm(9, eps=given["eps"]),
        "embedding": lambda: nn.Embedding(given["V"], 4, padding_idx=given["padding_idx"]),
        "conv2d": lambda: nn.Conv2d(4, 6, 3, given["stride"], given["padding"]),
    }
    layer: nn.Module = kinds[case]().double()
    for name, parameter in layer.named_parameters():
        if name in given:
            parameter.data = lcg(**given[name])
    return layer


@pytest.mark.parametrize("case", ["linear_3d", "layernorm_3d", "rmsnorm_2d", "embedding", "conv2d"])
def test_a_layers_norms_are_the_published_ones(case: str) -> None:
    given, expected = CASES[case]["inputs"], CASES[case]["outputs"]
    model, dy = nn.Sequential(layer_of(case)), lcg(**given["dy"])
    x = torch.tensor(given["ids"]) if "ids" in given else lcg(**given["x"])
    found = per_example_sq_norms(model, lambda out: (out * dy).sum(), x)
    for name, column in zip(measured_parameters(model), found.T, strict=True):
        published = expected[f"pe_{name.removeprefix('0.')}"]
        torch.testing.assert_close(column.tolist(), published, rtol=1e-10, atol=0)
