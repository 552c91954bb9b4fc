"""Lightning's Trainer under a spec: its numbers are those of the plain Trainer, and of the plain loop."""

from __future__ import annotations

import copy
import os
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.compiler.image_models import import_library
from tests.integrations.points import (
    ADAMW,
    GNS,
    METHOD,
    batches,
    equal,
    loader,
    near,
    network,
    plain_loop,
    points,
    same_metrics,
)
from tests.processes import run_processes, run_rank

pytestmark = [
    pytest.mark.models,
    pytest.mark.filterwarnings(
        "ignore"
    ),  # Lightning's advice on workers, loggers and its own imports
]
lightning: Any = import_library("lightning")


class Lit(lightning.LightningModule):  # type: ignore[misc]  # it has no types here
    """Trains by a spec, or by AdamW alone."""

    def __init__(self, spec: str | None = None, **given: Any) -> None:
        super().__init__()
        self.net, self.spec, self.given = network(), spec, given
        self.metrics: list[dict[str, float]] = []
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x)
        return found

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.seen.append((x, y))
        return cross_entropy(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("eval", cross_entropy(self(batch[0]), batch[1]))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.spec is not None:
            self.metrics.append(dict(self.optimizers().metrics))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        from trainc.integrations.lightning import spec_optimizer

        if self.spec is None:
            return torch.optim.AdamW(self.net.parameters(), lr=1e-3, weight_decay=0)
        return spec_optimizer(self, self.spec, **self.given)


class Manual(Lit):
    """Steps by itself, after every second batch."""

    def __init__(self, spec: str | None = None, **given: Any) -> None:
        super().__init__(spec, **given)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.manual_backward(cross_entropy(self(x), y) / 2)
        if batch_idx % 2:
            optimizer = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()


def trainer_of(**given: Any) -> Any:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    defaults = {"max_steps": 4, "accelerator": "cpu", "enable_checkpointing": False, **quiet}
    return lightning.Trainer(**{**defaults, **given})


def fit(
    module: Any, *, number: int = 16, size: int = 4, again: str | None = None, **given: Any
) -> Any:
    trainer = trainer_of(**given)
    trainer.fit(module, loader(points(number), size), ckpt_path=again)
    return trainer


def scaled(power: int = 10) -> dict[str, Any]:
    """Return the arguments of a Trainer whose losses a GradScaler scales: its scale is a power of 2."""
    from lightning.pytorch.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**power)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


CASES: list[dict[str, Any]] = [
    {},
    {"gradient_clip_val": 0.3},
    {"accumulate_grad_batches": 2},
    {"accumulate_grad_batches": 2, "number": 28, "gradient_clip_val": 0.3},  # 7 batches
    {"precision": "bf16-mixed"},
    {"scaled": True},
    {"scaled": True, "gradient_clip_val": 0.3, "accumulate_grad_batches": 2, "number": 20},
]


@pytest.mark.parametrize("given", CASES)
def test_an_empty_spec_is_bit_equal_to_the_plain_trainer(given: dict[str, Any]) -> None:
    ours, plain = Lit(ADAMW), Lit()
    trainers = []
    for module in (plain, ours):
        arguments = {k: v for k, v in given.items() if k != "scaled"}
        trainers.append(fit(module, **arguments, **(scaled() if "scaled" in given else {})))
    equal(ours, plain)
    assert [trainer.global_step for trainer in trainers] == [4, 4]


@pytest.mark.parametrize("parts", [1, 2])
def test_a_spec_gives_the_numbers_of_the_plain_loop(parts: int) -> None:
    module = Lit(METHOD)
    trainer = fit(module, size=4 // parts, accumulate_grad_batches=parts)
    made = batches(16, 4 // parts)
    model, expected = plain_loop(METHOD, [made[i : i + parts] for i in range(0, len(made), parts)])
    near(module.net, model)
    for found, metrics in zip(module.metrics[parts - 1 :: parts], expected, strict=True):
        same_metrics(found, metrics)
    shown = trainer.callback_metrics
    assert float(shown["gns.noise"]) == pytest.approx(expected[-1]["gns.noise"], rel=1e-5)
    assert trainer.global_step == module.optimizers().program.clock.steps == 4


def test_a_short_step_at_the_end_of_an_epoch_is_measured_as_its_micro_batches_are() -> None:
    """Lightning divides by `accumulate_grad_batches` there, too: the update is smaller, what is measured is not."""
    spec = f"optimizer sgd {{ lr = 0.1 }} {GNS}"
    module = Lit(spec)
    fit(module, number=20, max_steps=-1, max_epochs=1, accumulate_grad_batches=2)
    made = batches(20, 4)
    model, _ = plain_loop(spec, [made[:2], made[2:4]])
    last = made[4]
    loss = cross_entropy(model(last[0]), last[1])
    gradients = torch.autograd.grad(loss, [*model.parameters()])
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.data -= 0.1 * gradient / 2
    near(module.net, model)
    assert module.metrics[-1]["loss"] == pytest.approx(float(loss))
    norm = sum(float(g.square().sum()) for g in gradients) ** 0.5
    assert module.metrics[-1]["gradient_norm"] == pytest.approx(norm)


@pytest.mark.parametrize("given", [{}, {"scaled": True}])
def test_manual_optimization(given: dict[str, Any]) -> None:
    ours, plain = Manual(f"{ADAMW} {GNS}", accumulation=2), Manual()
    trainers = [fit(one, **(scaled() if given else {})) for one in (plain, ours)]
    near(ours, plain)
    assert [trainer.global_step for trainer in trainers] == [2 * 2, 2 * 2]
    _, expected = plain_loop(f"{ADAMW} {GNS}", [batches(16, 4)[:2]])
    same_metrics(ours.metrics[1], expected[0])


class Twice(Manual):
    """Runs two steps in each batch, clips in each, and trains nothing in the first batch."""

    inside = True

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if not batch_idx:
            return
        (x, y), optimizer = batch, self.optimizers()
        for number in range(2):
            if number and self.spec is not None and self.inside:
                with optimizer.micro_batch(examples=len(x)):
                    loss = cross_entropy(self(x), y)
            else:
                loss = cross_entropy(self(x), y)
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.3, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()


def test_manual_optimization_with_two_steps_in_a_batch() -> None:
    ours, plain = Twice(f"{ADAMW} {GNS}"), Twice()
    for one in (plain, ours):
        fit(one, max_steps=6)
    near(ours, plain)
    assert ours.optimizers().program.clock.steps == 6
    lost = Twice(ADAMW)
    lost.inside = False
    with pytest.raises(RuntimeError, match=r"with self.optimizers\(\).micro_batch"):
        fit(lost)


class Closure(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()

        def closure() -> Tensor:
            loss = cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)
        optimizer.zero_grad()


class Adversaries(Lit):
    """One optimizer trains the network by the spec, another one a critic that the spec knows nothing of."""

    def __init__(self, spec: str | None = None) -> None:
        super().__init__(spec)
        self.automatic_optimization = False
        torch.manual_seed(4)
        self.critic = nn.Linear(3, 1).double()
        if spec is not None:
            self.given = {"model": self.net}

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        self.manual_backward(self.critic(self(batch[0])).mean())
        first.step()
        second.zero_grad()
        with torch.no_grad():
            made = self(batch[0])
        self.manual_backward(self.critic(made).square().mean())
        second.step()
        first.zero_grad()
        second.zero_grad()

    def on_train_batch_end(self, *args: Any) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return [super().configure_optimizers(), torch.optim.Adam(self.critic.parameters())]


@pytest.mark.parametrize("make", [Closure, Adversaries])
def test_manual_optimization_with_a_closure_or_another_optimizer(make: Any) -> None:
    ours, plain = make(f'{ADAMW} noise_scale gns on "**.1" | "1" {{ smooth = 1 steps }}'), make()
    trainers = [fit(one) for one in (plain, ours)]
    near(ours, plain)
    assert trainers[0].global_step == trainers[1].global_step == 4


def test_a_module_that_torch_compiled_trains_by_a_spec() -> None:
    ours, plain = Lit(f"{ADAMW} {GNS}"), Lit()
    for one in (ours, plain):
        fit(torch.compile(one, backend="eager"))
    near(ours, plain)
    assert ours.optimizers().program.clock.steps == 4


def test_resuming_from_a_checkpoint_is_bit_equal(tmp_path: Path) -> None:
    """At the end of an epoch, where Lightning knows what the next batch is."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    spec = f"run {{ length = 6 steps }} {ADAMW} {GNS} regularize ema {{ decay = 0.9 }}"
    whole, again = Lit(spec), Lit(spec)
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    epochs: Any = {"number": 12, "max_steps": -1, "max_epochs": 2}
    fit(whole, **epochs, enable_checkpointing=True, callbacks=[saving])
    trainer = fit(again, **epochs, again=str(tmp_path / "epoch=0.ckpt"))
    equal(again, whole)
    assert str(again.metrics[-1]) == str(whole.metrics[-1])
    assert trainer.global_step == again.optimizers().program.clock.steps == 6


def test_evaluation_has_the_weights_of_evaluation() -> None:
    module = Lit(f"{ADAMW} regularize ema {{ decay = 0.9 }}")
    trainer = fit(module)
    data = loader(points(8), 8)
    (found,) = trainer.validate(module, data, verbose=False)
    x, y = batches(8, 8)[0]
    trained = float(cross_entropy(module(x), y))
    with module.optimizers().program.evaluation_weights():
        expected = float(cross_entropy(module(x), y))
    assert found["eval"] == pytest.approx(expected, rel=1e-6)
    assert abs(expected - trained) > 1e-6


def test_a_part_of_the_module_may_be_the_model_and_clauses_may_read_logits() -> None:
    class Part(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            logits = self(x)
            loss = cross_entropy(logits, y)
            return {"loss": loss, "logits": logits, "targets": y, "inputs": x}

        def configure_optimizers(self) -> torch.optim.Optimizer:
            self.given = {"model": self.net}
            return super().configure_optimizers()

    spec = f'{ADAMW} regularize distill {{ weight = 0.5 }} noise_scale gns on "1" {{ smooth = 1 steps }}'
    module = Part(spec)
    fit(module)
    model, expected = plain_loop(spec, [[one] for one in batches(16, 4)])
    near(module.net, model)
    same_metrics(module.metrics[-1], expected[-1])


def test_examples_may_count_unequally_and_be_counted_by_the_module() -> None:
    """As with labels that are ignored; the batch has a tensor of another length."""

    class Weighed(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch["pair"], batch_idx)

    spec = f"{ADAMW} {GNS}"
    made = batches(16, 4)
    for i, (_, y) in enumerate(made):
        y[i % 4] = -100
    rows = [{"pair": one, "lengths": torch.zeros(7)} for one in made]
    module = Weighed(
        spec,
        examples=lambda batch: len(batch["pair"][0]),
        weights=lambda batch: (batch["pair"][1] != -100).double(),
        tokens=lambda batch: int((batch["pair"][1] != -100).sum()),
    )
    trainer = trainer_of()
    trainer.fit(module, loader(rows, None))
    model, expected = plain_loop(spec, [[one] for one in made])
    near(module.net, model)
    for found, metrics in zip(module.metrics, expected, strict=True):
        same_metrics(found, metrics)
    assert module.optimizers().program.clock.tokens == 12


def test_accumulation_may_change_with_the_epoch() -> None:
    from lightning.pytorch.callbacks import GradientAccumulationScheduler

    ours, plain = Lit(f"{ADAMW} {GNS}"), Lit()
    for one in (ours, plain):
        scheduler = GradientAccumulationScheduler({0: 1, 1: 4})
        fit(one, max_steps=-1, max_epochs=2, callbacks=[scheduler])
    near(ours, plain)
    assert ours.metrics[-1]["batch"] == 16
    assert ours.optimizers().program.clock.steps == 5


def test_a_rule_may_end_the_training() -> None:
    module = Lit(f"{ADAMW} {GNS} when step >= 2 {{ stop }}")
    trainer = fit(module)
    assert trainer.global_step == module.optimizers().program.clock.steps == 2


def test_copies_and_pickles_are_of_the_users_class() -> None:
    module = Lit(f"{ADAMW} {GNS}")
    fit(module)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is Lit
        equal(other, module)
    fit(module, max_steps=8)  # again, from these weights
    assert type(module).__mro__.count(type(module).trainc_own) == 1


# who says what


class Clips(Lit):
    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        pass


class Loader(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None


@pytest.mark.parametrize(
    ("module", "given", "message"),
    [
        (
            lambda: Lit(f"run {{ length = 4 steps, clip = 0.5 }} {ADAMW}"),
            {"gradient_clip_val": 1.0},
            "`gradient_clip_val = 1` of the Trainer and `clip = 0.5` of `run` both clip gradients",
        ),
        (
            lambda: Lit(ADAMW),
            {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"},
            "clips each entry of the gradients",
        ),
        (lambda: Clips(ADAMW), {}, "`configure_gradient_clipping` of Clips clips gradients"),
        (lambda: Loader(ADAMW), {}, "`training_step` returned no loss"),
        (
            lambda: Lit(f"{ADAMW} regularize distill {{ weight = 0.5 }}"),
            {},
            'return `{"loss": loss, "logits": logits, "targets": targets}` from `training_step`',
        ),
        (
            lambda: Manual(f"{ADAMW} regularize distill {{ weight = 0.5 }}"),
            {},
            r"write `self.manual_backward\(loss, logits=logits, targets=targets\)`",
        ),
        (
            lambda: Lit(ADAMW, examples=None),
            {"data": [{"x": torch.zeros(2, 5), "n": torch.zeros(3)}]},
            r"how many examples there are: 2, 3. Say it: `spec_optimizer\(self",
        ),
    ],
)
def test_what_cannot_work_is_an_error_that_says_why(
    module: Any, given: dict[str, Any], message: str
) -> None:
    made = module()
    if "data" in given:
        from trainc.integrations.lightning import _examples

        with pytest.raises(ValueError, match=message):
            _examples(given["data"][0])
        return
    with pytest.raises(ValueError, match=message):
        fit(made, **given)


def test_strategies_that_divide_a_model_are_refused() -> None:
    from trainc.integrations.lightning import spec_optimizer

    class FSDPStrategy:
        pass

    class Module:
        class trainer:
            strategy = FSDPStrategy()

    with pytest.raises(ValueError, match="a Trainer with FSDPStrategy cannot train by a spec"):
        spec_optimizer(Module(), ADAMW)


# several processes


def work(rank: int) -> dict[str, Any]:
    """Train by the spec in the process group that is open, as one of Lightning's DDP processes."""
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    module = Lit(METHOD)
    strategy = DDPStrategy(
        parallel_devices=[torch.device("cpu")] * 2, cluster_environment=TorchElasticEnvironment()
    )
    fit(
        module,
        number=16,
        size=2,
        devices=2,
        strategy=strategy,
        accumulate_grad_batches=2,
        max_steps=2,
    )
    return {
        "weights": [p.detach() for p in module.parameters()],
        "metrics": module.metrics[1::2],
        "seen": module.seen,
    }


def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    found = run_processes(Path(__file__), 2, tmp_path)
    whole = [
        tuple(map(torch.cat, zip(*parts, strict=True)))
        for parts in zip(*(one["seen"] for one in found), strict=True)
    ]
    model, expected = plain_loop(METHOD, [whole[:2], whole[2:]])  # type: ignore[list-item]
    for one in found:
        for mine, theirs in zip(one["weights"], model.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
        for metrics, wanted in zip(one["metrics"], expected, strict=True):
            same_metrics(metrics, wanted)


if __name__ == "__main__":
    os.environ |= {"RANK": sys.argv[1], "LOCAL_RANK": sys.argv[1], "WORLD_SIZE": sys.argv[2]}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "GROUP_RANK": "0"}
    os.environ |= {"LOCAL_WORLD_SIZE": sys.argv[2], "TORCHELASTIC_RUN_ID": "test"}
    warnings.simplefilter("ignore")
    run_rank(work)
