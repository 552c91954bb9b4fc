"""Tokens that a teacher reads before every sample: where they come from, and how inputs and logits change.

Shapes: B examples of T tokens, P tokens in the prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trainc.compiler.errors import FieldError, SiteError
from trainc.compiler.model.import_path import ImportProblem, import_callable
from trainc.dsl.reading.construct import ImportPath

if TYPE_CHECKING:
    from torch import Tensor, nn

_SIZES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def read_prefix(
    prefix: str | tuple[int, ...], tokenizer: Literal["bytes"] | ImportPath
) -> list[int]:
    """Return the ids of a prefix: its own, or those of the text in a file; raises FieldError where there are none."""
    if not isinstance(prefix, str):
        return list(prefix)
    from trainc.runtime.sources.texts import NoText, NoTokens, ids_of

    path = Path(prefix)
    try:
        if tokenizer == "bytes":
            found = list(path.read_bytes())
        else:
            ids = ids_of([path], import_callable(tokenizer, "tokenizer"))
            found = [int(one) for one in ids.tokens]
    except (OSError, NoText) as error:
        raise FieldError("prefix", f"the prefix cannot be read: {error}") from error
    except (NoTokens, ImportProblem) as error:
        raise FieldError("tokenizer", f"`{tokenizer}`: {error}") from error
    if not found:
        raise FieldError(
            "prefix", f"{prefix} is empty: write the text that the teacher reads first"
        )
    return found


def context_of(model: nn.Module) -> int | None:
    """Return how many tokens a model can read, by its `config` or the rows of its embedding of positions."""
    from torch import nn

    config = getattr(model, "config", None)
    for name in _SIZES:
        if isinstance(size := getattr(config, name, None), int):
            return size
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "pos" in name.rpartition(".")[2]:
            return module.num_embeddings
    return None


@dataclass(frozen=True)
class Prefixed:
    """Runs a model on the prefix and each sample, and gives its logits at the sample's tokens, (B, T, classes)."""

    ids: tuple[int, ...]
    context: int | None
    clause: str

    def __call__(self, run: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        """Return the logits; raises SiteError at the clause where inputs are no tokens or do not fit the model."""
        tokens = self._tokens(inputs)
        whole = len(self.ids) + tokens.shape[1]
        if self.context is not None and whole > self.context:
            raise self._error(too_long(len(self.ids), tokens.shape[1], self.context))
        try:
            logits = run(self._before(inputs, tokens))
        except (IndexError, RuntimeError, ValueError, TypeError) as error:
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            raise self._error(
                f"the teacher cannot read {len(self.ids)} tokens of `prefix` and {tokens.shape[1]} of a sample"
                f" ({what}): its context may be shorter"
            ) from error
        if logits.dim() != 3 or logits.shape[1] != whole:
            raise self._error(
                f"the teacher reads {whole} tokens with `prefix` and gives logits of shape {list(logits.shape)}: a"
                " prefix needs logits at every token"
            )
        return logits[:, len(self.ids) :]

    def _tokens(self, inputs: Any) -> Tensor:
        """Return the ids of a batch: the inputs, or the one of their parts that holds ids."""
        import torch

        found = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
        if not isinstance(found, torch.Tensor) or found.dim() != 2 or found.is_floating_point():
            raise self._error(
                "a prefix of tokens needs inputs of tokens: one integer tensor (examples, tokens), or a dict with"
                " `input_ids`"
            )
        return found

    def _before(self, inputs: Any, tokens: Tensor) -> Any:
        """Return the inputs with the prefix before every sample."""
        import torch

        own = torch.tensor(self.ids, dtype=tokens.dtype, device=tokens.device)
        before = {"input_ids": own, "attention_mask": torch.ones_like(own)}
        before["position_ids"] = torch.arange(len(own), device=tokens.device)
        before["token_type_ids"] = torch.zeros_like(own)

        def extended(name: str, given: Any) -> Any:
            if not isinstance(given, torch.Tensor) or given.shape[:2] != tokens.shape:
                return given
            if name not in before or given.dim() != 2:
                raise self._error(
                    f"the input `{name}` has a value for each token, and nothing says which those of the prefix have:"
                    " leave it out, or distill without `prefix`"
                )
            shift = len(self.ids) if name == "position_ids" else 0
            first = before[name].to(given.dtype).expand(len(given), -1)
            return torch.cat([first, given + shift if shift else given], 1)

        if not isinstance(inputs, Mapping):
            return extended("input_ids", inputs)
        return {name: extended(name, value) for name, value in inputs.items()}

    def _error(self, message: str) -> SiteError:
        return SiteError(message, self.clause, "prefix")


def too_long(prefix: int, sample: int, context: int) -> str:
    """Return the message of a prefix that does not fit into a model's context."""
    return (
        f"`prefix` has {prefix} tokens and a sample {sample}, and the model reads {context} at most: shorten the prefix"
        f" to {max(context - sample, 0)} tokens, or the samples"
    )
