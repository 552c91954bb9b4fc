"""DELTA: the outputs of layers stay near those that the model gave at its start."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from trainc.compiler.errors import ExampleAxisUnknown, FieldError, SiteError
from trainc.compiler.model.import_path import ImportProblem, import_callable
from trainc.dsl.reading.construct import Construct, Effect, ImportPath, Problem, Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.method.term import Forward


class Delta(Construct):
    """Adds `weight` times the squared distance of the selected layers' outputs from those of the start to the loss.

    The term is the mean over the examples of the sum over the selected modules, their channels j and all positions of
    omega_j |FM_j(x; w) - FM_j(x; w0)|^2; with `reduction = mean` each module's sum is divided by the number of entries
    of its output. w0 are the weights before the first step in which the clause acts; the model with them runs on the
    same inputs in evaluation mode, without gradient, so that dropout and the statistics of a batch are part of the
    distance. All omega are 1, or those that a function returns. Channels are axis 1 of outputs of 4 and 5 axes, and
    else the last. Of a module that gives a tuple it is the first tensor. Where clauses pass an example several times,
    it is of the first view. On the head, which no feature follows, use `l2_sp { to = zero }`, as the paper does.
    """

    cite: ClassVar = (
        "Li, Xiong, Wang et al., DELTA: Deep Learning Transfer using Feature Map with Attention for Convolutional "
        "Networks, ICLR 2019, arXiv:1901.09229"
    )
    usage: ClassVar = 'regularize delta on "blocks.*" { weight = 0.01 }'
    targets: ClassVar = "modules"
    identity: ClassVar = {"weight": "0"}
    effects: ClassVar = (
        Effect("perturb", "copy the model as it starts", ("params",)),
        Effect(
            "forward",
            "compare features with those of the start",
            ("inputs", "forward", "clock"),
            ("loss",),
        ),
    )

    weight: Schedule = Field(description="coefficient of the squared distance")
    omega: Literal["uniform"] | ImportPath = Field(
        default="uniform",
        description="weights of channels: 1 for all, or `module:function`, which returns 1-d tensors by module name",
    )
    reduction: Literal["sum", "mean"] = Field(
        default="sum", description="whether the entries of a module's output are summed or averaged"
    )

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report a module that is never called."""
        for entry in bound.modules:
            if entry.types[0] in ("ModuleList", "ModuleDict"):
                message = f"`{entry.name}` holds modules and is never called, so it has no output"
                help_ = f'select the modules in it, as in `"{entry.name}.*"`'
                yield Problem("wrong-target-kind", message, help=help_)
                return

    def lower(self, to: Lowering) -> None:
        """Keep the start, capture the outputs of both models, and add their distance."""
        names = [module.name for module in to.modules()]
        start = to.companion("start", since="from", capture=names)
        to.capture(names)
        omegas = self._omegas(names)

        def value(forward: Forward) -> Tensor:
            fixed, total = forward.captured_of(start), None
            for name in names:
                rows = len(forward.targets)
                own = [
                    _first(one, name, rows, forward.views, to.label)
                    for one in forward.captured.get(name, ())
                ]
                if not own:
                    raise SiteError(
                        f"`{name}` was not called in the pass: exclude it from `on`", to.label
                    )
                _require_pairs(own, fixed[name], name, to.label)
                omega = forward.tensors.get(f"omega:{name}")
                for pair in zip(own, fixed[name], strict=True):
                    one = self.reference(*pair, omega)
                    total = one if total is None else total + one
            assert total is not None
            return total

        to.term(
            value,
            over="examples",
            weight=self.weight,
            companions=[start],
            tensors={f"omega:{name}": omega for name, omega in omegas.items()},
            what=f"squared distance of the features of {len(names)} modules from the start",
        )

    def _omegas(self, names: list[str]) -> dict[str, Tensor]:
        """Return the weights of channels that the function gives; raises FieldError where it gives others."""
        if self.omega == "uniform":
            return {}
        import torch

        try:
            found = import_callable(self.omega, "function")()
        except ImportProblem as error:
            raise FieldError("omega", str(error)) from error
        except Exception as error:  # whatever the user's function raises
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise FieldError("omega", f"`{self.omega}` failed: {reason}") from error
        given = dict(found) if isinstance(found, Mapping) else {}
        wrong = [
            n for n in names if not isinstance(given.get(n), torch.Tensor) or given[n].dim() != 1
        ]
        if wrong:
            raise FieldError(
                "omega",
                f"`{self.omega}` returned no 1-d tensor for `{wrong[0]}`: it must return a dict with the weights of the"
                " channels of each selected module, by name",
            )
        return {name: given[name] for name in names}

    def reference(self, own: Tensor, start: Tensor, omega: Tensor | None = None) -> Tensor:
        """Return the mean over examples of the weighted squared distance of two outputs (B, ...), 0-d.

        It is in float32 at least. `omega` has a weight for each channel; without it all are 1.
        """
        import torch

        dtype = torch.promote_types(own.dtype, torch.float32)
        squares = (own.to(dtype) - start.to(dtype)).square()
        if omega is not None:
            axis = 1 if squares.dim() > 3 else -1
            if len(omega) != squares.shape[axis]:
                raise FieldError(
                    "omega", f"it has {len(omega)} weights for {squares.shape[axis]} channels"
                )
            squares = squares.movedim(axis, -1) * omega.to(squares)
        per_example = squares.flatten(1).sum(1)
        if self.reduction == "mean":
            per_example = per_example / squares[0].numel()
        return per_example.mean()


def _first(output: Tensor, name: str, rows: int, views: int, clause: str) -> Tensor:
    """Return the part of the first view; raises ExampleAxisUnknown unless the first axis has the examples."""
    if output.dim() < 2 or len(output) != rows * views:
        raise ExampleAxisUnknown(
            f"`{name}` gives an output of shape {tuple(output.shape)}, and the batch has {rows} examples. The distance"
            " is a mean over examples and needs them on the first axis: exclude the layer from `on`",
            clause,
        )
    return output[:rows]


def _require_pairs(own: list[Tensor], start: list[Tensor], name: str, clause: str) -> None:
    """Raise SiteError unless a module gives as many outputs, of the same shapes, as it gave at the start."""
    now, then = ([list(one.shape) for one in outputs] for outputs in (own, start))
    if now != then:
        raise SiteError(
            f"`{name}` gives outputs of the shapes {now}, and in the model of the start, which is in evaluation mode,"
            f" {then}: these have no distance. Exclude it from `on`",
            clause,
        )
