"""Optimizers as somebody else would write them: what each keeps, and where, is unlike what torch's own keep."""

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Plain(torch.optim.Optimizer):
    """Base: `update` of each parameter that has a gradient, as gradient descent."""

    def __init__(
        self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0, **more: Any
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **more})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad, self.state[p], group)

    def update(self, p: Tensor, grad: Tensor, state: dict[Any, Any], group: dict[str, Any]) -> None:
        p.sub_(group["lr"] * grad)


class Counted(Plain):
    """Counts its steps in an attribute, and keeps the largest gradient in another: neither is in its state dict."""

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr, weight_decay)
        self.steps = 0
        self.largest = torch.zeros(())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        self.steps += 1
        super().step()

    def update(self, p: Tensor, grad: Tensor, state: dict[Any, Any], group: dict[str, Any]) -> None:
        self.largest = torch.maximum(self.largest, grad.abs().max())
        p.sub_(group["lr"] / self.steps * grad / (1 + self.largest))


class Distance(Plain):
    """Estimates the distance to the solution, as Prodigy does: the estimate is in the groups, one tensor for all."""

    def __init__(
        self, params: Any, lr: float = 1.0, d0: float = 1e-3, weight_decay: float = 0.0
    ) -> None:
        more = {"d": d0, "d0": d0, "k": 0, "longest": math.inf, "last": None, "mode": "plain"}
        super().__init__(params, lr, weight_decay, **more)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        moved, length = torch.zeros(()), torch.zeros(())
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"s": torch.zeros(p.numel())[::2].clone(), "step": 0}
                    state["p0"] = p.flatten()[::2].clone() if p.any() else torch.tensor(0.0)
                part = p.grad.flatten()[::2]
                state["s"].add_(part, alpha=float(group["d"]))
                state["step"] += 1
                moved += (part * (state["p0"] - p.flatten()[::2])).sum()
                length += state["s"].abs().sum()
        first = self.param_groups[0]
        numerator = first.get("numerator", torch.zeros(())) + float(first["d"]) * moved
        d = torch.maximum(torch.as_tensor(float(first["d"])), numerator / length)
        for group in self.param_groups:
            group |= {"d": d, "numerator": numerator, "k": group["k"] + 1, "mode": "seen"}
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * float(d) * group["weight_decay"])
                    p.sub_(p.grad.sign(), alpha=group["lr"] * float(d))


class Averaged(Plain):
    """Trains a point between an iterate and its average, which evaluation uses: schedule-free gradient descent."""

    def __init__(
        self, params: Any, lr: float = 1e-2, beta: float = 0.9, weight_decay: float = 0.0
    ) -> None:
        more = {"beta": beta, "k": 0, "weight_sum": 0.0, "lr_max": -1.0, "train_mode": False}
        super().__init__(params, lr, weight_decay, **more)

    def train(self) -> None:
        self._move(to_training=True)

    def eval(self) -> None:
        self._move(to_training=False)

    @torch.no_grad()
    def _move(self, to_training: bool) -> None:
        for group in self.param_groups:
            beta = group["beta"]
            if group["train_mode"] != to_training:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], 1 - beta if to_training else 1 - 1 / beta)
                group["train_mode"] = to_training

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        if not self.param_groups[0]["train_mode"]:
            raise RuntimeError("the optimizer is in evaluation mode")
        for group in self.param_groups:
            lr, beta = group["lr"], group["beta"]
            group["lr_max"] = max(lr, group["lr_max"])
            weight = group["lr_max"] ** 2
            group["weight_sum"] += weight
            share = weight / group["weight_sum"] if group["weight_sum"] else 0.0
            for p in group["params"]:
                if p.grad is None:
                    continue
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, share)
                p.sub_(p.grad, alpha=lr * (1 - beta * (1 - share)))
                z.sub_(p.grad, alpha=lr)
            group["k"] += 1


class Swapping(Plain):
    """Keeps a running mean of the weights in its state, and exchanges it with them in place for evaluation."""

    training = True

    def train(self) -> None:
        self._swap(training=True)

    def eval(self) -> None:
        self._swap(training=False)

    @torch.no_grad()
    def _swap(self, training: bool) -> None:
        if training != self.training:
            for p, state in self.state.items():
                held = p.detach().clone()
                p.copy_(state["mean"])
                state["mean"].copy_(held)
        self.training = training

    def update(self, p: Tensor, grad: Tensor, state: dict[Any, Any], group: dict[str, Any]) -> None:
        assert self.training
        super().update(p, grad, state, group)
        state.setdefault("mean", p.clone()).lerp_(p, 0.1)


class Nested(Plain):
    """Keeps dicts, lists and a deque, keys of every kind, wide numbers, and what is no tensor."""

    def update(self, p: Tensor, grad: Tensor, state: dict[Any, Any], group: dict[str, Any]) -> None:
        if not state:
            state |= {
                "axes": [torch.zeros(n, n) for n in grad.shape],
                "wide": torch.zeros(p.shape, dtype=torch.float64),
                "by/axis": {0: {"sum": torch.zeros(())}, "note": "kept", (1, None): True},
                7: torch.zeros(2, dtype=torch.int8),
                "turned": torch.zeros(3, 2).T,
                "recent": deque([0.0], maxlen=3),
                "worst": torch.tensor(-math.inf),
                "text": "begun",
                "kind": torch.float64,
                "pair": (1, torch.ones(1)),
                "none": None,
            }
        for i, axis in enumerate(state["axes"]):
            flat = grad.movedim(i, 0).flatten(1) if grad.dim() > 1 else grad[:, None]
            axis.add_(flat @ flat.T)
        state["wide"].add_(grad.to(state["kind"]) / 3)
        state["by/axis"][0]["sum"].add_(grad.sum())
        state[7].add_(1)
        state["recent"].append(float(grad.norm()))
        state["worst"] = torch.maximum(state["worst"], grad.max())
        state["text"] = "gone on"
        scale = 1 + sum(state["recent"]) + float(state["by/axis"][0]["sum"]) + int(state[7][0])
        scale += sum(float(axis.diagonal().sum()) for axis in state["axes"]) + float(state["worst"])
        p.sub_((group["lr"] * state["wide"] / (1 + abs(scale))).to(p.dtype))


class SetsItsRate(Plain):
    """Lowers its own learning rate in each step."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            group["lr"] *= 0.9


class Momentum:
    """An object that no checkpoint can hold."""


class Opaque(Plain):
    """Keeps an object of a class of its own."""

    def update(self, p: Tensor, grad: Tensor, state: dict[Any, Any], group: dict[str, Any]) -> None:
        super().update(p, grad, state, group)
        state["parts"] = [0, {"inner": Momentum()}]


class OwnForm(Plain):
    """Has a state dict of its own form, and a slow copy of the weights that belongs to no parameter by name."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, lr)
        self.slow = [p.detach().clone() for g in self.param_groups for p in g["params"]]
        self.calls = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        super().step()
        self.calls += 1
        parameters = [p for g in self.param_groups for p in g["params"]]
        for p, slow in zip(parameters, self.slow, strict=True):
            if self.calls % 3 == 0:
                p.copy_(slow.lerp_(p, 0.5))

    def state_dict(self) -> dict[str, Any]:
        return {"fast": super().state_dict(), "slow": self.slow, "calls": self.calls}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict["fast"])
        self.slow, self.calls = state_dict["slow"], state_dict["calls"]


class NeedsClosure(Plain):
    """Needs a closure, though its signature does not say so."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        if closure is None:
            raise ValueError("this optimizer needs a closure that computes the loss again")


class Additional(Plain):
    """Adds a parameter of its own to its groups."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, lr)
        self.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})


class KeysOfItsOwn(Plain):
    """Keeps state under a key that is no parameter, and an entry beside torch's two in its state dict."""

    count = 0

    def update(self, p: Tensor, grad: Tensor, state: dict[Any, Any], group: dict[str, Any]) -> None:
        shared: Any = self.state["shared"]  # type: ignore[index]
        self.state["calls"] = self.count  # type: ignore[index]
        shared.setdefault("sum", torch.zeros(())).add_(grad.norm())
        self.count += 1
        p.sub_(group["lr"] * grad / (float(shared["sum"]) + self.count))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.count = state_dict["count"]
