"""The Trainer of transformers under a spec: its numbers are those of the plain Trainer, and of the plain loop."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import trainc
from tests.compiler.image_models import import_library
from tests.processes import ROOT
from trainc.compiler.errors import SiteError

pytestmark = pytest.mark.models

ADAMW = "optimizer adamw { lr = 1e-3, weight_decay = 0 }"
GNS = "noise_scale gns on role(norm) { smooth = 1 steps }"
PLAIN = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "optim": "adamw_torch"}
WORDS, LENGTH = 32, 9


def gpt2() -> Any:
    transformers = import_library("transformers")
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 16, "use_cache": False}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    config = transformers.GPT2Config(vocab_size=WORDS, **sizes, **dropout, **ends)
    return transformers.GPT2LMHeadModel(config)


def texts() -> list[dict[str, Tensor]]:
    """Return sequences of which different numbers of labels count."""
    torch.manual_seed(1)
    found = []
    for _ in range(32):
        ids = torch.randint(5, WORDS, (LENGTH,))
        kept = torch.arange(LENGTH) < int(torch.randint(3, LENGTH, ()))
        found.append({"input_ids": ids, "labels": torch.where(kept, ids, -100)})
    return found


class Classifier(nn.Module):
    """Takes no keywords beside its own, so that a Trainer divides the losses of micro-batches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.body, self.norm, self.head = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.double()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(self.norm(self.body(x))))
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def points() -> list[dict[str, Tensor]]:
    torch.manual_seed(3)
    return [{"x": torch.randn(5).double(), "labels": torch.randint(0, 3, ())} for _ in range(32)]


class Batches:
    """A collator that keeps the batches it made."""

    def __init__(self) -> None:
        self.made: list[dict[str, Tensor]] = []

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        self.made.append({key: torch.stack([row[key] for row in rows]) for key in rows[0]})
        return dict(self.made[-1])


def trainer_of(model: nn.Module, folder: Path, **given: Any) -> Any:
    transformers = import_library("transformers")
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    defaults = {"max_steps": 4, "per_device_train_batch_size": 4, "use_cpu": True, "seed": 1}
    data = points() if isinstance(model, Classifier) else texts()
    args = {"output_dir": str(folder), "dataloader_pin_memory": False, **quiet, **defaults, **given}
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**args),
        train_dataset=data,
        eval_dataset=data[:8],
        data_collator=Batches(),
    )


def by_spec(spec: str, model: nn.Module, folder: Path, **given: Any) -> tuple[Any, trainc.Program]:
    from trainc.integrations.transformers import use_spec

    trainer = trainer_of(model, folder, **given)
    return trainer, use_spec(trainer, spec)


def equal(one: nn.Module, other: nn.Module) -> None:
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def logged(trainer: Any, name: str) -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


HALVES = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}


NO_CLIP, CLIP = {"max_grad_norm": 0.0}, {"max_grad_norm": 0.5}
UNEVEN = {**HALVES, "num_train_epochs": 1, "max_steps": -1, "per_device_train_batch_size": 5}
OF_TEXTS: list[dict[str, Any]] = [{"bf16": True}, {"label_smoothing_factor": 0.1}]


@pytest.mark.parametrize(
    ("make", "given"),
    [
        *(
            (make, given)
            for make in (gpt2, Classifier)
            for given in (NO_CLIP, CLIP, HALVES, UNEVEN)
        ),
        *((gpt2, given) for given in OF_TEXTS),
    ],
)
def test_an_empty_spec_is_bit_equal_to_the_plain_trainer(
    make: Callable[[], nn.Module], given: dict[str, Any], tmp_path: Path
) -> None:
    ours, plain = make(), make()
    theirs = trainer_of(plain, tmp_path, **PLAIN, **given)
    theirs.train()
    trainer, program = by_spec(ADAMW, ours, tmp_path, **given)
    trainer.train()
    assert logged(trainer, "loss") == logged(theirs, "loss")
    assert logged(trainer, "learning_rate") == logged(theirs, "learning_rate")
    assert program.clock.steps == trainer.state.global_step
    equal(ours, plain)


@pytest.mark.parametrize("given", [NO_CLIP, CLIP, HALVES])
def test_a_grad_scaler_of_the_trainer_changes_nothing(
    given: dict[str, Any], tmp_path: Path
) -> None:
    """Its scale is a power of 2. A Trainer makes one for float16 on other devices than the CPU."""
    ours, plain = Classifier(), Classifier()
    theirs = trainer_of(plain, tmp_path, **PLAIN, **given, fp16=True)
    trainer, _ = by_spec(f"{ADAMW} {GNS}", ours, tmp_path, **given, fp16=True)
    for one in (theirs, trainer):
        one.accelerator.native_amp = True
        one.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        one.train()
    equal(ours, plain)


def test_adapters_of_peft_are_trained_and_measured(tmp_path: Path) -> None:
    peft = import_library("peft")

    def adapted() -> Any:
        config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft calls what transformers has renamed
            return peft.get_peft_model(gpt2(), config)

    ours, plain = adapted(), adapted()
    trainer_of(plain, tmp_path, **PLAIN).train()
    spec = f'{ADAMW} noise_scale gns on "**.lora_*.**" {{ smooth = 1 steps }}'
    trainer, _ = by_spec(spec, ours, tmp_path)
    trainer.train()
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert trainer.trainc_optimizer.metrics["gns.noise"] > 0


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    models = gpt2(), gpt2()
    for model, checkpoints in zip(models, (True, False), strict=True):
        spec = f"{ADAMW} {GNS}"
        if checkpoints:
            model.activation_checkpointing_enable()
        trainer, _ = by_spec(spec, model, tmp_path)
        trainer.train()
    for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


METHOD = """
run { length = 4 steps, clip = 0.5 }
optimizer sgd { lr = 0.5 * linear(to = 10%), weight_decay = 0.1 on matrices }
noise_scale gns on role(norm) { smooth = 1 steps }
regularize l2_sp on all { weight = 0.3 }
regularize distill { weight = 0.5, temperature = 2 }
"""


@pytest.mark.parametrize("parts", [1, 2])
def test_a_spec_gives_the_numbers_of_the_plain_loop(
    parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's own loss is computed in float32, whatever its weights are."""
    ours, alone = gpt2().double(), gpt2().double()
    ours.loss_type = "ForCausalLM"  # then the Trainer counts the labels that are predicted
    size = {"gradient_accumulation_steps": parts, "per_device_train_batch_size": 4 // parts}
    trainer, program = by_spec(METHOD, ours, tmp_path, max_grad_norm=0.5, **size)
    found: list[dict[str, float]] = []
    update = program.update

    def kept(scaler: Any = None) -> dict[str, float]:
        found.append(update(scaler))
        return found[-1]

    monkeypatch.setattr(program, "update", kept)
    trainer.train()
    loop = trainc.compile(f"loss cross_entropy {METHOD}", alone, executor="module")
    made = trainer.data_collator.made
    for i, metrics in enumerate(found):
        pairs = []
        for batch in made[i * parts : (i + 1) * parts]:
            ids, labels = batch["input_ids"], batch["labels"]
            pairs.append(({"input_ids": ids}, nn.functional.pad(labels[:, 1:], (0, 1), value=-100)))
        expected = loop.step(pairs)
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            if name != "batch":
                assert metrics[name] == pytest.approx(value, rel=2e-4, abs=1e-6, nan_ok=True), name
    for mine, theirs in zip(ours.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert len(found) == program.clock.steps == 4
    assert program.clock.samples == 16
    assert logged(trainer, "learning_rate") == pytest.approx([m["lr_max"] for m in found])
    assert logged(trainer, "gns.noise") == pytest.approx([m["gns.noise"] for m in found])


@pytest.mark.parametrize("parts", [1, 2])
def test_statistics_are_those_of_one_backward_pass_an_example(parts: int, tmp_path: Path) -> None:
    """B|G|^2 - mean of |g_i|^2, and the reverse, from one backward pass an example: McCandlish et al., appendix A.1."""
    model = Classifier()
    size = {"gradient_accumulation_steps": parts, "per_device_train_batch_size": 6 // parts}
    spec = f"optimizer sgd {{ lr = 0.1 }} {GNS}"
    trainer, _ = by_spec(spec, model, tmp_path, max_grad_norm=0, max_steps=1, **size)
    trainer.train()
    made = trainer.data_collator.made[:parts]
    x, y = (torch.cat([batch[key] for batch in made]) for key in ("x", "labels"))
    squares = []
    for rows in [slice(i, i + 1) for i in range(6)] + [slice(None)]:
        one = Classifier()
        one(x[rows], y[rows])["loss"].backward()
        gradients = [p.grad for p in one.norm.parameters() if p.grad is not None]
        squares.append(float(sum(g.square().sum() for g in gradients)))
    own, big = sum(squares[:6]) / 6, squares[6]
    metrics = trainer.trainc_optimizer.metrics
    assert metrics["gns.signal"] == pytest.approx((6 * big - own) / 5, rel=1e-9)
    assert metrics["gns.noise"] == pytest.approx((own - big) / (1 - 1 / 6), rel=1e-9)


def test_statistics_are_of_the_trainers_loss_where_it_counts_more_labels(tmp_path: Path) -> None:
    """Of this class a Trainer does not know that labels are shifted: it divides by the first ones, too."""
    metrics, spec = [], f"optimizer sgd {{ lr = 0 }} {GNS}"
    for loss_type in (None, "ForCausalLM"):
        model = gpt2()
        model.loss_type = loss_type
        trainer, _ = by_spec(spec, model, tmp_path, max_grad_norm=0, max_steps=1, **HALVES)
        trainer.train()
        metrics.append(trainer.trainc_optimizer.metrics)
    labels = torch.cat([batch["labels"] for batch in trainer.data_collator.made[:2]])
    factor = float((labels[:, 1:] != -100).sum() / (labels != -100).sum())
    assert factor < 0.9
    for name, power in {"loss": 1, "gradient_norm": 1, "gns.signal": 2, "gns.noise": 2}.items():
        assert metrics[0][name] == pytest.approx(factor**power * metrics[1][name], rel=1e-4), name


def test_resuming_from_a_checkpoint_is_bit_equal(tmp_path: Path) -> None:
    spec = f"run {{ length = 6 steps }} {ADAMW} {GNS} regularize ema {{ decay = 0.9 }}"
    whole, again = gpt2(), gpt2()
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    trainer, first = by_spec(spec, whole, tmp_path, **saving)
    trainer.train()
    resumed, second = by_spec(spec, again, tmp_path, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    equal(again, whole)
    assert logged(resumed, "loss") == logged(trainer, "loss")
    assert str(resumed.trainc_optimizer.metrics) == str(trainer.trainc_optimizer.metrics)
    assert second.clock.steps == first.clock.steps == 6


def test_evaluation_has_the_weights_of_evaluation(tmp_path: Path) -> None:
    model = gpt2()
    spec = f"{ADAMW} regularize ema {{ decay = 0.9 }}"
    trainer, program = by_spec(spec, model, tmp_path, eval_strategy="steps", eval_steps=2)
    trainer.train()
    with program.evaluation_weights():
        other = gpt2()
        other.load_state_dict(model.state_dict())
    expected = trainer_of(other, tmp_path).evaluate()["eval_loss"]
    assert logged(trainer, "eval_loss")[-1] == expected
    assert trainer_of(model, tmp_path).evaluate()["eval_loss"] != expected


@pytest.mark.parametrize("make", [gpt2, Classifier])
def test_clauses_read_the_evaluations_of_the_trainer(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    model = make()
    spec = f"{ADAMW} observe calibration {{ bins = 1 }} observe margin"
    rule = " when calibration.nll > 0 cooldown 9 steps { adamw.lr = adamw.lr / 2 }"
    given = {"eval_strategy": "steps", "eval_steps": 2}
    trainer, program = by_spec(spec + rule, model, tmp_path, **given)
    trainer.train()
    model.eval()
    rows, losses, right, margins = trainer.eval_dataset, [], [], []
    for row in rows:
        inputs = {n: v[None] for n, v in row.items() if n != "labels"}
        with torch.no_grad():
            logits = model(**inputs, labels=row["labels"][None])["logits"].reshape(
                -1, 3 if make is Classifier else WORDS
            )
        targets = row["labels"][None] if make is Classifier else row["labels"][1:]
        for z, y in zip(logits, targets, strict=False):
            if y != -100:
                others = torch.cat([z[:y], z[y + 1 :]])
                margins.append(float(z[y] - others.max()))
                losses.append(float(cross_entropy(z, y)))
                right.append(float(z.argmax() == y))
    found = {"nll": losses, "right": right}
    for name, values in found.items():
        got = logged(trainer, f"eval_calibration.{name}")
        assert len(got) == 2
        assert got[-1] == pytest.approx(sum(values) / len(values), rel=1e-5)
        assert program.signals[f"calibration.{name}"] == got[-1]
    assert logged(trainer, "eval_margin.min")[-1] == pytest.approx(min(margins), rel=1e-4)
    assert logged(trainer, "learning_rate") == [1e-3, 1e-3, 5e-4, 5e-4]
    predicted = trainer.predict(rows).metrics
    assert predicted["test_margin.mean"] == pytest.approx(sum(margins) / len(margins), rel=1e-4)


def test_a_micro_batch_without_a_label_that_counts_has_no_part(tmp_path: Path) -> None:
    class Without(Batches):
        def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            super().__call__(rows)
            if len(self.made) % 2:
                self.made[-1]["labels"][:] = -100
            return dict(self.made[-1])

    models = gpt2(), gpt2()
    trainers = []
    for model, spec in zip(models, (None, f"{ADAMW} {GNS}"), strict=True):
        given = {**HALVES, "max_grad_norm": 0.0}
        if spec is None:
            trainer = trainer_of(model, tmp_path, **PLAIN, **given)
        else:
            trainer, _ = by_spec(spec, model, tmp_path, **given)
        trainer.data_collator = Without()
        trainer.train()
        trainers.append(trainer)
    for mine, theirs in zip(models[1].parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert logged(trainers[1], "loss") == pytest.approx(logged(trainers[0], "loss"), rel=1e-5)


# several processes

TOGETHER = f"optimizer sgd {{ lr = 0.1 }} {GNS} regularize l2_sp on all {{ weight = 0.3 }}"


def work(folder: Path) -> None:
    """Train by a spec and without one, as one of torchrun's processes, and save what came of it."""
    found: dict[str, Any] = {}
    for name, spec in {"plain": None, "empty": ADAMW, "measured": TOGETHER}.items():
        model, given = gpt2(), {"max_grad_norm": 0.5, "gradient_accumulation_steps": 2}
        if spec is None:
            trainer = trainer_of(model, folder, **PLAIN, **given)
        else:
            trainer, _ = by_spec(spec, model, folder, **given)
        trainer.train()
        found[name] = {
            "weights": [p.detach() for p in model.parameters()],
            "loss": logged(trainer, "loss"),
            "noise": logged(trainer, "gns.noise"),
            "processes": trainer.args.world_size,
        }
    torch.save(found, folder / f"{os.environ['RANK']}.pt")


def test_processes_of_torchrun_train_together(tmp_path: Path) -> None:
    """Two processes with two micro-batches each have the batch of one process with four."""
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(Path(__file__)), str(tmp_path)]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths).strip(os.pathsep)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for one, other in zip(ranks[0].values(), ranks[1].values(), strict=True):
        assert one["processes"] == 2
        assert all(map(torch.equal, one["weights"], other["weights"]))
    plain, empty, measured = ranks[0].values()
    assert all(map(torch.equal, plain["weights"], empty["weights"]))
    assert plain["loss"] == empty["loss"]
    alone = gpt2()
    given = {"max_grad_norm": 0.5, "gradient_accumulation_steps": 4}
    trainer, _ = by_spec(TOGETHER, alone, tmp_path, **given)
    trainer.train()
    for mine, theirs in zip(measured["weights"], alone.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-5, atol=1e-6)
    assert measured["noise"] == pytest.approx(logged(trainer, "gns.noise"), rel=1e-4)


# who says what


def heard(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    from trainc.integrations import transformers as integration

    lines: list[str] = []
    monkeypatch.setattr(integration._logger, "warning", lines.append)
    return lines


@pytest.mark.parametrize(
    ("spec", "place"), [(ADAMW, "optimizer adamw"), (f"run {{ length = 4 steps }} {ADAMW}", "run")]
)
def test_max_grad_norm_is_the_clip_of_a_spec_without_one(
    spec: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = heard(monkeypatch)
    trainer, program = by_spec(spec, Classifier(), tmp_path, max_grad_norm=0.25)
    trainer.train()
    said = "`max_grad_norm = 0.25` of the TrainingArguments is now `clip = 0.25` of"
    assert [line for line in lines if said in line and f"`{place}`" in line] == lines
    assert any("to norm 0.25" in line for line in program.summary())


TWO = 'optimizer adamw on "head.**" { lr = 1e-3 } optimizer sgd on all - "head.**" { lr = 0.1 }'


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            f"run {{ length = 4 steps, clip = 0.5 }} {ADAMW}",
            "`max_grad_norm = 1` of the TrainingArguments and `clip = 0.5` of `run` both clip",
        ),
        (
            TWO,
            r"`max_grad_norm = 1` .* has no `run` to say so: add `run { length = .*, clip = 1 }`",
        ),
    ],
)
def test_two_clips_are_an_error_that_names_both(spec: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        by_spec(spec, Classifier(), tmp_path)
    by_spec(spec, Classifier(), tmp_path, max_grad_norm=0)


def test_a_rule_may_end_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = heard(monkeypatch)
    model, other = Classifier(), Classifier()
    spec = f"{ADAMW} {GNS} when step >= 2 {{ stop }}"
    trainer, program = by_spec(spec, model, tmp_path, max_grad_norm=0)
    trainer.train()
    assert trainer.state.global_step == program.clock.steps == 2
    assert lines == ["the rule `when step >= 2` stopped the run, after 2 steps"]
    alone, _ = by_spec(ADAMW, other, tmp_path, max_grad_norm=0, max_steps=2)
    alone.train()
    equal(model, other)


def test_a_run_of_another_length_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = heard(monkeypatch)
    spec = f"run {{ length = 9 steps }} {ADAMW}"
    trainer, _ = by_spec(spec, Classifier(), tmp_path, max_grad_norm=0)
    trainer.train()
    assert lines == [
        "the Trainer runs 4 steps, and the spec's `run` has `length = 9 steps`, by which its schedules go"
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rate": 1e-3}, r"remove `learning_rate = 0.001` \(in the spec: `lr`\)"),
        ({"weight_decay": 0.1}, "remove `weight_decay = 0.1`"),
        ({"lr_scheduler_type": "cosine", "warmup_steps": 3}, "lr_scheduler_type.*warmup_steps"),
        ({"optim": "adafactor"}, "remove `optim = "),
    ],
)
def test_arguments_that_say_how_to_train_are_an_error(
    given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        by_spec(ADAMW, Classifier(), tmp_path, **given)


def test_a_spec_is_used_once(tmp_path: Path) -> None:
    from trainc.integrations.transformers import use_spec

    trainer, _ = by_spec(ADAMW, Classifier(), tmp_path)
    with pytest.raises(ValueError, match="has an optimizer or a scheduler already"):
        use_spec(trainer, ADAMW)


def test_what_needs_several_passes_is_refused_by_name(tmp_path: Path) -> None:
    spec = f'{ADAMW} regularize pace on "body" {{ sigma = 0.4, weight = 0.1 }}'
    with pytest.raises(SiteError, match="`pace` passes every example 2 times"):
        by_spec(f"loss cross_entropy {spec}", Classifier(), tmp_path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    work(Path(sys.argv[1]))


def test_a_rule_lets_the_trainer_evaluate_and_save_and_reads_what_it_found(tmp_path: Path) -> None:
    rules = "when step < 1 { evaluate, save } when eval_loss > 0 cooldown 9 steps { adamw.lr = adamw.lr / 2 }"
    trainer, program = by_spec(f"{ADAMW} {rules}", Classifier(), tmp_path, max_steps=3)
    trainer.eval_dataset = trainer.train_dataset
    trainer.train()
    (found,) = (log for log in trainer.state.log_history if "eval_loss" in log)
    assert found["step"] == 1
    assert (tmp_path / "checkpoint-1").is_dir()
    assert program.signals["eval_loss"] == found["eval_loss"]
    assert "fired once, at step 1" in "\n".join(program.summary())
    with pytest.raises(ValueError, match="a rule of the spec says `rollback`"):
        by_spec(f"{ADAMW} when loss > 9 {{ rollback }}", Classifier(), tmp_path)
