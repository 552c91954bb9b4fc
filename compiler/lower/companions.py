"""Mechanisms for a clause that keeps another module beside the model, or other weights for evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from trainc.compiler.errors import FieldError
from trainc.compiler.lower.clause_access import ClauseAccess
from trainc.compiler.structure.roles import HEAD
from trainc.runtime.companion.companion import Companion, Since, Through
from trainc.runtime.companion.history import History
from trainc.runtime.companion.module_copy import saved_tensors


class CompanionAccess(ClauseAccess):
    """One clause's access to modules beside the model."""

    # Modules beside the model

    def companion(
        self,
        name: str,
        *,
        module: nn.Module | None = None,
        since: Since = "start",
        parameters: Iterable[str] | None = None,
        wide: bool = False,
        weights: Mapping[str, Tensor] | None = None,
        through: Through | None = None,
        capture: Iterable[str] = (),
    ) -> Companion:
        """Return another module beside the model, in eval mode, with checkpointed values: `module`, or a copy.

        A copy holds the model as it is before the first step of the run (`start`), before the first step in which the
        clause's gate is open (`from`), or when its `copy` is called (`call`), so that the clause declares an effect in
        `perturb`, or in `observe`. It has own values of `parameters` that train, of all unless given, and of the
        buffers beside them; where `wide`, in float32 at least. With `weights`, a state dict of the model, it has these.
        `through` gives its logits of what runs it on other inputs, and of the inputs of the batch; `capture` names
        modules of which a term reads `forward.captured_of` it. What trains is no companion: `adapt` adds it, and a term
        reads its parameters. Raises ValueError for sharded parameters, and for weights of another model.
        """
        self.refuse_shards(
            (entry.name for entry in self.inventory.parameters),
            "it keeps a copy of the model",
            "Use DistributedDataParallel, or remove the clause",
        )
        names = partial(self._held, None if parameters is None else frozenset(parameters))
        if weights is not None:
            weights = self._fitting(weights)
            names = partial(set, weights)
        given: Any = {"wide": wide, "weights": weights, "through": through, "capture": capture}
        made = Companion(f"{self.label} {name}", self.model, names, module, since, **given)
        follows_clause = since == "from" and module is None
        made.gate = self.gate() if follows_clause else None
        if module is None:
            made.output = self._logits_output
        self._method.actions.append(made)
        return made

    def _logits_output(self) -> str | int | None:
        """Return which part of the model's output has the logits, once all clauses are lowered."""
        loss = self._method.loss
        return None if loss is None else loss.logits_output

    def _fitting(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return weights by the first name of each tensor; raises ValueError unless they are of this model."""
        own, saved = self.model.state_dict(keep_vars=True), saved_tensors(self.model)
        given = {id(tensor): weights[name] for name, tensor in own.items() if name in weights}
        odd = sorted(weights.keys() - own.keys())
        missing = [name for name, tensor in saved.items() if id(tensor) not in given]
        if odd or missing:
            reason = f"the model has no `{odd[0]}`" if odd else f"they have no `{missing[0]}`"
            raise ValueError(f"the weights are of another model: {reason}")
        found = {name: given[id(tensor)] for name, tensor in saved.items()}
        for name, tensor in saved.items():
            if tensor.shape != found[name].shape:
                raise ValueError(
                    f"the weights are of another model: `{name}` has shape {list(found[name].shape)}, and the model's"
                    f" {list(tensor.shape)}"
                )
        return found

    def history(self, limit: float, field: str, instead: str) -> History:
        """Return what keeps the logits that each sample had last, in 16 bits, which terms read by `forward.previous`.

        It keeps those of the steps in which the clause's gate is open, of the first view, and of all replicas alike.
        Checkpoints hold it. Raises FieldError for `field` where it would take more than `limit` GiB; its message says
        what to do `instead`.
        """
        made = History(self.label, limit, instead, self._table_shape())
        if made.expected and made.memory() > made.limit:
            raise FieldError(field, made.too_large(made.expected))
        made.gate = self.gate()
        self._method.rewrite.observers.append(made)
        self._method.actions.append(made)
        return made

    def _table_shape(self) -> tuple[int, ...]:
        """Return samples, tokens where there are several, and classes, as far as data and head tell; else ()."""
        units = self._context.units
        heads = [m for m in self.inventory.modules if HEAD in m.roles and m.ndim == 2]
        if not heads or units.samples_per_epoch is None:
            return ()
        weights = (self.inventory.parameter[name] for name in heads[-1].parameters)
        classes = next((weight.shape[0] for weight in weights if weight.ndim == 2), 0)
        tokens = int(units.tokens_per_sample or 1)
        of_sample = (tokens, classes) if tokens > 1 else (classes,)
        return (int(units.samples_per_epoch), *of_sample) if classes else ()

    def _held(self, parameters: frozenset[str] | None) -> set[str]:
        """Return which of these parameters train, and the names of saved buffers in their modules."""
        trained = {name for part in self._method.optimizers for name in part.targets}
        trained = {
            n for n in trained - self._method.frozen if self.inventory.parameter[n].trainable
        }
        held = trained if parameters is None else trained & parameters
        owners = {owner for name in held for owner in self.inventory.parameter[name].modules}
        return held | {
            name
            for name, tensor in saved_tensors(self.model).items()
            if not isinstance(tensor, nn.Parameter)
            and (held == trained or name.rpartition(".")[0] in owners)
        }

    def evaluate_with(self, companion: Companion) -> None:
        """Let evaluation and saving use a companion's values in place of the trained weights, once it has any.

        Raises ValueError for a companion that is no copy of the model.
        """
        if not companion.is_copy:
            raise ValueError(
                f"evaluation uses values of the model's own tensors, and `{companion.name}` is another module: give"
                " `to.companion` no `module`"
            )
        self._method.evaluated_with[self.label] = companion
