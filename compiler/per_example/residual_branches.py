"""Check that layers are residual branches: what they give is added to a tensor that was not computed from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from trainc.compiler.errors import NoResidualBranch, SiteError
from trainc.compiler.layers.bound_modules import Sites
from trainc.compiler.method.layer_hook import LayerHookSite
from trainc.compiler.method.sites import Rewrite
from trainc.compiler.model.eager import eager_operations, uncompiled
from trainc.compiler.model.undisturbed import undisturbed

_ADDS = {
    "add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "__rsub__", "__isub__", "addcmul",
    "addcmul_",
}  # fmt: skip
"""Functions that add a branch to what it is a branch of."""
_KEEPS = {
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "mul", "mul_",
    "__mul__", "__rmul__", "__imul__", "div", "div_", "__truediv__", "__itruediv__", "reshape", "view", "flatten",
    "unflatten", "transpose", "permute", "movedim", "swapaxes", "squeeze", "unsqueeze", "expand", "roll", "contiguous",
    "clone", "to", "float", "double", "half", "bfloat16", "type", "type_as", "__getitem__",
}  # fmt: skip
"""Functions behind a branch whose result still is the branch: scaled, with entries dropped, or laid out anew."""


@contextmanager
def checking_branches(model: nn.Module, rewrite: Rewrite) -> Iterator[None]:
    """Watch the forward pass inside this block; raises NoResidualBranch where a hook needs a branch and has none.

    Compiled parts run uncompiled there.
    """
    wanted = _branches(rewrite)
    if not wanted:
        yield
        return
    around = {name for module in wanted for name in _enclosing(module)}
    sums = _Sums()
    with ExitStack() as hooks:
        for name in around:
            keep = partial(_keep, sums, name)
            hooks.callback(model.get_submodule(name).register_forward_hook(keep).remove)
        with uncompiled(), sums:
            yield
    for name, site in wanted.items():
        if name not in sums.added:
            raise _no_branch(site, next((n for n in _enclosing(name) if n in sums.added), None))


def check_branches(
    model: nn.Module, sites: Sites, rewrite: Rewrite, run: Callable[[], Any]
) -> None:
    """Check it in a pass that leaves nothing behind; what the model raises there, its own step raises again."""
    if not _branches(rewrite):
        return
    with sites.inactive(), undisturbed(model), eager_operations(), torch.no_grad():
        try:
            with checking_branches(model, rewrite):
                run()
        except SiteError:
            raise
        except Exception:
            return


def _branches(rewrite: Rewrite) -> Mapping[str, LayerHookSite]:
    """Return by module the hooks whose layers must be residual branches."""
    return {site.module: site for site in rewrite.hooks if site.hook.of_branch}


class _Sums(TorchFunctionMode):
    """Follows the results of modules to where they are added to what was not computed from them."""

    def __init__(self) -> None:
        super().__init__()
        self.of: WeakIdKeyDictionary = WeakIdKeyDictionary()
        """The modules whose result a tensor is."""
        self.after: WeakIdKeyDictionary = WeakIdKeyDictionary()
        """The modules from whose result a tensor was computed."""
        self.added = set[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        of, after = ([known.get(t, _NONE) for t in given] for known in (self.of, self.after))
        if name in _ADDS:
            for a, one in enumerate(given):
                for b, other in enumerate(given):
                    if a != b and one.shape == other.shape:
                        self.added |= of[a] - after[b]
        result = func(*args, **(kwargs or {}))
        self.follow(self.after, result, _NONE.union(*after))
        if name in _KEEPS | _ADDS:
            self.follow(self.of, result, _NONE.union(*of))
        return result

    def follow(self, known: WeakIdKeyDictionary, result: Any, modules: frozenset[str]) -> None:
        """Remember that the tensors of a result are of these modules, beside those that they are of already."""
        for tensor in pytree.tree_leaves(result) if modules else ():
            if isinstance(tensor, Tensor):
                known[tensor] = known.get(tensor, _NONE) | modules


_NONE: frozenset[str] = frozenset()


def _keep(sums: _Sums, name: str, module: nn.Module, given: Any, result: Any) -> None:
    for known in (sums.of, sums.after):
        sums.follow(known, result, frozenset((name,)))


def _enclosing(name: str) -> Iterator[str]:
    """Yield a name and those of the modules around it, without the model's own."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _no_branch(site: LayerHookSite, instead: str | None) -> NoResidualBranch:
    better = (
        f": select `{instead}`, whose output is added"
        if instead
        else ": select the module that computes what is added, or exclude it from `on`"
    )
    return NoResidualBranch(
        f"`{site.module}` is no residual branch: nothing adds its output to a tensor of the same shape that was not"
        f" computed from it, and {site.hook.of_branch}{better}",
        site.label,
    )
