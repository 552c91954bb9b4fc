"""PACE: its modes beside a loop by hand, where its noise goes, what views share, and what is refused."""

import copy
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import trainc
import trainc.functional as f
from tests.compiler.constructs.test_pace import PACE as STORED
from tests.compiler.constructs.test_pace import Delta, tensor
from tests.conformance import divided
from trainc.compiler.bind.bound_clause import BoundClause
from trainc.compiler.constructs.regularize.outputs.pace import Pace
from trainc.compiler.errors import FieldError
from trainc.compiler.lower.lowering import Lowering
from trainc.compiler.lower.lowering_context import LoweringContext
from trainc.compiler.method.lowered_method import LoweredMethod
from trainc.compiler.model.inventory import build_inventory
from trainc.compiler.program.program import Program
from trainc.dsl.text.errors import SpecError
from trainc.kernels.noise.factors import factor
from trainc.kernels.noise.philox import pack_key
from trainc.runtime.companion.history import History
from trainc.runtime.processes.replica_group import ReplicaGroup
from trainc.runtime.schedule.unit_conversion import UnitConversion
from trainc.runtime.step.record import Signals
from trainc.runtime.storage.random_streams import derive_seed

SEED, LR, SIGMA, WEIGHT = 9, 0.3, 0.6, 0.4
REST = (
    f"loss cross_entropy optimizer sgd {{ lr = {LR} }} run {{ length = 30 steps, seed = {SEED} }}"
)
SITES = ["0", "2"]
EXECUTORS = pytest.mark.parametrize("executor", ["graph", "module"])


def spec(mode: str, more: str = "", rest: str = REST, on: str = '"0" | "2"') -> str:
    fields = f"sigma = {SIGMA}, weight = {WEIGHT}, mode = {mode}{more}"
    return f"{rest} regularize pace on {on} {{ {fields} }}"


def model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def samples(count: int = 10, *shape: int) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(5)
    x = torch.randn(count, *shape, 4, generator=made, dtype=torch.float64)
    return x, torch.randint(3, (count, *shape), generator=made)


def z(x: Tensor, step: int, site: int, views: int) -> Tensor:
    """Return the factor of a site on x (views * B, ..., C), by the generator alone."""
    key = pack_key(derive_seed(SEED, "noise") & 0xFFFFFFFF, step)
    shared = factor(x, torch.tensor(SIGMA, dtype=x.dtype), key, site, views, "token", None)
    return shared.view(len(x), *[1] * (x.dim() - 2), x.shape[-1])


def noisy(net: nn.Module, x: Tensor, step: int, views: int) -> Tensor:
    """Run the model with the noise of a step on its linear layers."""
    for name, layer in net.named_children():
        x = layer(x)
        if name in SITES:
            x = x * z(x, step, SITES.index(name), views)
    return x


def by_hand(
    mode: str, visits: list[Tensor], x: Tensor, y: Tensor
) -> Iterator[tuple[float, nn.Module]]:
    """Yield the consistency of each step, and the model after it."""
    net = model()
    table: dict[int, Tensor] = {}
    for step, ids in enumerate(visits):
        paired = mode == "pair" or (mode == "lazy(3)" and step % 3 == 0)
        views = 2 if paired else 1
        logits = noisy(net, torch.cat([x[ids]] * views), step, views)
        one = logits[: len(ids)]
        term = torch.zeros((), dtype=x.dtype)
        if paired:
            term = (one - logits[len(ids) :]).square().sum(-1).mean()
        elif mode == "history":
            squares = [
                (one[row] - table[i]).square().sum(-1).mean()
                for row, i in enumerate(ids.tolist())
                if i in table
            ]
            term = sum(squares, start=term) / len(ids)
            table |= {i: r.detach().half().double() for i, r in zip(ids.tolist(), one, strict=True)}
        loss = F.cross_entropy(one.flatten(0, -2), y[ids].flatten()) + WEIGHT * term
        net.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in net.parameters():
                assert p.grad is not None
                p.sub_(LR * p.grad)
        yield float(term.detach()), net


VISITS = [torch.tensor(ids) for ids in ([0, 5, 2], [1, 2, 9], [5, 0, 9], [3, 2, 1], [9, 8, 7])]


@EXECUTORS
@pytest.mark.parametrize(
    ("mode", "tokens"), [("pair", ()), ("lazy(3)", (2,)), ("history", (2,)), ("history", ())]
)
def test_every_mode_is_its_definition(mode: str, tokens: tuple[int, ...], executor: Any) -> None:
    x, y = samples(10, *tokens)
    program = trainc.compile(spec(mode), model(), executor=executor)
    assert program.reads_sample_ids is (mode == "history")
    for step, (term, net) in enumerate(by_hand(mode, VISITS, x, y)):
        ids = VISITS[step]
        given: Any = {"sample_ids": ids} if mode == "history" else {}
        batch: Any = (x[ids], y[ids])
        if mode == "history" and step > 2:  # divided, it is the same step
            given = {name: list(all_.split([1, 2])) for name, all_ in given.items()}
            batch = divided(batch, [1, 2])
        found = program.step(batch, **given)
        assert found["consistency"] == pytest.approx(term, rel=1e-9, abs=1e-15)
        for got, want in zip(program.module.parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert mode != "history" or term > 0


@pytest.mark.parametrize("mode", ["pair", "history"])
def test_under_weights_of_classes_micro_batches_add_up(mode: str) -> None:
    rest = REST.replace("entropy", "entropy { class_weight = [0.5, 3, 0] }")
    (x, y), given = samples(6), torch.arange(6)
    whole, parts = (trainc.compile(spec(mode, rest=rest), model()) for _ in range(2))
    for _ in range(2):
        one = whole.step((x, y), sample_ids=given)
        other = parts.step(divided((x, y), (1, 2, 3)), sample_ids=list(given.split((1, 2, 3))))
        assert other["consistency"] == pytest.approx(one["consistency"], rel=1e-10)
    assert one["consistency"] > 0
    for got, want in zip(parts.module.parameters(), whole.module.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_a_lazy_step_passes_the_whole_batch_once() -> None:
    x, y = samples()
    program = trainc.compile(spec("lazy(2)", rest=REST), model())
    rows: list[int] = []
    program.module[2].register_forward_hook(lambda m, args, out: rows.append(len(out)))  # type: ignore[index]
    found = [program.step((x, y))["consistency"] for _ in range(4)]
    assert set(rows[-4:]) == {20, 10}
    assert [one > 0 for one in found] == [True, False, True, False]


@EXECUTORS
def test_a_history_is_in_checkpoints_and_goes_on(executor: Any) -> None:
    x, y = samples()
    programs = [trainc.compile(spec("history"), model(), executor=executor) for _ in range(2)]
    first, second = programs
    said = []
    for step, ids in enumerate(VISITS):
        if step == 3:
            second.load_state_dict(copy.deepcopy(first.state_dict()))
            table = first.state_dict()["actions"]["pace history"]
            assert table["rows"].dtype == torch.float16
            assert table["seen"].nonzero().flatten().tolist() == [0, 1, 2, 5, 9]
        said = [p.step((x[ids], y[ids]), sample_ids=ids) for p in programs[: 1 + (step >= 3)]]
    assert said[0]["consistency"] > 0
    assert said[0] == said[1]
    for one, other in zip(first.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("distance", ["mse", "kl"])
def test_what_does_not_count_has_no_part_in_a_history(distance: Any) -> None:
    construct = Pace(sigma=1, weight=1, distance=distance)  # type: ignore[arg-type]
    logits, last = torch.randn(2, 4, 3, 5, dtype=torch.float64).unbind()
    known = torch.tensor([True, False, True, True])
    counted = torch.rand(4, 3) < 0.6
    want = sum(
        f.consistency(logits[b, t], last[b, t], measure=distance)
        for b in range(4)
        for t in range(3)
        if known[b] and counted[b, t]
    ) / int(counted.sum())
    logits[~counted], last[~counted] = float("inf"), float("nan")
    found = construct.history_distance(logits.requires_grad_(), last, known, counted)
    torch.testing.assert_close(found.detach(), want)
    (gradient,) = torch.autograd.grad(found, logits)
    assert gradient.isfinite().all()


class Two(ReplicaGroup):
    """One of two processes, whose other one sends what is given."""

    def __init__(self, rank: int, other: list[Tensor]) -> None:
        self.size, self.rank, self.other = 2, rank, other

    def _gather(self, own: Tensor) -> list[Tensor]:
        theirs = self.other.pop(0)
        return [own, theirs] if self.rank == 0 else [theirs, own]


class Saw:
    def __init__(self, ids: list[int], logits: Tensor) -> None:
        self.sample_ids, self._logits = torch.tensor(ids), logits

    def view(self, index: int) -> Tensor:
        return self._logits


def test_replicas_keep_one_table() -> None:
    logits = torch.randn(5, 2)
    parts = (([4, 1, 7], logits[:3]), ([1, 2], logits[3:]))
    sent = []
    for ids, rows in parts:
        padded = torch.zeros(3, 3, dtype=torch.float64)
        padded[: len(ids)] = torch.cat([torch.tensor(ids)[:, None].double(), rows.double()], 1)
        sent.append([torch.tensor([float(len(ids)), 3.0], dtype=torch.float64), padded])
    tables = []
    for rank, (ids, rows) in enumerate(parts):
        history = History("pace", 1.0, "use another mode")
        history.see(Saw(ids, rows))  # type: ignore[arg-type]
        history.found(Two(rank, sent[1 - rank]))
        tables.append(history)
    assert torch.equal(tables[0].rows, tables[1].rows)
    assert tables[0].seen.nonzero().flatten().tolist() == [1, 2, 4, 7]
    wanted = torch.stack([logits[3], logits[4], logits[0], logits[2]])
    found = tables[1].recall(torch.tensor([1, 2, 4, 7, 6]), lambda: ())
    torch.testing.assert_close(found[:4], wanted.half().float())
    assert found[4].isnan().all()


# where the noise goes


class Blocks(nn.Module):
    """Two blocks with layers of a kind, and what drops."""

    def __init__(self, make: Callable[[], nn.Module], drop: Callable[[], nn.Module] = nn.Identity):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            [nn.ModuleDict({"fc": make(), "drop": drop()}) for _ in range(2)]
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["drop"](torch.tanh(block["fc"](x)))  # type: ignore[index]
        logits: Tensor = self.head(x.mean(1))
        return logits


def linear() -> nn.Module:
    return nn.Linear(4, 4)


def with_peft(config: Any = None, dora: bool = False) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    fields: Any = {"r": 2, "init_lora_weights": "gaussian", "use_dora": dora}
    config = config or LoraConfig(target_modules=["fc"], **fields)
    tuned: nn.Module = get_peft_model(Blocks(linear).double(), config)
    return tuned


ADAPTERS = {
    "ours": (
        "blocks.{}.fc.lora",
        'adapt lora on "blocks.**.fc" { rank = 2, alpha = 4, train = "head.**" }',
    ),
    "dora": (
        "blocks.{}.fc.dora",
        'adapt dora on "blocks.**.fc" { rank = 2, alpha = 4, train = "head.**" }',
    ),
    "lora_mul": (
        "blocks.{}.fc.lora_mul",
        'adapt lora_mul on "blocks.**.fc" { rank = 2, train = "head.**" }',
    ),
    "peft": ("base_model.model.blocks.{}.fc.lora_B.default", ""),
    "peft dora": ("base_model.model.blocks.{}.fc.lora_magnitude_vector.default", ""),
}


def grown(program: Program) -> None:
    """Let the adapters do something."""
    with torch.no_grad():
        for name, parameter in program.module.named_parameters():
            if "lora" in name or "dora" in name:
                parameter.copy_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
                )


@EXECUTORS
@pytest.mark.parametrize("whose", ADAPTERS)
def test_the_noise_of_an_adapted_layer_is_on_what_the_adapter_adds(
    whose: str, executor: Any
) -> None:
    where, clause = ADAPTERS[whose]
    of_peft = whose.startswith("peft")
    net = with_peft(dora="dora" in whose) if of_peft else Blocks(linear).double()
    text = f"""loss cross_entropy optimizer sgd on trainable {{ lr = 1 }} run {{ length = 9 steps, seed = {SEED} }}
    {clause} regularize pace on type(Linear) {{ sigma = {SIGMA}, weight = {WEIGHT} }}"""
    program = trainc.compile(text, net, executor=executor)
    grown(program)
    names = [site.module for site in program._runner.execution.rewrite.hooks]
    assert [n for n in names if "head" not in n] == [where.format(i) for i in range(2)]
    x, y = samples(5, 3)[0], samples(5)[1]
    with program.sites.inactive():
        h = torch.cat([x, x])
        inner: Any = net.base_model.model if of_peft else net  # type: ignore[union-attr]
        for i, block in enumerate(inner.blocks):
            fc = block["fc"]
            base = getattr(fc, "base_layer", fc)
            h0 = F.linear(h, base.weight, base.bias)
            dh = fc(h) - h0
            h = h + torch.tanh(h0 + z(dh, 0, names.index(where.format(i)), 2) * dh)
        logits = inner.head(h.mean(1))
        head = next(n for n in names if n.endswith("head"))
        logits = logits * z(logits, 0, names.index(head), 2)
    one, two = logits.detach().chunk(2)
    found = program.step((x, y))
    assert found["consistency"] == pytest.approx(
        float((one - two).square().sum(-1).mean()), rel=1e-9
    )
    assert found["data_loss"] == pytest.approx(float(F.cross_entropy(one, y)), rel=1e-9)


@EXECUTORS
def test_a_conv1d_is_a_linear_layer(executor: Any) -> None:
    program = trainc.compile(
        spec("pair", on="type(Conv1D)"), Blocks(lambda: Conv1D(4, 4)), executor=executor
    )
    x, y = samples(5, 3)[0].float(), samples(5)[1]
    assert program.step((x, y))["consistency"] > 0


# what views share


class DropPath(nn.Module):
    """Drops whole examples, as timm's does."""

    drop_prob = 0.5

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        mask = x.new_empty((x.shape[0], *[1] * (x.dim() - 1))).bernoulli_(0.5)
        return x * mask.div_(0.5)


class StochasticDepth(nn.Module):
    """Drops the whole batch, as torchvision's does with `mode="batch"`."""

    p = 0.5

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.empty([1] * x.dim(), dtype=x.dtype).bernoulli_(0.5)
        return x * noise.div_(0.5)


@EXECUTORS
@pytest.mark.parametrize("drop", [DropPath, StochasticDepth, nn.Dropout, nn.Dropout1d])
def test_the_views_share_what_is_dropped(drop: Any, executor: Any) -> None:
    text = spec("pair", on='"head"').replace(f"sigma = {SIGMA}", "sigma = 1e-9")
    program = trainc.compile(text, Blocks(linear, drop).double(), executor=executor)
    x, y = samples(8, 3)[0], samples(8)[1]
    losses = set()
    for _ in range(4):
        found = program.step((x, y))
        losses.add(found["data_loss"])
        assert 0 < found["consistency"] < 1e-12
    assert len(losses) > 1
    assert not [n for n in program.report().notes if "each view" in n]


@EXECUTORS
def test_noise_keeps_bfloat16(executor: Any) -> None:
    net = model(torch.bfloat16)
    program = trainc.compile(spec("pair"), net, executor=executor)
    x, y = samples()
    found = program.step((x.bfloat16(), y))
    assert found["consistency"] > 0
    assert {p.grad.dtype for p in net.parameters() if p.grad is not None} <= {torch.bfloat16}


# what is refused


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("sometimes", "expected a mode: `pair`, `history` or `lazy(every = ...)`"),
        ("lazy(0)", "expected a whole number of steps, 1 or more"),
        ("lazy(2.5)", "expected a whole number of steps, 1 or more"),
        ("lazy", "expected a mode"),
        ("lazi(3)", "expected a mode"),
    ],
)
def test_a_wrong_mode_is_located(mode: str, said: str) -> None:
    found = trainc.check(spec(mode))
    (problem,) = found.diagnostics
    shown = f"{problem.message} {problem.labels[0].text}"
    assert said in shown
    assert problem.labels[0].span is not None


def test_a_mode_is_read_and_written() -> None:
    for given in ("pair", "history", "lazy(4)", "lazy(every = 4)"):
        spec_ = trainc.check(spec(given)).spec
        assert spec_ is not None
        assert given in str(spec_.clauses[-1].construct.mode)  # type: ignore[attr-defined]
        construct = Pace(sigma=1, weight=1, mode=given)  # type: ignore[arg-type]
        assert Pace.model_validate(construct.model_dump(mode="json")) == construct
        assert spec_.clauses[-1].construct.mode == construct.mode  # type: ignore[attr-defined]


def test_a_lazy_clause_has_no_period_of_its_own() -> None:
    text = spec("lazy(4)", on='"0" every 2 steps')
    with pytest.raises(SpecError, match="remove `every 2 steps`"):
        trainc.compile(text, model())


def test_an_adapter_that_adds_nothing_of_its_own_is_refused() -> None:
    from peft import LoHaConfig

    config = LoHaConfig(target_modules=["fc"], r=2)
    with pytest.raises(SpecError, match=r"is of peft's LoHaLayer.*adapters of LoRA"):
        trainc.compile(spec("pair", on="type(Linear)"), with_peft(config))


def test_a_table_that_is_too_large_is_refused_before_the_run_and_in_it() -> None:
    units = UnitConversion(8, 512, 1e6)
    net = model()
    context = LoweringContext(net, build_inventory(net), units, None, Signals())
    rule = Pace(sigma=1, weight=1, mode="history")  # type: ignore[arg-type]
    lowered = LoweredMethod()
    rule.lower(Lowering(BoundClause(rule, "pace", ("0",)), context, lowered))
    (history,) = (one for one in lowered.actions if isinstance(one, History))
    assert history.memory() == 2 * 10**6 * 512 * 3
    rule = Pace(sigma=1, weight=1, mode="history", max_table=2)  # type: ignore[arg-type]
    with pytest.raises(FieldError, match=r"\[1000000, 512, 3\] that takes 2.86 GiB") as caught:
        rule.lower(Lowering(BoundClause(rule, "pace", ("0",)), context, LoweredMethod()))
    assert caught.value.field == "mode"
    program = trainc.compile(spec("history", ", max_table = 1e-8"), model(), executor="module")
    x, y = samples()
    with pytest.raises(ValueError, match=r"GiB in 16 bits.*`mode = lazy\(4\)`"):
        program.step((x, y), sample_ids=torch.arange(10))


def test_logits_of_another_shape_are_refused() -> None:
    program = trainc.compile(spec("history"), model(), executor="module")
    ids = torch.arange(3)
    program.step(samples(3, 2), sample_ids=ids)
    with pytest.raises(ValueError, match=r"last visit.* \[2, 3\] and \[4, 3\]: give every"):
        program.step(samples(3, 4), sample_ids=ids)


# functions


def test_the_functions_are_the_published_ones() -> None:
    row = STORED["sigma_schedule_vit_b"]
    for depths in (row["num_ids"], range(row["num_ids"])):
        found = f.pace_sigma(depths, row["sigma"], skip=row["block_start"])
        assert found == pytest.approx(row["sigmas"], rel=1e-12)
    sites = [b for b in range(12) for _ in range(4)] + [12]
    assert len(sites) == row["n_adapters"]
    assert f.pace_sigma(sites, 1.2, skip=1)[4:8] == [1.2] * 4
    for case in ("mse", "mse_3d"):
        one, two = (tensor(STORED[case][name]).requires_grad_() for name in ("l1", "l2"))
        loss = f.consistency(one, two, measure="mse", reduce="mean")
        assert float(loss.detach()) == pytest.approx(STORED[case]["loss"], rel=1e-6)
        each = f.consistency(one, two, reduce="none")
        assert each.shape == one.shape[:-1]
        torch.testing.assert_close(each.sum(), f.consistency(one, two, reduce="sum"))
    p, q = torch.randn(2, 6, 4, dtype=torch.float64).softmax(-1)
    m = (p + q) / 2

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1).mean()

    logs = p.log(), q.log()
    torch.testing.assert_close(f.consistency(*logs, measure="kl"), (kl(p, q) + kl(q, p)) / 2)
    torch.testing.assert_close(f.consistency(*logs, measure="js"), (kl(p, m) + kl(q, m)) / 2)
    masked = torch.tensor([[0.0, 1.0, -torch.inf]], requires_grad=True)
    measures: tuple[Literal["kl", "js"], ...] = ("kl", "js")
    for measure in measures:
        (gradient,) = torch.autograd.grad(
            f.consistency(masked, masked.detach() + torch.tensor([1.0, 0, 0]), measure=measure),
            masked,
        )
        assert gradient.isfinite().all()
    with pytest.raises(ValueError, match="one of"):
        f.consistency(p, q, measure="l2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="of one shape"):
        f.consistency(p, q[:2])
    with pytest.raises(ValueError, match="not below `skip`"):
        f.pace_sigma(2, 1.0, skip=2)


def test_the_published_adapters_and_their_noise_are_ours() -> None:
    """h0 + z * dh, with the eps of the official code."""
    row = STORED["noise_BC"]
    weights = {name: tensor(one) for name, one in row["params"].items()}
    base = nn.Linear(4, 3)
    delta = Delta(base, 2)
    delta.delta_prompt_up = nn.Parameter(torch.empty(2, 1))
    with torch.no_grad():
        for name, value in weights.items():
            own = base if name.startswith("base") else delta
            own.get_parameter(name.removeprefix("base_module.")).copy_(value)
    x = tensor(row["x"]).requires_grad_()
    out = base(x) + (1 + row["sigma"] * tensor(row["eps"])) * delta(x)
    torch.testing.assert_close(out, tensor(row["out"]))
    out.backward(tensor(row["grad_out"]))
    torch.testing.assert_close(x.grad, tensor(row["grad_x"]))
    for name, gradient in row["grads"].items():
        own = base if name.startswith("base") else delta
        found = own.get_parameter(name.removeprefix("base_module.")).grad
        torch.testing.assert_close(found, tensor(gradient), rtol=1e-4, atol=1e-6)
    lora = STORED["adapter_LoRAadd"]
    p = {name: tensor(one) for name, one in lora["params"].items()}
    h0 = F.linear(tensor(lora["x"]), p["base_module.weight"], p["base_module.bias"])
    dh = F.linear(tensor(lora["x"]), p["delta_W_down"] @ p["delta_W_up"], p["delta_b"])
    torch.testing.assert_close(h0, tensor(lora["forward_base"]))
    torch.testing.assert_close(dh, tensor(lora["forward_adapter"]))
    torch.testing.assert_close(h0 + dh, tensor(lora["forward_merge"]))
