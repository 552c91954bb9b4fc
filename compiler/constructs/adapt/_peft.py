"""The files of peft: what `PeftModel.from_pretrained` reads, and what its `save_pretrained` writes."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trainc.compiler.constructs.adapt._layers import by_output, is_convolution
from trainc.compiler.model.adapter_rule import Adapted, load_tensors

if TYPE_CHECKING:
    from torch import Tensor

PARTS = ("q", "k", "v")
"""The equal parts of a fused projection, in the order of its outputs."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NOT_OURS = ("rank_pattern", "alpha_pattern", "layer_replication")
"""Settings of peft that give adapters of another kind."""
_STRENGTH = "write the same rank, alpha and scale in the clause"
_SAME: dict[str, tuple[Any, str]] = {
    "r": (8, _STRENGTH),
    "lora_alpha": (8, _STRENGTH),
    "use_rslora": (False, _STRENGTH),
    "use_dora": (
        False,
        "`adapt dora` trains lengths of rows beside A and B, `adapt lora` A and B alone",
    ),
    "lora_bias": (False, "`bias = update` gives B a bias, and nothing else does"),
}
"""Settings of peft that must be those of the clause: what they are where the file leaves them out, and what to do."""
_OF_MODEL = ("all", "adapted")
"""The values of `bias` that train biases of the model."""
_KEEP_BASE = ("gaussian", "orthogonal", "eva")
"""The values of peft's `init_lora_weights` that start the adapters alone."""


class LowRankRule(Protocol):
    """What the files hold of a clause: its fields, and where an adapter has its parameters."""

    @property
    def title(self) -> str: ...
    @property
    def rank(self) -> int: ...
    @property
    def alpha(self) -> float: ...
    @property
    def scale(self) -> str: ...
    @property
    def dropout(self) -> float: ...
    @property
    def init(self) -> str: ...
    @property
    def bias(self) -> str: ...

    def pairs(self, adapter: Any) -> dict[str, Any]: ...

    def magnitude(self, adapter: Any) -> Tensor | None: ...


class PeftFormat:
    """The adapters of one clause as files of peft.

    The parts of a fused projection are there one adapter of their common rank, whose B is zero elsewhere.
    """

    def __init__(self, rule: LowRankRule, adapted: Adapted) -> None:
        self.rule, self.adapted = rule, adapted
        adapter = next(iter(adapted.adapters.values()))
        self._parts = tuple(filter(None, rule.pairs(adapter)))
        self._has_magnitude = rule.magnitude(adapter) is not None

    def write(self, folder: Path) -> None:
        """Write the configuration and the tensors."""
        from safetensors.torch import save_file

        found = {name: t.detach().cpu().contiguous() for name, t in self._tensors().items()}
        if self._parts:
            for layer in self.adapted.adapters:
                self._fuse(found, _prefix(layer))
        save_file(found, folder / WEIGHTS, {"format": "pt"})
        text = json.dumps(self._config(), indent=2, sort_keys=True)
        (folder / CONFIG).write_text(text + "\n")

    def read(self, folder: Path) -> None:
        """Load the tensors, if the configuration is that of the clause."""
        from safetensors.torch import load_file

        from trainc.runtime.storage.foreign_files import interpreting, read_json

        (folder / CONFIG).stat()  # raises where there is no adapter at all
        self._check(read_json(folder / CONFIG), folder)
        with interpreting(folder / WEIGHTS):
            found = load_file(str(folder / WEIGHTS))
        if self._parts:
            for layer in self.adapted.adapters:
                self._split(found, _prefix(layer), folder)
        load_tensors(self._tensors(), found, str(folder))

    def _config(self) -> dict[str, Any]:
        rule = self.rule
        count = len(self._parts) or 1
        alpha = rule.alpha * (math.sqrt(count) if rule.scale == "rslora" else count)
        return {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": None,
            "inference_mode": True,
            "r": rule.rank * count,
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "use_rslora": rule.scale == "rslora",
            "use_dora": self._has_magnitude,
            "lora_bias": rule.bias == "update",
            "lora_dropout": rule.dropout,
            "init_lora_weights": "gaussian" if rule.init == "gaussian" else True,
            "bias": {"adapted": "lora_only", "update": "none"}.get(rule.bias, rule.bias),
            "fan_in_fan_out": self._is_transposed(),
            "target_modules": self._target_modules(),
            "modules_to_save": self._saved_modules() or None,
        }

    def _check(self, given: dict[str, Any], folder: Path) -> None:
        """Raise ValueError where a configuration gives adapters of another kind or strength than the clause."""
        own = self._config()
        if given.get("peft_type") != "LORA":
            raise ValueError(f"{folder} holds an adapter of the type {given.get('peft_type')}")
        for name in _NOT_OURS:
            if given.get(name):
                raise ValueError(
                    f"{folder} uses peft's `{name}`, which `{self.rule.title}` does not have: compile the model that"
                    " `PeftModel.from_pretrained` makes of it, without `adapt`, and its adapters train as they are"
                )
        start = given.get("init_lora_weights", True)
        if isinstance(start, str) and start not in _KEEP_BASE:
            raise ValueError(
                f"{folder} has `init_lora_weights` = {start}, which changes the model's own weights, too: save it by"
                " peft's `path_initial_model_for_weight_conversion`, which gives adapters of the model as it was"
            )
        for name, (default, advice) in _SAME.items():
            if (value := given.get(name, default)) != own[name]:
                raise ValueError(
                    f"{folder} has `{name}` = {value}, but this program has {own[name]}: {advice}"
                )

    def _is_transposed(self) -> bool:
        """Say whether the linear layers hold their weights as (in, out)."""
        from torch import nn

        layers = self.adapted.layers.values()
        linear = [x for x in layers if not is_convolution(x) and not isinstance(x, nn.Embedding)]
        return bool(linear) and not any(isinstance(layer, nn.Linear) for layer in linear)

    def _target_modules(self) -> list[str] | str:
        """Return the names of the layers; as a regular expression where a name is also the end of another's."""
        names = list(self.adapted.adapters)
        if "" in names:
            raise ValueError(
                "peft has no place for an adapter of the model itself: put it in a module"
            )
        others = [n for n, _ in self.adapted.model.named_modules() if n not in names]
        if any(other.endswith(f".{name}") for name in names for other in others):
            return "|".join(map(re.escape, names))
        return names

    def _saved_modules(self) -> list[str]:
        """Return the modules whose own parameters train besides adapters, and besides the biases of `bias`."""
        adapted, rule = self.adapted, self.rule
        names = [n for n in adapted.trained if rule.bias not in _OF_MODEL or not is_bias(n)]
        for name in names:
            module = name.rpartition(".")[0]
            if module == "" or module in adapted.adapters:
                what = f"the adapted layer `{module}`" if module else "the model itself"
                raise ValueError(
                    f"peft has no place for `{name}`, a trained parameter of {what}: use `program.save`, which keeps"
                    " every parameter"
                )
        return list(dict.fromkeys(name.rpartition(".")[0] for name in names))

    def _tensors(self) -> dict[str, Tensor]:
        """Return the tensors by peft's names; those of a part have its name before `lora_A` and `lora_B`."""
        adapted, rule = self.adapted, self.rule
        found: dict[str, Tensor] = {}
        for path, module in adapted.layers.items():
            _refuse_form(path, module)
        for path, adapter in adapted.adapters.items():
            for part, pair in rule.pairs(adapter).items():
                found |= _factors(_prefix(path) + (f"{part}." if part else ""), pair)
            if (size := rule.magnitude(adapter)) is not None:
                size = by_output(adapted.layers[path], size.detach())
                of_convolution = size.dim() > 1
                found[f"{_prefix(path)}lora_magnitude_vector"] = (
                    size[None] if of_convolution else size
                )
        for path in self._saved_modules():
            state = adapted.model.get_submodule(path).state_dict(keep_vars=True)
            found |= {_prefix(path) + name: tensor for name, tensor in state.items()}
        if rule.bias not in _OF_MODEL:
            return found
        for name, parameter in adapted.model.named_parameters():
            layer = name.rpartition(".")[0]
            if is_bias(name) and layer in adapted.adapters:
                found[f"{_prefix(layer)}base_layer.bias"] = parameter
            elif is_bias(name) and rule.bias == "all":
                found[f"{_prefix(layer)}bias"] = parameter
        return found

    def _fuse(self, tensors: dict[str, Tensor], prefix: str) -> None:
        """Put the A and B of the parts of a layer in one A and one B."""
        import torch

        parts = self._parts
        a = [tensors.pop(f"{prefix}{part}.lora_A.weight") for part in parts]
        b = [tensors.pop(f"{prefix}{part}.lora_B.weight") for part in parts]
        whole = b[0].new_zeros(len(PARTS) * len(b[0]), len(parts) * self.rule.rank)
        for i, part in enumerate(parts):
            whole[self._block(part, i, len(b[0]))] = b[i]
        tensors[f"{prefix}lora_A.weight"], tensors[f"{prefix}lora_B.weight"] = torch.cat(a), whole

    def _split(self, tensors: dict[str, Tensor], prefix: str, folder: Path) -> None:
        """Undo `_fuse`; raises ValueError where B is not zero outside of the parts."""
        a, b = (tensors.pop(f"{prefix}lora_{letter}.weight", None) for letter in "AB")
        if a is None or b is None:
            return
        rank, rest = self.rule.rank, b.clone()
        for i, part in enumerate(self._parts):
            block = self._block(part, i, len(b) // len(PARTS))
            tensors[f"{prefix}{part}.lora_A.weight"] = a[i * rank : (i + 1) * rank]
            tensors[f"{prefix}{part}.lora_B.weight"] = b[block]
            rest[block] = 0
        if rest.any():
            raise ValueError(
                f"`{prefix}lora_B.weight` in {folder} also changes outputs outside of `parts`: remove `parts`, and"
                " write the rank and alpha of that file"
            )

    def _block(self, part: str, index: int, size: int) -> tuple[slice, slice]:
        """Return where the B of a part stands in the fused one: its outputs, and its ranks."""
        first, rank = PARTS.index(part) * size, self.rule.rank
        return slice(first, first + size), slice(index * rank, (index + 1) * rank)


def _factors(prefix: str, pair: Any) -> dict[str, Tensor]:
    """Return A and B by the names that they have in a layer of peft."""
    from torch import nn

    a, b = pair.a.weight.detach(), pair.b.weight.detach()
    if isinstance(pair.a, nn.Embedding):
        return {f"{prefix}lora_embedding_A": a.T, f"{prefix}lora_embedding_B": b}
    found = {f"{prefix}lora_A.weight": a, f"{prefix}lora_B.weight": b}
    return found if pair.b.bias is None else found | {f"{prefix}lora_B.bias": pair.b.bias.detach()}


def _refuse_form(name: str, layer: Any) -> None:
    """Raise ValueError for a convolution of which peft's A would have another form."""
    if is_convolution(layer) and (max(layer.dilation) > 1 or layer.padding_mode != "zeros"):
        raise ValueError(
            f"peft has no place for the adapter of `{name}`: its A has neither `dilation` nor `padding_mode`. Use"
            " `program.save`, which keeps every parameter"
        )


def is_bias(name: str) -> bool:
    """Say whether a parameter is a bias, by its name."""
    return name.rpartition(".")[2] == "bias"


def _prefix(module: str) -> str:
    return f"base_model.model.{module}." if module else "base_model.model."
