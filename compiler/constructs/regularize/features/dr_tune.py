"""DR-Tune: the head also classifies features of the frozen start, kept in a bank and calibrated to those of now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from trainc.compiler.constructs.regularize.features import _features
from trainc.compiler.errors import SiteError
from trainc.dsl.reading.construct import (
    Construct,
    Effect,
    ModuleSelector,
    Period,
    Problem,
    Schedule,
)
from trainc.dsl.values.value_json import Duration
from trainc.runtime.step.action import Action, Phase
from trainc.runtime.step.observer import Observer

if TYPE_CHECKING:
    from torch import Tensor

    from trainc.compiler.bind.bound_clause import Targets
    from trainc.compiler.lower.lowering import Lowering
    from trainc.compiler.method.term import Forward
    from trainc.runtime.companion.bank import Bank
    from trainc.runtime.companion.companion import Companion
    from trainc.runtime.processes.replica_group import ReplicaGroup
    from trainc.runtime.step.observer import Seen
    from trainc.runtime.step.record import Step

ROTATION = "rotation"


class DrTune(Construct):
    """Adds the head's cross-entropy on features that the frozen start gave, calibrated to those of the model.

    A bank keeps the last `bank` rows of three things: the features of the start (in evaluation mode),
    those of the model in its step, and their class. In each step, before its own rows are put in, the
    features of the start are brought to where those of the model are: both are divided by their norms,
    the start's are rotated by the orthogonal matrix that brings them nearest to the model's, each class
    is moved to the model's mean of it, weighted by the softmax of the cosines with the head's row of that
    class, and all get the mean norm of the micro-batch's features. The term is the mean over the filled
    slots of `-log softmax(head(v))[class]`. It trains the head alone: the features and the calibration
    have no gradient. An empty bank adds nothing, and slots that are not filled yet take no part.

    The rotation is computed every `refresh`; with `rotate = keep` it holds until the next, with
    `published` only the steps of a refresh are rotated.

    The published code takes one mean over the B examples of a batch and the K of the bank, which is
    `(cross-entropy + K/B * term) / (1 + K/B)`. For parity write `weight = 2048 / batch`, which is 32 for
    K = 2048 and B = 64, and give the backbone the published rate divided by 1 + K/B = 33: its 0.01 is
    really 3.0e-4, and the 0.33 of its head is 0.01.
    """

    cite: ClassVar = (
        "Zhou et al., DR-Tune: Improving Fine-tuning of Pretrained Visual Models by Distribution "
        "Regularization with Semantic Calibration, ICCV 2023, arXiv:2308.12058"
    )
    usage: ClassVar = 'regularize dr_tune on "ln_f" { bank = 24, weight = 0.5, refresh = 2 steps }'
    targets: ClassVar = "modules"
    identity: ClassVar = {"weight": "0"}
    effects: ClassVar = (
        Effect("perturb", "copy the start; rotate the bank", ("params", "clock"), ("forward",)),
        Effect("forward", "classify the bank", ("forward", "params", "clock"), ("loss",)),
        Effect("observe", "put features into the bank", ("inputs", "forward"), ("forward",)),
    )
    division: ClassVar = "calibrated features have the mean norm of one micro-batch's features"
    functions: ClassVar = tuple(
        f"trainc.compiler.constructs.regularize.features.dr_tune:{name}"
        for name in ("dr_calibrate", "dr_rotation")
    )

    weight: Schedule = Field(description="coefficient of the term")
    bank: int = Field(
        default=2048, ge=1, description="rows that are kept, of all replicas together"
    )
    refresh: Period = Field(
        default=Duration(10, "steps"), description="how often the rotation is computed"
    )
    rotate: Literal["keep", "published"] = Field(
        default="keep",
        description="whether the rotation holds until the next, or acts in the steps of a refresh alone",
    )
    head: ModuleSelector | None = Field(
        default=None,
        description="the linear layer that classifies the features. Default: the model's head",
    )

    def validate_targets(self, bound: Targets) -> Iterable[Problem]:
        """Report more than one module."""
        return _features.one_module(bound)

    def lower(self, to: Lowering) -> None:
        """Keep the start and the bank, and add the cross-entropy of what is in it."""
        import torch

        from trainc.runtime.companion.bank import Bank

        (module,) = (entry.name for entry in to.modules())
        weight, bias = self._head(to)
        like = to.tensor(weight)
        width = like.shape[1]
        start = to.companion("start", capture=[module])
        dtype = torch.promote_types(like.dtype, torch.float32)
        rows = torch.zeros(0, width, dtype=dtype, device=like.device)
        labels = torch.zeros(0, dtype=torch.int64, device=like.device)
        bank = Bank(self.bank, {"pre": rows, "down": rows, "labels": labels}).to(like.device)
        bank.register_buffer(ROTATION, torch.eye(width, dtype=dtype, device=like.device))
        to.companion("bank", module=bank)
        window = to.window(None, None, self.refresh)
        to.action(Rotate(f"{to.label} rotation", bank, window, self.rotate == "keep"))
        to.capture([module])
        kept = ("pre", "down", "labels", ROTATION, "count")

        def value(forward: Forward) -> Tensor:
            features, _, counted = _features.rows_of(forward, module, to.label)
            if features.shape[1] != width:
                raise SiteError(
                    f"`{module}` gives features of width {features.shape[1]}, and the head `{weight}` takes {width}:"
                    " select the module whose output the head is given, or name the head by `head`",
                    to.label,
                )
            own = {name: forward.tensors[name] for name in kept}
            given = forward.parameters
            filled = torch.arange(self.bank, device=own["count"].device) < own["count"]
            with torch.no_grad():
                scale = _mean_norm(features, counted)
                pre, down, labels = (own[name] for name in kept[:3])
                calibrated = dr_calibrate(
                    pre, down, labels, given[weight], scale, own[ROTATION], filled
                )
            of_head = given[weight], given[bias] if bias else None
            return _cross_entropy(calibrated, labels, *of_head, filled)

        def held(name: str) -> Any:
            return lambda: bank.get_buffer(name)

        to.term(
            value,
            over="parameters",
            weight=self.weight,
            tensors={name: held(name) for name in kept},
            companions=[start],
            of_classes=True,
            what="cross-entropy of the calibrated bank",
        )
        to.observe(Enqueue(bank, start, module, to.label))

    def _head(self, to: Lowering) -> tuple[str, str | None]:
        """Return the names of the head's weight and bias; raises ValueError unless it is one linear layer."""
        if self.head is None:
            found = [m for m in to.inventory.modules if "head" in m.roles and "Linear" in m.types]
        else:
            found = [to.inventory.module[n] for n in to.select(self.head, "modules")]
        if len(found) != 1 or "Linear" not in found[0].types:
            names = ", ".join(f"`{m.name}` ({m.types[0]})" for m in found) or "none"
            where = "`head` selects" if self.head else "the heads of the model are"
            raise ValueError(
                f"it needs one linear layer that classifies the features, and {where} {names}: write"
                ' `head = "NAME"` with the name of a linear layer'
            )
        own = {name.rpartition(".")[2]: name for name in found[0].parameters}
        if "weight" not in own:
            raise ValueError(
                f"the head `{found[0].name}` computes its weight of other parameters, and what is in the bank is"
                " classified by a parameter: remove what computes it, such as weight_norm, or name another by `head`"
            )
        return own["weight"], own.get("bias")

    def reference(
        self,
        pre: Tensor,
        down: Tensor,
        labels: Tensor,
        head: Tensor,
        scale: Tensor,
        rotation: Tensor,
    ) -> Tensor:
        """Return the calibrated features (K, D) by definition, row by row; `scale` is the mean norm of the batch."""
        unit = [p / p.norm() for p in pre]
        new = [d / d.norm() for d in down]
        center = sum(unit, start=pre.new_zeros(pre.shape[1])) / len(unit)
        turned = [rotation @ (p - center) for p in unit]
        found = []
        for k, label in enumerate(labels.tolist()):
            mine = [j for j, other in enumerate(labels.tolist()) if other == label]
            phi = head[label] / head[label].norm()
            weights = [(new[j] @ phi).exp() for j in mine]
            target = sum(w * new[j] for w, j in zip(weights, mine, strict=True)) / sum(weights)
            moved = turned[k] + target - sum(turned[j] for j in mine) / len(mine)
            found.append(moved / moved.norm() * scale)
        return pre.new_tensor([row.tolist() for row in found])


class Rotate(Action):
    """Phase 3: computes the rotation of the bank, or takes it back where it acts in its own step alone."""

    phase = Phase.PERTURB

    def __init__(self, name: str, bank: Bank, window: Any, keeps: bool) -> None:
        self.name, self.bank, self.window, self.keeps = name, bank, window, keeps

    def run(self, step: Step) -> None:
        import torch

        bank = self.bank
        held = bank.get_buffer(ROTATION)
        if self.window.fires(step.clock):
            held.copy_(dr_rotation(bank.get_buffer("pre"), bank.get_buffer("down"), bank.filled))
        elif not self.keeps:
            held.copy_(torch.eye(len(held), dtype=held.dtype, device=held.device))


class Enqueue(Observer):
    """Phase 12: puts the features of a step into the bank, those of all replicas."""

    def __init__(self, bank: Bank, start: Companion, module: str, label: str) -> None:
        self.bank, self.start, self.module, self.label = bank, start, module, label
        self.seen: list[Mapping[str, Tensor]] = []

    def see(self, forward: Seen) -> None:
        down, labels, counted = _features.rows_of(forward, self.module, self.label)
        first = len(labels) // forward.views
        kept = counted[:first]
        pre = forward.captured_of(self.start)[self.module][0].reshape(first, -1)
        rows = {"pre": pre[kept], "down": down[:first][kept], "labels": labels[:first][kept]}
        self.seen.append(rows)

    def found(self, replicas: ReplicaGroup | None = None) -> Mapping[str, float]:
        import torch

        if self.seen:
            columns = self.bank.columns
            rows = {name: torch.cat([one[name] for one in self.seen]) for name in columns}
            if replicas is not None:
                flat = {name: one.reshape(len(one), -1) for name, one in rows.items()}
                of_all = {name: replicas.gather_examples(one) for name, one in flat.items()}
                rows = {n: one.reshape(-1, *rows[n].shape[1:]) for n, one in of_all.items()}
            self.bank.add(rows)
        return {}

    def forget(self) -> None:
        self.seen.clear()


def _mean_norm(features: Tensor, counted: Tensor) -> Tensor:
    """Return the mean L2 norm of the features (N, D) that count, 0-d."""
    norms = features.float().norm(dim=1) if features.dtype.itemsize < 4 else features.norm(dim=1)
    mean: Tensor = norms.where(counted, 0.0).sum() / counted.sum().clamp_min(1)
    return mean


def _cross_entropy(
    rows: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, filled: Tensor
) -> Tensor:
    """Return the mean cross-entropy of the head on the filled rows; 0 where there is none."""
    import torch
    from torch.nn.functional import cross_entropy, linear

    with torch.autocast(rows.device.type, enabled=False):
        logits = linear(rows, weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype))
        each = cross_entropy(logits, labels, reduction="none")
    mean: Tensor = each.where(filled, 0.0).sum() / filled.sum().clamp_min(1)
    return mean


def dr_rotation(pre: Tensor, down: Tensor, filled: Tensor | None = None) -> Tensor:
    """Return the rotation R (D, D) that brings centered unit features `pre` nearest to those of `down`, both (K, D).

    It is the orthogonal matrix with determinant 1 that minimizes the squared distance (Procrustes). Rows that are not
    `filled`, bool (K,), take no part; of fewer than two rows it is the identity. Raises ValueError where the shapes
    differ. Source: Zhou et al., arXiv:2308.12058.
    """
    import torch

    if pre.shape != down.shape or pre.dim() != 2:
        raise ValueError(
            f"`pre` has shape {list(pre.shape)} and `down` {list(down.shape)}: give rows (K, D) of both"
        )
    if filled is None:
        filled = pre.new_ones(len(pre), dtype=torch.bool)
    if int(filled.sum()) < 2:
        return torch.eye(pre.shape[1], dtype=pre.dtype, device=pre.device)
    wide = torch.promote_types(pre.dtype, torch.float32)
    with torch.autocast(pre.device.type, enabled=False):
        one, two = (_centered(_unit(rows.to(wide))[filled]) for rows in (pre, down))
        u, _, vt = torch.linalg.svd(one.T @ two)
        v = vt.T.clone()
        v[:, -1] *= torch.linalg.det(v @ u.T)
        turn: Tensor = v @ u.T
    return turn.to(pre.dtype)


def dr_calibrate(
    pre: Tensor,
    down: Tensor,
    labels: Tensor,
    head: Tensor,
    features: Tensor,
    rotation: Tensor | bool = True,
    filled: Tensor | None = None,
) -> Tensor:
    """Return features `pre` of a start (K, D) calibrated to those of a model, `down` (K, D), of the classes `labels`.

    `head` (classes, D) is the weight of the head, `features` (B, D) those of the batch, whose mean norm the result has,
    or that norm, 0-d. `rotation` is a matrix (D, D), or whether to compute it by `dr_rotation`. Rows that are not
    `filled`, bool (K,), take no part, and are zeros. A class may have any number of rows. Raises ValueError where the
    shapes do not fit each other. Source: Zhou et al., arXiv:2308.12058.
    """
    import torch

    if pre.shape != down.shape or labels.shape != pre.shape[:1] or head.shape[1:] != pre.shape[1:]:
        raise ValueError(
            f"`pre` {list(pre.shape)}, `down` {list(down.shape)}, `labels` {list(labels.shape)} and `head`"
            f" {list(head.shape)} do not fit: give rows (K, D) of both, their classes (K,), and a head (classes, D)"
        )
    if filled is None:
        filled = torch.ones_like(labels, dtype=torch.bool)
    if isinstance(rotation, bool):
        rotation = dr_rotation(pre, down, filled) if rotation else torch.eye(pre.shape[1]).to(pre)
    scale = features.norm(dim=1).mean() if features.dim() else features
    rows = filled.unsqueeze(1)
    with torch.autocast(pre.device.type, enabled=False):
        phi, new = _unit(head.detach().to(pre.dtype)), _unit(down)
        unit = _unit(pre).where(rows, 0.0)
        center = unit.sum(0) / filled.sum().clamp_min(1)
        turned = (unit - center).where(rows, 0.0) @ rotation.T
        classes = torch.arange(len(phi), device=labels.device).unsqueeze(1)
        own = (labels == classes) & filled
        number = own.sum(1, keepdim=True)
        # A class without rows has no softmax: nothing reads what stands there.
        cosines = (phi @ new.T).masked_fill(~own & (number > 0), -torch.inf)
        means = cosines.softmax(1) @ new - own.to(turned.dtype) @ turned / number.clamp_min(1)
        found: Tensor = _unit(turned + means[labels]) * scale.to(pre.dtype)
    return found.where(rows, 0.0)


def _unit(rows: Tensor) -> Tensor:
    from torch.nn.functional import normalize

    return normalize(rows, dim=1)


def _centered(rows: Tensor) -> Tensor:
    return rows - rows.mean(0)
