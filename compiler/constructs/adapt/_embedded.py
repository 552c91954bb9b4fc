"""Prompts in front of a model's embeddings, as in peft's prompt tuning: what the model is given, and the files."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainc.compiler.constructs.adapt._longer import Longer
from trainc.compiler.constructs.adapt._peft import CONFIG, WEIGHTS, all_names, to_store
from trainc.compiler.errors import SiteError
from trainc.compiler.model.adapter_rule import Adapted, load_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

_EMBEDDED = "inputs_embeds"
_VALUES = "prompt_embeddings"
_TYPES = ("PROMPT_TUNING", "P_TUNING")
"""Types of peft whose files hold the prompts as they are put in front of the embeddings."""
_HEADS = ("classifier", "score", "qa_outputs")
"""Names of the heads that peft keeps with the prompts of a model that classifies."""
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
"""Ends of class names of transformers, and the tasks that peft knows their models by."""


def embedded_width(name: str, layer: Any) -> int:
    """Return the channels of a model's embeddings; raises ValueError for a model that prompts cannot be in front of."""
    own = getattr(type(layer), "unbound", type(layer))
    takes = inspect.signature(own.forward).parameters
    found = getattr(layer, "get_input_embeddings", None)
    named = f"`{name}`" if name else "the model itself"
    if not callable(found) or _EMBEDDED not in takes:
        raise ValueError(
            f"{named} takes no `{_EMBEDDED}`, as `mode = input` needs: select a model of transformers, such as"
            ' `"model"` in LlamaForCausalLM, or its blocks with `mode = shallow`'
        )
    if "decoder_input_ids" in takes:
        raise ValueError(
            f"{named} has an encoder and a decoder: select one of them, such as `encoder`"
        )
    return int(found().weight.shape[1])


class Embedded(Longer):
    """The inputs of a model of transformers with prompts in front, at the first positions; tokens have the next ones.

    Raises SiteError for an input that has no place for prompts.
    """

    def __init__(
        self, layer: Any, adapter: Any, tokens: int, args: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        own = getattr(type(layer), "unbound", type(layer))
        names = [*inspect.signature(own.forward).parameters][1:]
        self.given = dict(zip(names, args, strict=False)) | named
        x, ids = self.given.pop(_EMBEDDED, None), self.given.pop("input_ids", None)
        if x is None and ids is not None:
            x = layer.get_input_embeddings()(ids)
        super().__init__(layer, adapter, 0, tokens, x, 0)
        self.x: Tensor = x

    def with_all(self, prompts: Tensor) -> dict[str, Any]:
        """Return the inputs by name, the embeddings with the prompts (tokens, C) first."""
        past = self.given.get("past_key_values")
        if past is not None and (not hasattr(past, "get_seq_length") or past.get_seq_length()):
            raise self.error(
                "gets keys of earlier tokens, among which the prompts are: generating with a cache is not supported"
                " (`use_cache=False`)"
            )
        if self.given.get("labels") is not None:
            inner = getattr(self.layer, "base_model_prefix", "") or "the model inside it"
            raise self.error(
                f"computes a loss of its own, of `labels` that are none for prompts: select `{inner}` inside it"
            )
        self._refuse_few_positions()
        x = self.with_prompts(self.x, prompts)
        return {_EMBEDDED: x} | {n: self._fitting(n, v) for n, v in self.given.items()}

    def _refuse_few_positions(self) -> None:
        """Raise SiteError where learned positions end before the longer sequence does."""
        from torch import nn

        for name, module in self.layer.named_modules():
            learned = isinstance(module, nn.Embedding) and ("position" in name or "wpe" in name)
            if learned and module.num_embeddings < self.length + self.tokens:
                raise self.error(
                    f"has {module.num_embeddings} positions (`{name}`), and needs {self.length + self.tokens}:"
                    f" {self.tokens} for prompts, {self.length} for tokens"
                )

    def _fitting(self, name: str, value: Any) -> Any:
        """Return another input; prompts are of the first type of token."""
        if name == "token_type_ids" and value is not None:
            return self._with(value, value.new_zeros(len(value), self.tokens), 1)
        return super()._fitting(name, value)

    def _copied(self, value: Tensor, axis: int) -> Tensor:
        """Return positions of the tokens behind those of the prompts, which come first."""
        import torch

        if value.is_floating_point():
            raise self.error(
                "gets rotary positions of its tokens, which do not tell those of prompts"
            )
        first = torch.arange(self.tokens, device=value.device, dtype=value.dtype)
        return torch.cat([first.expand(*value.shape[:-1], -1), value + self.tokens], axis)


def without_prompts(adapter: Any, output: Any, length: int, tokens: int) -> Any:
    """Return what a model gives, without the prompts in states and logits (B, T, C) of a sequence of `length`."""
    import torch

    found = 0

    def cut(value: Any) -> Any:
        nonlocal found
        if isinstance(value, torch.Tensor):
            whole = value.dim() == 3 and value.shape[1] == length
            found += whole or (value.dim() == 3 and value.shape[1] == 1)  # the last token alone
            return value[:, tokens:].contiguous() if whole else value
        if isinstance(value, Mapping) and hasattr(value, "to_tuple"):
            return type(value)(**{name: cut(one) for name, one in value.items()})
        return tuple(map(cut, value)) if type(value) is tuple else value

    changed = cut(output)
    if not found:
        raise SiteError(
            f"`{adapter.layer_name}` gives no states (B, T, C) of a sequence of {length} tokens with prompts: select"
            " the model whose states its head uses",
            adapter.label,
        )
    return changed


class PromptFormat:
    """The prompts of one clause as files of peft: `prompt_embeddings`, and what else trains."""

    def __init__(self, title: str, adapted: Adapted) -> None:
        self.title, self.adapted = title, adapted
        ((self.layer_name, held),) = adapted.adapters.items()
        self.prompts: Tensor = held.get_parameter("prompts")

    def write(self, folder: Path) -> None:
        """Write the configuration and the tensors; raises ValueError where a parameter of the model itself trains."""
        from safetensors.torch import save_file

        save_file(to_store(self._tensors()), folder / WEIGHTS, {"format": "pt"})
        text = json.dumps(self._config(), indent=2, sort_keys=True)
        (folder / CONFIG).write_text(text + "\n")

    def read(self, folder: Path) -> None:
        """Load the tensors; raises ValueError where the configuration is of other prompts."""
        from safetensors.torch import load_file

        from trainc.runtime.storage.foreign_files import interpreting, read_json

        (folder / CONFIG).stat()  # raises where there is no adapter at all
        given = read_json(folder / CONFIG)
        if (kind := given.get("peft_type")) not in _TYPES:
            raise ValueError(
                f"{folder} holds an adapter of the type {kind}, and `{self.title}` reads {' and '.join(_TYPES)}"
            )
        count = (given.get("num_virtual_tokens") or 0) * (
            given.get("num_transformer_submodules") or 1
        )
        if count != len(self.prompts):
            raise ValueError(
                f"{folder} has {count} prompts, but this program has {len(self.prompts)}: write `tokens = {count}`"
            )
        with interpreting(folder / WEIGHTS):
            found = load_file(str(folder / WEIGHTS))
        load_tensors(self._tensors(), found, str(folder))

    def _config(self) -> dict[str, Any]:
        return {
            "peft_type": _TYPES[0],
            "task_type": self._task(),
            "base_model_name_or_path": None,
            "inference_mode": True,
            "num_virtual_tokens": len(self.prompts),
            "token_dim": self.prompts.shape[1],
            "num_transformer_submodules": 1,
            **self._sizes(),
            "prompt_tuning_init": "RANDOM",
            "modules_to_save": self._saved_modules() or None,
        }

    def _sizes(self) -> dict[str, int]:
        """Return what peft asks of every model: it finds each under some names, and under no others."""
        config = getattr(self.adapted.layers[self.layer_name], "config", None)
        names = {"num_layers": "num_hidden_layers", "num_attention_heads": "num_attention_heads"}
        found = {name: getattr(config, own, None) for name, own in names.items()}
        return {name: value for name, value in found.items() if isinstance(value, int)}

    def _task(self) -> str:
        """Return what peft calls the task of the model around the prompts; raises ValueError where it has none."""
        parts = self.layer_name.split(".")
        for path in (".".join(parts[:i]) for i in range(len(parts) + 1)):
            module: nn.Module = self.adapted.model.get_submodule(path)
            own = getattr(type(module), "unbound", type(module))
            if "decoder_input_ids" in inspect.signature(own.forward).parameters:
                raise ValueError(
                    "peft has no place for prompts of an encoder or a decoder alone: there the decoder sees those of"
                    " the encoder. Use `program.save`, which keeps every parameter"
                )
            for kind in getattr(type(module), "unbound", type(module)).__mro__:
                for end, task in _TASKS.items():
                    if kind.__name__.endswith(end):
                        return task
        return "FEATURE_EXTRACTION"

    def _saved_modules(self) -> list[str]:
        """Return the modules whose parameters are in the files, too: those that train, and heads that peft keeps."""
        trained = all_names(self.adapted.model, self.adapted.trained)
        names = [name.rpartition(".")[0] for name in trained]
        layer: Any = self.adapted.layers[self.layer_name]
        embedding = layer.get_input_embeddings().weight
        if any(self.adapted.model.get_parameter(name) is embedding for name in trained):
            raise ValueError(
                "peft has no place for token embeddings that train beside prompts: it looks up the frozen ones. Use"
                " `program.save`, which keeps every parameter"
            )
        if "" in names:
            raise ValueError(
                "peft has no place for a trained parameter of the model itself: use `program.save`, which keeps every"
                " parameter"
            )
        if self._task() not in ("CAUSAL_LM", "FEATURE_EXTRACTION"):
            modules = [n for n, _ in self.adapted.model.named_modules()]
            heads = [n for n in modules if n.rpartition(".")[2] in _HEADS]
            names = [
                n for n in names if not f"{n}.".startswith(tuple(f"{h}." for h in heads))
            ] + heads
        return list(dict.fromkeys(names))

    def _tensors(self) -> dict[str, Tensor]:
        """Return the tensors by peft's names."""
        found: dict[str, Tensor] = {_VALUES: self.prompts}
        for path in self._saved_modules():
            state = self.adapted.model.get_submodule(path).state_dict(keep_vars=True)
            found |= {f"base_model.{path}.{name}": tensor for name, tensor in state.items()}
        return found
