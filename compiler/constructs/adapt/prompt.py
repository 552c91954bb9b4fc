"""Prompts: trained tokens in the sequence of the selected blocks, which stay frozen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from trainc.compiler.constructs.adapt._embedded import (
    Embedded,
    PromptFormat,
    embedded_width,
    without_prompts,
)
from trainc.compiler.constructs.adapt._longer import Longer
from trainc.compiler.constructs.adapt._peft import CONFIG
from trainc.compiler.constructs.adapt._widths import is_one_layer, width_problems, widths_of
from trainc.compiler.errors import SiteError
from trainc.compiler.model.adapter_rule import Adapted, AdapterRule, with_first
from trainc.dsl.reading.construct import Construct, Effect, Problem, Selector

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.adapting import Adapting
    from trainc.compiler.model.inventory import ModuleEntry

_DEVIATION = 0.02


class Prompt(Construct, AdapterRule):
    """Puts trained tokens in the sequence of the selected transformer blocks, and freezes everything else.

    The input of a block is (B, T, C). With `mode = deep` each block has prompts of its own: its sequence is
    x[:at], prompts, x[at:], and what it gives at the prompts is dropped. With `mode = shallow` the first block gets
    them, and they pass through all selected blocks, which follow one another; the last one gives T tokens again. So
    what comes after the blocks, such as the head, a class token and the loss, never sees a prompt, and targets need
    no change. `at = 1` puts them behind a class token.

    Prompts have no position: positions that are added before the blocks stay those of the tokens. Rotary positions,
    which a block is given, are for a prompt those of the token before it, or of the first. Prompts are never padding.
    An attention mask that a block is given gets rows and columns for them: every token sees the prompts, and
    they see the tokens; where the mask is causal, a token sees the prompts before it, and they what is before them.
    Generating with a cache of keys is not supported.

    With `mode = input`, `on` selects one model of transformers, such as `"model"` in LlamaForCausalLM, and the prompts
    are in front of its embeddings, as in peft's prompt tuning: they have the first positions, and tokens the ones
    behind them. Its states are those of the T tokens. `program.save_adapters(folder)` writes the folder that peft's
    `PeftModel.from_pretrained` reads then, and `program.load_adapters(folder)` reads one of peft's PROMPT_TUNING or
    P_TUNING, with `train` for its `modules_to_save`. The other modes keep positions, for which peft has no method.

    The parameters are `BLOCK.prompt.prompts`, one for each block, or one at the first. Prompts cannot be merged.
    """

    cite: ClassVar = (
        "Jia et al., Visual Prompt Tuning, ECCV 2022, arXiv:2203.12119; Lester, Al-Rfou and Constant, The Power of"
        " Scale for Parameter-Efficient Prompt Tuning, EMNLP 2021, arXiv:2104.08691"
    )
    usage: ClassVar = 'adapt prompt on "blocks.*" { tokens = 4 }'
    targets: ClassVar = "modules"
    identity: ClassVar = {"tokens": "0"}
    effects: ClassVar = (
        Effect("forward", "put prompts in sequences", ("params", "inputs"), ("forward",)),
    )

    tokens: int = Field(ge=0, description="prompts in a sequence; 0: none, and nothing is frozen")
    mode: Literal["deep", "shallow", "input"] = Field(
        default="deep",
        description="whether each block has prompts of its own, those of the first pass through all, or they are in"
        " front of the embeddings of a model of transformers",
    )
    at: int = Field(
        default=0,
        ge=0,
        description="tokens in front of the prompts; 1: a class token. Not with `mode = input`",
    )
    init: Literal["normal", "uniform"] = Field(
        default="normal",
        description="how they start: with deviation 0.02, or uniform in +-sqrt(6 / (fan + C))",
    )
    fan: int | None = Field(
        default=None,
        ge=1,
        description="numbers of an image patch, for `init = uniform`, as in VPT; 3 tokens unless given, as in"
        " Forecast-PEFT",
    )
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="probability that a number of a prompt is dropped in training",
    )
    width: int | None = Field(
        default=None,
        ge=1,
        description="channels of the blocks' input; those of their first layer unless given",
    )
    train: Selector | None = Field(
        default=None, description="parameters that train as well, such as those of a new head"
    )

    @model_validator(mode="after")
    def _fits_its_mode(self) -> Prompt:
        if self.mode == "input" and (self.at or self.width is not None):
            field = "at" if self.at else "width"
            raise ValueError(f"`mode = input` has no `{field}`: remove `{field}`")
        if self.fan is not None and self.init == "normal":
            raise ValueError(
                "`fan` is the width of a uniform start: write `init = uniform`, or remove `fan`"
            )
        return self

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report blocks of unknown width, one inside another, and with `shallow` blocks that are not consecutive."""
        if self.mode == "input":
            if len(bound.modules) > 1:
                yield Problem(
                    "wrong-target-kind",
                    f"`mode = input` needs one model, and `on` selects {len(bound.modules)} modules",
                    help='select the model around the blocks, such as `on "model"`',
                )
            return
        yield from width_problems(bound, self.width)
        names = [entry.name for entry in bound.modules]
        for name in names:
            outer = next(
                (n for n in names if name.startswith(f"{n}." if n else "") and n != name), None
            )
            if outer is not None:
                yield Problem(
                    "wrong-target-kind",
                    f"`{name}` is inside `{outer}`, which is selected, too",
                    help="select blocks alone, such as `blocks.*`",
                )
                return
        for entry in bound.modules:
            if is_one_layer(entry, bound.inventory):
                yield Problem(
                    "wrong-target-kind",
                    f"`{entry.name}` ({entry.types[0]}) computes each token by itself, so that none would see a prompt",
                    help="select blocks, such as `blocks.*`",
                )
                return
        if self.mode == "shallow" and (pair := _gap(names)) is not None:
            yield Problem(
                "wrong-target-kind",
                f"`{pair[1]}` does not follow `{pair[0]}`, so that prompts cannot pass from one to the other",
                help="select consecutive blocks of one list, or write `mode = deep`",
            )

    def adapt(self, to: Adapting) -> None:
        """Add the prompts, and freeze the rest."""
        blocks = to.modules()
        for entry in blocks:
            width = self._width(entry, to)
            first, last = entry is blocks[0], entry is blocks[-1]
            to.add(entry.name, partial(self.make_parts, width, first, last))
        to.train_only([] if self.train is None else to.select(self.train, "parameters"))

    def _width(self, entry: ModuleEntry, to: Adapting) -> int:
        if self.mode == "input":
            return embedded_width(entry.name, to.module(entry.name))
        found = widths_of(entry, to.base, self.width) or (0, 0)
        return found[0]

    def make_parts(self, width: int, first: bool, last: bool) -> dict[str, Any]:
        """Return the prompts of a block, and `end` where they end; the middle of a shallow chain has neither."""
        import torch
        from torch import nn

        deep, made = self.mode != "shallow", dict[str, Any]()
        if deep or first:
            made["prompts"] = nn.Parameter(torch.empty(self.tokens, width))
            made |= {"dropout": nn.Dropout(self.dropout)} if self.dropout else {}
        return made | ({"end": nn.Identity()} if deep or last else {})

    def initialize(self, name: str, tensor: Tensor, generator: Generator) -> None:
        """Draw the prompts."""
        from torch import nn

        if self.init == "normal":
            nn.init.normal_(tensor, std=_DEVIATION, generator=generator)
        else:
            fan = self.fan or 3 * self.tokens
            bound = math.sqrt(6 / (fan + tensor.shape[1]))
            nn.init.uniform_(tensor, -bound, bound, generator=generator)

    def change_inputs(
        self, layer: nn.Module, adapter: Any, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put the prompts in the sequence where they begin, and make what else the block is given fit."""
        if self.mode == "input":
            found = Embedded(layer, adapter, self.tokens, args, named)
            return (), found.with_all(self._dropped(adapter))
        if not args and not named:
            raise SiteError(f"`{adapter.layer_name}` is called without inputs", adapter.label)
        key = None if args else next(iter(named))
        x = args[0] if key is None else named[key]
        prompts = getattr(adapter, "prompts", None)
        longer = Longer(
            layer, adapter, self.at, self.tokens, x, 0 if prompts is not None else self.tokens
        )
        if prompts is not None:
            x = longer.with_prompts(x, self._dropped(adapter))
        return longer.inputs(x, key, args, named)

    def _dropped(self, adapter: Any) -> Tensor:
        """Return the prompts of an adapter, in training with its dropout."""
        prompts: Tensor = adapter.prompts
        return adapter.dropout(prompts) if self.dropout else prompts

    def change_output(
        self, layer: nn.Module, adapter: Any, inputs: tuple[Any, ...], output: Any
    ) -> Any:
        """Drop what the block gives at the prompts, where they end."""
        import torch

        length = inputs[0].shape[1]
        if self.mode == "input":
            return without_prompts(adapter, output, length, self.tokens)

        def change(y: Any) -> Any:
            if not isinstance(y, torch.Tensor) or y.dim() != 3 or y.shape[1] != length:
                found = f"{tuple(y.shape)}" if isinstance(y, torch.Tensor) else type(y).__name__
                raise SiteError(
                    f"`{adapter.layer_name}` gives {found} of a sequence of {length} tokens with prompts: select blocks"
                    " that keep the length of their sequence",
                    adapter.label,
                )
            if not hasattr(adapter, "end"):
                return y
            behind = y[:, self.at + self.tokens :].contiguous()  # as blocks give it
            return torch.cat([y[:, : self.at], behind], 1) if self.at else behind

        return with_first(output, change)

    def failure(self, adapter: Any, error: Exception) -> Exception | None:
        """Return what a block may need that fails on a longer sequence."""
        if isinstance(error, SiteError):
            return None
        return SiteError(
            f"`{adapter.layer_name}` fails on a sequence with {self.tokens} prompts more: {error}. A block that makes"
            " an image or windows of its tokens expects a square number of them, or another that is fixed: exclude it"
            " from `on`, or write `adapt parallel` or `adapt lora`, which keep the number of tokens",
            adapter.label,
        )

    def write(self, adapted: Adapted, folder: Path) -> None:
        """Write the prompts: with `mode = input` as files of peft."""
        if self.mode == "input":
            PromptFormat(self.title, adapted).write(folder)
        else:
            super().write(adapted, folder)

    def read(self, adapted: Adapted, folder: Path) -> None:
        """Load the prompts; raises ValueError where they do not fit, and changes nothing then."""
        if self.mode == "input":
            PromptFormat(self.title, adapted).read(folder)
            return
        if (folder / CONFIG).exists():
            raise ValueError(
                f"{folder} is of peft, whose prompts shift the positions of the tokens: write `mode = input`, and"
                " select the model around the blocks"
            )
        super().read(adapted, folder)

    def reference(
        self, x: Tensor, blocks: Sequence[Callable[[Tensor], Tensor]], prompts: Sequence[Tensor]
    ) -> Tensor:
        """Return what blocks without adapters make of x (B, T, C), one example at a time.

        `prompts` (tokens, C) are those of each block, or of the first.
        """
        import torch

        rows = []
        for row in x:
            own = [*row]
            for i, block in enumerate(blocks):
                if i < len(prompts):
                    own[self.at : self.at] = [*prompts[i]]
                own = [*block(torch.stack(own)[None])[0]]
                if len(prompts) == len(blocks) or i == len(blocks) - 1:
                    del own[self.at : self.at + self.tokens]
            rows.append(torch.stack(own))
        return torch.stack(rows)


def _gap(names: Sequence[str]) -> tuple[str, str] | None:
    """Return the first two blocks of which the second does not follow the first in one list."""
    for one, two in itertools.pairwise(names):
        (a, _, i), (b, _, j) = one.rpartition("."), two.rpartition(".")
        if a != b or not (i.isdecimal() and j.isdecimal() and int(j) == int(i) + 1):
            return one, two
    return None
