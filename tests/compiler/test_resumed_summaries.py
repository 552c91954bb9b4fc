"""The summary of a resumed run is that of the uninterrupted one: every line of every action."""

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import trainc
from trainc.compiler.catalog import catalog
from trainc.compiler.driver.train import train
from trainc.runtime.run import loop
from trainc.runtime.step.action import Action

HEAD = """
model "examples.models:gpt" { layers = 1, width = 16, heads = 2, context = 16 }
loss cross_entropy
run { length = 9 steps, seed = 3, eval = 4 steps, eval_batches = 1 }
"""
DATA = 'data "examples.data:stdlib" { batch = BATCH, context = 16, limit_bytes = 30_000 }\n'
PLAIN = HEAD + DATA.replace("BATCH", "4 samples, micro = 2 samples")
GNS = "noise_scale gns on type(LayerNorm) { smooth = 4 steps }\n"
SPECS = {
    "one optimizer": PLAIN + GNS + """
        optimizer adamw { lr = 1e-2 * (warmup(20%) then cosine()), clip = 0.4 }
        lr temp_balance on ndim(2) - type(Embedding) every 3 steps { range = 0.5..1.5 }
        observe norm_growth on ndim(2) every 2 steps
        observe distance every 2 steps
        observe calibration { bins = 5 }
        regularize l2_sp on ndim(2) { weight = 0.01 }
        regularize ema { decay = 0.9 }
        when loss > 0 cooldown 3 steps { warn "positive" }
    """,
    "two optimizers": PLAIN + """
        optimizer sgd as all_others on all - "head" { lr = 0.1, clip = 0.5 }
        optimizer adamw on "head" { lr = 1e-3 * cosine(), clip = 0.1 }
        perturb sam on ndim(2) { rho = 0.05 }
        lr trust_ratio on "blocks.**" & ndim(2)
        mask magnitude on "blocks.*.mlp.**" & ndim(2) every 4 steps { density = 50% }
    """,
    "a ramp": HEAD + DATA.replace("BATCH", "ramp(2 samples, to = 8 samples, over = 60%)") + """
        optimizer adamw { lr = 1e-2 }
        lr batch_scaling { rule = sqrt, reference = 4 samples }
        mask sift on "blocks.*.mlp.**" & ndim(2) { density = 20% }
    """,
    "frozen blocks": PLAIN.replace("layers = 1", "layers = 2") + """
        optimizer adamw { lr = 1e-2 }
        mask lisa every 2 steps
    """,
    "masks that move": PLAIN + """
        optimizer adamw { lr = 1e-2 }
        mask movement on "**.mlp.fc.weight" every 2 steps { density = 50% }
        mask rigl on "**.mlp.proj.weight" every 2 steps { density = 40% }
        mask set on "**.attn.proj.weight" every 2 steps { density = 40% }
        mask n_m on "**.qkv.weight"
    """,
    "masks by inputs": PLAIN + """
        optimizer adamw { lr = 1e-2 }
        mask wanda on "blocks.*.mlp.**" & ndim(2) { density = 50%, batches = 4, scope = alpha, unit = tensor }
        mask sparsegpt on "blocks.*.attn.**" & ndim(2) { density = 50%, batches = 2 }
        mask embedding_rows on "embed.token" { rows = [97, 101, 110] }
    """,
    "a followed signal": HEAD + GNS + DATA.replace(
        "BATCH", "follow(gns, factor = 4, min = 2 samples, max = 8 samples, every = 2 steps)"
    ) + "optimizer adamw { lr = 1e-2 } distribute local every 2 steps { rule = average }",
    "rules": PLAIN + """
        optimizer adamw { lr = 1e-2 }
        regularize l2_sp on ndim(2) { weight = 0.01 }
        lr mup on "blocks.**" { base_width = 16 }
        when steps > 2 { adamw.lr = lr / 2, freeze "head" }
        when steps > 5 { close l2_sp }
    """,
    "moved inputs": PLAIN + """
        optimizer adamw { lr = 1e-2 }
        perturb adversarial { norm = linf, radius = 0.03, at = "embed.token" }
        observe margin { of = training }
        observe saturation every 2 steps { layers = "blocks.*", heads = true }
        observe homogeneity every 2 steps
        observe consistency on "blocks.*.mlp.**" & type(Linear) every 2 steps { sigma = 0.5 }
        mask bitfit
    """,
    "numbers": """
        model "examples.models:teacher_student"
        data "examples.data:teacher" { batch = 4 samples, samples = 64 }
        loss mse
        run { length = 9 steps, seed = 3 }
        optimizer sgd { lr = 1e-2 }
        perturb targets every 2 steps { noise = normal(0.3), weight = 0.1 }
    """,
    "a curve": """
        model "examples.models:tanh_net"
        data "examples.data:curve" { batch = 32 samples }
        loss mse
        run { length = 9 steps, seed = 3 }
        optimizer adamw { lr = 3e-2 }
        observe frequency every 2 steps { probe = "examples.data:curve_points", threshold = 0.9 }
    """,
    "a leader": PLAIN + """
        optimizer adamw { lr = 1e-2 }
        distribute local every 2 steps { rule = leader }
    """,
    "a grown batch": HEAD + GNS + DATA.replace(
        "BATCH", "signal_noise(gns, max = 8 samples, min = 2 samples, every = 2 steps, from = 20%)"
    ) + "optimizer adamw { lr = 1e-2 }",
}  # fmt: skip


def lines(text: str, out: Path, monkeypatch: pytest.MonkeyPatch, stops: tuple[int, ...]) -> object:
    """Run a spec, interrupted after some steps and resumed, and return what its summary says."""
    spec = out.with_suffix(".train")
    spec.write_text(text)
    for i, stop in enumerate((*stops, -1)):
        asked = iter(range(1000))

        class Stop:
            def __enter__(self, asked: Iterator[int] = asked, stop: int = stop) -> "Stop":
                self.requested = lambda: "interrupted" if next(asked) == stop else None
                return self

            def __exit__(self, *_: object) -> None:
                pass

        monkeypatch.setattr(loop, "StopSignals", Stop)
        train(spec, out, quiet=True, executor="module", resume=i > 0)
    summary = json.loads((out / "summary.json").read_text())
    return {name: value for name, value in summary.items() if name not in ("seconds", "checkpoint")}


@pytest.mark.parametrize("name", SPECS)
def test_a_resumed_run_has_the_summary_of_the_uninterrupted_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = lines(SPECS[name], tmp_path / "straight", monkeypatch, ())
    resumed = lines(SPECS[name], tmp_path / "resumed", monkeypatch, (3, 4))
    assert resumed == straight


def concrete(of: Any) -> Iterator[type[Action]]:
    """Yield the subclasses of trainc that say something in a summary."""
    for one in of.__subclasses__():
        own = one.__module__.startswith("trainc.") and not inspect.isabstract(one)
        if own and one.summary is not Action.summary:
            yield one
        yield from concrete(one)


def test_the_specs_above_have_every_action_that_says_something() -> None:
    assert all(construct.usage for construct in catalog().values())  # all are imported
    used = {
        type(action).summary
        for text in SPECS.values()
        for action in trainc.compile(text).execution.method.actions
    }
    assert [one for one in concrete(Action) if one.summary not in used] == []
