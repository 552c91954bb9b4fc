"""Per-example gradient norms by hooks, written as the papers describe them, and by other libraries.

Each version trains a model of its own. `squares()` are the squared norms of the examples' contributions
to the gradient after a step's backward pass, (B,) by parameter, in the units of `p.grad`.

Sources of the formulas: Gray et al. 2024 (arXiv:2411.00999) for the layers one after another; Li et al.
2022 (arXiv:2110.05679) for the ghost norms of Opacus; BackPACK (arXiv:1912.10985) for BatchL2Grad.
"""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm

Batch = tuple[Tensor, Tensor]
Squares = dict[str, Tensor]

INSTALL = "pip install --no-deps opacus backpack-for-pytorch opt_einsum einops unfoldNd"


class Version(Protocol):
    """One way to train and to measure."""

    def step(self, batch: Batch) -> float:
        """Train on a batch and return the loss."""
        ...


class ByHand:
    """The loop anybody writes, without any measurement; what measures adds to it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)

    def backward(self, batch: Batch) -> Tensor:
        """Leave the gradients of a batch, and return its loss."""
        inputs, targets = batch
        loss = cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        with self.around():
            loss.backward()
        return loss

    def around(self) -> AbstractContextManager[Any]:
        """Return what the backward pass runs in."""
        return nullcontext()

    def squares(self) -> Squares:
        """Return what the last backward pass measured."""
        return {}

    def read(self) -> object:
        """Reduce it to what an estimate needs, in one transfer."""
        found = self.squares()
        if not found:
            return None
        whole = [self.model.get_parameter(name).grad for name in found]
        norms = [torch.linalg.vector_norm(g) for g in whole if g is not None]
        return torch.stack([*norms, *(one.sum() for one in found.values())]).tolist()

    def step(self, batch: Batch) -> float:
        """Train on a batch and return the loss."""
        loss = self.backward(batch)
        self.read()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


class Hooks(ByHand):
    """A forward hook keeps a layer's input, a full backward hook makes each example's gradient by einsum."""

    def __init__(self, model: nn.Module, wanted: tuple[type[nn.Module], ...]) -> None:
        super().__init__(model)
        self.inputs: dict[str, Tensor] = {}
        self.found: Squares = {}
        self.examples = 0
        model.register_forward_pre_hook(self._count)
        for name, module in model.named_modules():
            if isinstance(module, wanted):
                self._hook(name, module)

    def _count(self, _module: nn.Module, given: tuple[Tensor]) -> None:
        self.examples = given[0].shape[0]

    def _hook(self, name: str, module: nn.Module) -> None:
        def keep(_module: nn.Module, given: tuple[Tensor], _output: Tensor) -> None:
            self.inputs[name] = given[0].detach()

        def measure(own: nn.Module, _given: object, gradients: tuple[Tensor]) -> None:
            self.found |= {
                f"{name}.{parameter}": each.flatten(1).square().sum(1)
                for parameter, each in _each(own, self.inputs.pop(name), gradients[0]).items()
            }

        def spread(_module: nn.Module, given: tuple[Tensor]) -> tuple[Tensor] | None:
            # Ids that all examples share hide whose gradient is whose: published code repeats them.
            ids = given[0]
            return (ids.expand(self.examples, *ids.shape),) if ids.dim() == 1 else None

        if isinstance(module, nn.Embedding):
            module.register_forward_pre_hook(spread)
        module.register_forward_hook(keep)
        module.register_full_backward_hook(measure)

    def squares(self) -> Squares:
        return self.found


def _each(module: nn.Module, x: Tensor, dy: Tensor) -> Squares:
    """Return each example's gradient (B, ...) by the parameter's own name."""
    if isinstance(module, nn.Linear):
        found = {"weight": torch.einsum("btl,btk->blk", dy, x)}
        return found if module.bias is None else {**found, "bias": dy.sum(1)}
    if isinstance(module, nn.LayerNorm):
        unit = layer_norm(x, module.normalized_shape, eps=module.eps)
        return {"weight": torch.einsum("btd,btd->bd", dy, unit), "bias": dy.sum(1)}
    assert isinstance(module, nn.Embedding)
    zeros = dy.new_zeros(x.shape[0], *module.weight.shape)
    return {"weight": zeros.scatter_add_(1, x[:, :, None].expand_as(dy), dy)}


class Opacus(ByHand):
    """Opacus' ghost norms of every Linear layer: the first of the two backward passes it clips with."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        sampling = import_module("opacus.grad_sample")
        linear = _linear_names(model)
        others = [p for n, p in model.named_parameters() if n not in linear]
        # Layers it finds frozen get no hooks; their gradients are wanted all the same.
        for parameter in others:
            parameter.requires_grad_(False)
        self.hooked = sampling.GradSampleModuleFastGradientClipping(model, loss_reduction="mean")
        for parameter in others:
            parameter.requires_grad_(True)
        self.linear = linear

    def squares(self) -> Squares:
        found = {}
        for name in self.linear:
            norms = self.model.get_parameter(name)._norm_sample  # type: ignore[attr-defined]
            # It undoes the mean over the batch.
            found[name] = (norms / len(norms)).square()
        return found


class OpacusTwice(Opacus):
    """Opacus' ghost norms as its own step takes them: a second backward pass, of the reweighted losses."""

    def backward(self, batch: Batch) -> Tensor:
        """Leave the gradients of the second pass, every example with the weight it had."""
        inputs, targets = batch
        logits = self.model(inputs)
        each = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        losses = each.view(len(targets), -1).mean(1)
        losses.mean().backward(retain_graph=True)
        self.optimizer.zero_grad()
        self.hooked.disable_hooks()
        whole = (losses / len(losses)).sum()
        whole.backward()
        self.hooked.enable_hooks()
        return whole


class BackPack(ByHand):
    """BackPACK's BatchL2Grad of every Linear layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.backpack: Any = import_module("backpack")
        self.extension: Callable[[], object] = import_module("backpack.extensions").BatchL2Grad
        for module in model.modules():
            if isinstance(module, nn.Linear):
                self.backpack.extend(module)
        self.linear = _linear_names(model)

    def around(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self.backpack.backpack(self.extension())
        return context

    def squares(self) -> Squares:
        return {name: self.model.get_parameter(name).batch_l2 for name in self.linear}  # type: ignore[attr-defined]


def _linear_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters of all Linear layers."""
    return [
        f"{name}.{own}"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        for own, _ in module.named_parameters(recurse=False)
    ]


def attempt(make: Callable[[nn.Module], ByHand], model: nn.Module) -> ByHand | str:
    """Return a version that needs another library, or why there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make(model)
    except ImportError as error:
        return f"not measured: {error}; {INSTALL}"


def one_by_one(model: nn.Module, batch: Batch) -> Squares:
    """Return the squares by definition: one backward pass for each example, (B,) by parameter."""
    inputs, targets = batch
    named = dict(model.named_parameters())
    found: dict[str, list[Tensor]] = {name: [] for name in named}
    for i in range(len(inputs)):
        logits = model(inputs[i : i + 1])
        loss = cross_entropy(logits.flatten(0, 1), targets[i]) / len(inputs)
        for name, each in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
            found[name].append(each.double().square().sum())
    return {name: torch.stack(squares) for name, squares in found.items()}
