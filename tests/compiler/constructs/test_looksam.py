"""SAM with its second pass once in a while, and with what comes of it in other constructs' places."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import trainc
from tests.compiler.constructs.test_sam import CLAUSES as OTHERS
from tests.compiler.constructs.test_sam import data, kept, net, small_gpt, words
from tests.compiler.perturbed_loops import ALPHA, CLAUSES, RHO, Loop, norm
from tests.conformance import divided
from trainc.compiler.constructs.perturb._base import KeptAscent
from trainc.compiler.constructs.perturb.looksam import LookSam
from trainc.compiler.errors import SiteError

SGD = "loss cross_entropy optimizer sgd { lr = 0.3, momentum = 0.9, clip = 0.4 } "
ADAMW = "loss cross_entropy optimizer adamw { lr = 0.01 } "
FAMILY = ["msam", "gradient_norm", "looksam", "extrapolate"]


def loop(method: str, model: nn.Module, base: str) -> Loop:
    if base is SGD:
        sgd = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
        return Loop(method, model, sgd, 0.4)
    return Loop(method, model, torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.0), None)


def plain_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 4)).double()


@pytest.mark.parametrize("base", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize(("executor", "scale"), [("module", True), ("graph", False)])
@pytest.mark.parametrize("method", FAMILY)
def test_the_family_is_the_loop_written_by_hand(
    method: str, executor: str, scale: bool, base: str
) -> None:
    theirs, ours = plain_net(), plain_net()
    program = trainc.compile(base + CLAUSES[method], ours, executor=executor)  # type: ignore[arg-type]
    hand = loop(method, theirs, base)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scale else None
    for i in range(5):
        x, y = data(i)

        def passes(x: Tensor = x, y: Tensor = y) -> float:
            loss = cross_entropy(theirs(x), y)
            loss.backward()
            return loss.item()

        want, before = hand.step(passes), kept(ours)
        got = program.step(divided((x, y), (3, 4)), scaler)
        assert got["loss"] == pytest.approx(want, rel=1e-12)
        assert any(not torch.equal(v, before[n]) for n, v in kept(ours).items())
        if scaler is not None:
            scaler.update()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", ["mask", "zeros"])
@pytest.mark.parametrize("method", FAMILY)
def test_entries_that_a_mask_does_not_train_neither_move_nor_change(method: str, mask: str) -> None:
    model = small_gpt()
    spec = SGD + OTHERS[mask] + CLAUSES[method]
    program = trainc.compile(spec, model, executor="module")
    seen: list[dict[str, Tensor]] = []
    model.register_forward_pre_hook(lambda *_: seen.append(kept(model)))
    for i in range(5):
        program.step(words(i))
    before = kept(model)
    seen.clear()
    program.step(words(5))
    after = kept(model)
    for name, entries in program.execution.method.masks.items():
        trains = entries.trained(torch.ones_like(after[name])).bool()
        assert 0 < int(trains.sum()) < trains.numel()
        for state in (*seen, after):
            assert torch.equal(state[name][~trains], before[name][~trains])
    moves = method != "looksam"  # it is between two refreshes
    assert moves == any(not torch.equal(seen[-1][name], before[name]) for name in before)


def test_a_first_gradient_that_overflows_is_not_mixed() -> None:
    program = trainc.compile(SGD + CLAUSES["gradient_norm"], plain_net().float())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127 * 1.5)
    x, y = data(0, dtype=torch.float32)
    assert program.step((x * 1e3, y), scaler)["skipped"] == 1.0
    (ascent,) = program._machine.around
    assert isinstance(ascent, KeptAscent)
    assert ascent.first == {}
    assert "was not finite" in program.summary()[-1]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("optimizer sgd { lr = 1 } perturb msam { rho = 1 }", "has no momentum"),
        (
            'optimizer torch("torch.optim:RMSprop") { lr = 1 } perturb msam { rho = 1 }',
            "keeps none",
        ),
        (
            SGD + "perturb looksam every 2 steps { rho = 1, alpha = 1, refresh = 2 steps }",
            "refresh",
        ),
        (SGD + "perturb gradient_norm { radius = 1, alpha = 2 }", "1 or less"),
    ],
)
def test_what_cannot_be_is_said(spec: str, said: str) -> None:
    spec = spec if "loss" in spec else "loss cross_entropy " + spec

    def train() -> None:
        program = trainc.compile(spec, net())
        program.step(data(0))
        program.step(data(1))

    with pytest.raises((trainc.SpecError, SiteError), match=said):
        train()


def test_views_have_to_be_accepted() -> None:
    views = "regularize r_drop { weight = 1 } "
    model = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5)).double()
    for method in ("gradient_norm", "looksam"):
        with pytest.raises(trainc.SpecError, match="write `with_views = true`") as caught:
            trainc.plan(SGD + views + CLAUSES[method], model)
        assert str(caught.value).count("^^^") >= 1
        trainc.plan(SGD + views + CLAUSES[method].replace(" }", ", with_views = true }"), model)
    trainc.plan(SGD + views + CLAUSES["msam"], model)


def compiled_and_reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights after a refresh and a step with what it kept, at rate 1, and those of `reference`."""
    ours, theirs = plain_net(), plain_net()
    clause = f"perturb looksam {{ rho = {RHO}, alpha = {ALPHA}, refresh = 2 steps }}"
    program = trainc.compile(f"loss cross_entropy optimizer sgd {{ lr = 1 }} {clause}", ours)
    method = LookSam(rho=RHO, alpha=ALPHA, refresh="2 steps")  # type: ignore[arg-type]
    named = dict(theirs.named_parameters())

    def gradient(i: int) -> dict[str, Tensor]:
        x, y = data(i)
        found = torch.autograd.grad(cross_entropy(theirs(x), y), [*named.values()])
        return dict(zip(named, found, strict=True))

    first = gradient(0)
    with torch.no_grad():
        for n, p in named.items():
            p.add_(RHO * first[n] / norm(first))
    second = gradient(0)
    v = method.reference(first, second)
    with torch.no_grad():
        for n, p in named.items():
            p.sub_(RHO * first[n] / norm(first) + second[n])
    third = gradient(1)
    factor = ALPHA * norm(third) / norm(v)
    wanted = {n: (p - third[n] - factor * v[n]).detach() for n, p in named.items()}
    program.step(data(0))
    program.step(data(1))
    return kept(ours), wanted
