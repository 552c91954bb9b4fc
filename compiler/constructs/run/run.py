"""The run: its length, seed, evaluations and checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from trainc.dsl.reading.construct import (
    Construct,
    Duration,
    Effect,
    ModuleSelector,
    Period,
    Problem,
)

if TYPE_CHECKING:
    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering


class Run(Construct):
    """States how long the run lasts, its seed, and when it evaluates and saves.

    The order of the data and all random numbers are functions of the seed and the clock, so a
    resumed run equals an uninterrupted one bit for bit. `device`, `precision` and `matmul` are for
    `trainc run`: in a loop of your own the model stays where you put it, and `torch.autocast` around
    the loop is yours. `clip`, `compile`, `graphs` and `checkpoint_activations` hold there, too. On another device
    numbers differ by rounding, and so do those that the model draws at random, such as dropout.
    """

    cite: ClassVar = "trainc"
    usage: ClassVar = (
        "run { length = 2000 steps, seed = 7, eval = 200 steps, checkpoint = 500 steps }"
    )

    effects: ClassVar = (
        Effect(
            "gradients",
            "clip the gradients of all optimizers to one norm",
            ("gradient",),
            ("gradient",),
        ),
    )

    length: Duration = Field(
        description="when the run ends: steps, samples, tokens, epochs or seconds"
    )
    seed: int = Field(default=0, ge=0, description="seed of initial weights, data order and noise")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        default="auto",
        description="device on which `trainc run` trains; `auto` is CUDA where there is one, then MPS, else the CPU."
        " The initial weights are the same on each",
    )
    precision: Literal["float32", "bf16", "fp16"] = Field(
        default="float32",
        description="precision in which `trainc run` computes forward passes and losses: `bf16` and `fp16` under"
        " torch.autocast, with weights and optimizer in float32; `fp16` with a GradScaler",
    )
    matmul: Literal["highest", "high", "medium"] | None = Field(
        default=None,
        description="precision of float32 products in `trainc run`, as torch.set_float32_matmul_precision has it."
        " Default: what torch is set to",
    )
    compile: Literal["off", "inductor"] = Field(
        default="off",
        description="`inductor` compiles the step graph, or the modules where none runs, by torch.compile; numbers"
        " differ from those of `off` by rounding",
    )
    graphs: bool = Field(
        default=False,
        description="whether passes of the step graph are replayed as CUDA graphs, each kind from its third on, so that"
        " no kernel is launched by itself; gradients are held twice. On other devices it has no effect",
    )
    checkpoint_activations: ModuleSelector | None = Field(
        default=None,
        description="modules of whose forward passes only the inputs are kept; they run again in the backward pass,"
        " which takes time and saves memory, and gives the same numbers. Default: none",
    )
    start: str | None = Field(
        default=None,
        description="folder of another run (what it evaluated with), or .safetensors file, with the initial weights",
    )
    eval: Period | None = Field(
        default=None, description="how often the model is evaluated. Default: only at the end"
    )
    eval_batches: int = Field(
        default=8, ge=1, description="micro-batches of held-out data in one evaluation"
    )
    checkpoint: Period | None = Field(
        default=None, description="how often a checkpoint is saved. Default: only at the end"
    )
    keep: int = Field(default=2, ge=1, description="how many checkpoints are kept on disk")
    log: Literal["tensorboard", "wandb", "trackio"] | None = Field(
        default=None,
        description="who gets the metrics of `trainc run` as well: the package must be installed. One that fails, such"
        " as without a network, is told once and ends no run",
    )
    clip: float | None = Field(
        default=None,
        gt=0,
        description="largest L2 norm of the gradients of all optimizers together; they are scaled down to it just"
        " before the update",
    )
    on_nan: Literal["stop", "skip", "continue"] = Field(
        default="stop",
        description="what happens at a step that is not sound, because its loss or its gradient is not finite: stop"
        " before the update, skip the step, or continue",
    )
    skip_limit: int | None = Field(
        default=None,
        ge=1,
        description="with `on_nan = skip`, how many steps in a row may be skipped; at one more the run stops."
        " Default: 10",
    )

    @field_validator("length")
    @classmethod
    def _a_length(cls, value: Duration) -> Duration:
        if value.unit == "run" or value.amount <= 0:
            raise ValueError("expected a length such as `2000 steps`, `3 epochs` or `1.5G tokens`")
        return value

    @field_validator("eval", "checkpoint")
    @classmethod
    def _a_distance(cls, value: Duration | None) -> Duration | None:
        if value is not None and value.amount <= 0:
            raise ValueError("expected a duration above 0, such as `200 steps` or `5%`")
        return value

    @model_validator(mode="after")
    def _limit_of_skipping(self) -> Self:
        if self.skip_limit is not None and self.on_nan != "skip":
            raise ValueError(
                f"`skip_limit` has no effect with `on_nan = {self.on_nan}`: remove it, or write `on_nan = skip`"
            )
        return self

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Warn of CUDA graphs where this clause keeps all passes from being replayed."""
        if not self.graphs:
            return
        if self.device in ("cpu", "mps"):
            message = (
                f"`graphs` has no effect with `device = {self.device}`: only CUDA has CUDA graphs"
            )
            yield Problem("no-effect", message, "graphs", severity="warning")
        elif self.precision == "fp16":
            message = (
                "`graphs` has no effect with `precision = fp16`, whose GradScaler runs the modules"
            )
            help_ = "write `precision = bf16`, which scales no loss"
            yield Problem("no-effect", message, "graphs", help=help_, severity="warning")

    def performs(self, effect: Effect) -> bool:
        """Say whether this clause performs an effect: it clips only when asked to."""
        return self.clip is not None

    def lower(self, to: Lowering) -> None:
        """Clip, compile, replay and checkpoint activations where asked to; the loop reads the other settings."""
        if self.clip is not None:
            to.clip(self.clip)
        if self.compile == "inductor":
            to.compile_modules()
        if self.graphs:
            to.replay_passes()
        if self.checkpoint_activations is not None:
            to.checkpoint_activations("checkpoint_activations", self.checkpoint_activations)
