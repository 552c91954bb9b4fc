"""The files of peft: what `PeftModel.from_pretrained` reads, and what its `save_pretrained` writes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trainc.compiler.constructs.adapt._fused import fuse, split
from trainc.compiler.constructs.adapt._layers import by_output, is_convolution
from trainc.compiler.model.adapter_rule import Adapted, load_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NOT_OURS = (
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
"""Settings of peft that give adapters of another kind."""
_PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
"""Settings of peft that a layer may have a value of its own of, and where this stands, by patterns of names."""
_DEFAULT = 8
"""The value of both where a file leaves them out."""
_SAME: dict[str, tuple[Any, str]] = {
    "use_rslora": (False, "write the same `scale` in the clause"),
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
    """The adapters of clauses that share files, as files of peft: each layer has the rank and alpha of its clause.

    The parts of a fused projection are there one adapter of their common rank, whose B is zero elsewhere.
    """

    def __init__(self, rule: LowRankRule, adapted: Adapted) -> None:
        self.rule, self.adapted = rule, adapted
        self._has_magnitude = rule.magnitude(next(iter(adapted.adapters.values()))) is not None

    def write(self, folder: Path) -> None:
        """Write the configuration and the tensors."""
        from safetensors.torch import save_file

        found = to_store(self._tensors())
        for layer, adapter in self.adapted.adapters.items():
            if parts := _parts(adapter):
                fuse(found, _prefix(layer), parts)
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
        for layer, adapter in self.adapted.adapters.items():
            if parts := _parts(adapter):
                split(found, _prefix(layer), parts, _rule(adapter).rank, folder)
        load_tensors(self._tensors(), found, str(folder))

    def _config(self) -> dict[str, Any]:
        rule, of_layers = self.rule, self._strengths()
        whole = next(iter(of_layers.values()))
        return {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": None,
            "inference_mode": True,
            **whole,
            **{
                pattern: {
                    self._pattern(layer): own[name]
                    for layer, own in of_layers.items()
                    if own[name] != whole[name]
                }
                for name, pattern in _PATTERNS.items()
            },
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

    def _strengths(self) -> dict[str, dict[str, float]]:
        """Return peft's `r` and `lora_alpha` of each layer: of parts, those of the one adapter that they are there."""
        found = {}
        for layer, adapter in self.adapted.adapters.items():
            rule = _rule(adapter)
            count = len(_parts(adapter)) or 1
            alpha = rule.alpha * (math.sqrt(count) if rule.scale == "rslora" else count)
            found[layer] = {
                "r": rule.rank * count,
                "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            }
        return found

    def _pattern(self, layer: str) -> str:
        """Return a pattern that peft finds in the name of this layer alone: the name itself where it is one."""
        others = [name for name in self.adapted.adapters if name != layer]
        alone = not any(map(_matcher(layer), others))
        return layer if alone else f"^{re.escape(layer)}"

    def _check_strengths(self, given: dict[str, Any], folder: Path) -> None:
        """Raise ValueError where a layer has another rank or alpha in a configuration than in its clause."""
        for layer, own in self._strengths().items():
            there = {name: _of_layer(given, name, layer, folder) for name in _PATTERNS}
            for name, value in there.items():
                if value != own[name]:
                    wanted = ", ".join(f"`{key}` = {one}" for key, one in there.items())
                    raise ValueError(
                        f"{folder} has `{name}` = {value} for `{layer}`, but this program has {own[name]}: write the"
                        f" rank and alpha that give {wanted} in the clause that adapts it, and a clause of their own"
                        " for layers with others"
                    )

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
        self._check_strengths(given, folder)
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
        names = all_names(adapted.model, names)
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
            for part, pair in _rule(adapter).pairs(adapter).items():
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


def _rule(adapter: Any) -> LowRankRule:
    """Return the fields of the clause that an adapter is of."""
    found: LowRankRule = adapter.rule
    return found


def _parts(adapter: Any) -> dict[str, Any]:
    """Return the factors of an adapter by part of its layer; none where it is one for all outputs."""
    return {part: pair for part, pair in _rule(adapter).pairs(adapter).items() if part}


def _matcher(pattern: str) -> Callable[[str], bool]:
    """Return whether peft finds a pattern in a name: at its end, from a dot or the beginning on."""
    found = re.compile(rf"(.*\.)?({pattern})$")
    return lambda name: found.match(name) is not None


def _of_layer(given: dict[str, Any], name: str, layer: str, folder: Path) -> Any:
    """Return a setting for one layer: of the first pattern that peft finds in its name, or else that of all."""
    patterns = given.get(_PATTERNS[name]) or {}
    try:
        own = next((value for key, value in patterns.items() if _matcher(key)(layer)), None)
    except (AttributeError, re.error) as error:
        raise ValueError(
            f"`{_PATTERNS[name]}` in {folder} is no table of patterns of names: {error}"
        ) from error
    return given.get(name, _DEFAULT) if own is None else own


def all_names(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return names of parameters with all others of the same ones: peft unties what it saves a module of."""
    wanted = [*map(model.get_parameter, names)]
    found: dict[int, list[str]] = {id(parameter): [] for parameter in wanted}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            found.get(id(parameter), []).append(name)
    return [name for parameter in wanted for name in found[id(parameter)]]


def to_store(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as safetensors stores them: each with memory of its own."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        kept = tensor.detach().cpu().contiguous()
        found[name] = kept.clone() if id(tensor) in seen else kept
        seen.add(id(tensor))
    return found


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
