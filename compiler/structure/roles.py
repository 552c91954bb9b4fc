"""Roles of modules and parameters, such as `norm` or `head`: by what a module is and where it stands.

Names only help: they say what a structure leaves open.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from types import CodeType
from typing import Any

from torch import Tensor, nn

from trainc.dsl.text.vocabulary import ROLES

NORM, BIAS, EMBEDDING, ATTENTION, MLP, HEAD, ADAPTER = ROLES

_NAMES = {
    ATTENTION: {"attn", "attention", "self_attn", "self_attention", "cross_attn", "mha"},
    MLP: {"mlp", "ffn", "ff", "feed_forward", "feedforward", "linear1", "linear2", "intermediate", "experts", "moe"},
    EMBEDDING: {"embed", "embeddings", "embedding", "wte", "wpe", "embed_tokens", "pos_embed"},
    HEAD: {"head", "lm_head", "classifier", "score", "fc_out", "output_head", "heads", "proj_out"},
}  # fmt: skip
"""The segments of dotted names that give a role to a module and all that is in it."""

_END_WORDS = {"head", "heads", "classifier", "logits", "unembed"}
_INPUT_WORDS = {"embed", "embeds", "embedding", "embeddings", "emb", "wte", "wpe", "stem"}
_TABLE_WORDS = {
    "embed", "embeds", "embedding", "embeddings", "emb", "token", "tokens", "pos", "position", "positions",
    "positional", "latents", "queries", "codebook", "prompt",
}  # fmt: skip
"""Words in the names of parameters that are looked up or joined to the input, not multiplied."""
_MATRIX_WORDS = {"weight", "weights", "kernel", "proj", "projection", "w", "w1", "w2", "w3"}
"""Words in the names of matrices that a module holds beside its layers."""
_CONDITION_WORDS = {"ada", "adaln", "modulation", "cond", "time"}
"""Words in the names of linear layers that compute the scales of norms."""

_PROJECTIONS = tuple(
    frozenset(names.split())
    for names in (
        "q k v", "q_proj k_proj v_proj", "query key value", "wq wk wv", "to_q to_k to_v", "q_lin k_lin v_lin",
        "linear_q linear_k linear_v", "query_key_value", "qkv", "qkv_proj", "to_qkv", "wqkv", "c_attn",
        "in_proj_weight",
    )
)  # fmt: skip
"""Names of children or parameters of which all together make a module attention."""
_OUTPUTS = {"o", "o_proj", "out_proj", "wo", "to_out", "o_lin"}
"""Names of the projections behind attention."""

_NORMALISES = {
    name
    for names in (
        "rsqrt var std var_mean std_mean norm",
        "normalize layer_norm rms_norm group_norm batch_norm instance_norm",
    )
    for name in names.split()
}
"""Functions of which a module that normalises calls one."""
_LOOKS_UP = {"embedding", "embedding_bag"}
_ATTENDS = {"scaled_dot_product_attention", "multi_head_attention_forward", "flex_attention"}
_MULTIPLIES = {"linear", "matmul", "mm", "addmm"}


def own_class(module: object) -> type:
    """Return the class that the user gave a module: `fully_shard` puts another in its place, which is named FSDP....

    So do children beside the items of a sequence (`sequences.keep_items`).
    """
    found = type(module)
    if len(found.__bases__) == 2 and found.__bases__[0].__name__ == "FSDPModule":
        found = found.__bases__[1]
    own: type = vars(found).get("own_class", found)
    return own


def type_names(module: object) -> tuple[str, ...]:
    """Return the class names of `module`: its own and those it inherits from, without nn.Module."""
    names = [c.__name__ for c in own_class(module).__mro__]
    return tuple(dict.fromkeys(name for name in names if name not in ("Module", "object")))


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a module itself by their last names."""
    return {name: p for name, p in module._parameters.items() if p is not None}


def holds_parameters(module: nn.Module, below: bool = True) -> bool:
    """Say whether a module has parameters, in itself or, with `below`, anywhere in it."""
    return next(iter(module.parameters(recurse=below)), None) is not None


def looks_like_end(segment: str) -> bool:
    """Say whether a segment of a name is that of a head."""
    words = set(segment.lower().split("_"))
    return segment.lower() in _NAMES[HEAD] or bool(
        words & _END_WORDS and not words & {"attention", "conv"}
    )


def looks_like_input(segment: str) -> bool:
    """Say whether a segment of a name is that of what computes a model's input."""
    return bool(set(segment.lower().split("_")) & _INPUT_WORDS)


def find_roles(model: nn.Module, blocks: tuple[str, ...]) -> dict[str, set[str]]:
    """Return the roles of every module and parameter of `model` under each of its names.

    `blocks` are the names of the model's blocks.
    """
    named = dict(model.named_modules(remove_duplicate=False))
    index = {name: i for i, name in enumerate(named)}
    inside = {n for n in named if any(_is_in(n, block) for block in blocks)}
    last = max((index[n] for n in inside), default=len(named))
    roles: dict[str, set[str]] = {}
    for name, module in named.items():
        parent = roles[name.rpartition(".")[0]] if name else set()
        found = _own_roles(name.rpartition(".")[2], module, name in inside, name in blocks)
        found |= parent & ({ATTENTION, MLP} if name in inside else {ATTENTION, MLP, HEAD})
        if EMBEDDING in parent and NORM not in found and not is_matrix_layer(module):
            found.add(EMBEDDING)
        # A linear layer behind the last block.
        if is_linear(module) and index[name] > last and EMBEDDING not in found:
            found.add(HEAD)
        if HEAD in found and name not in inside:
            found.discard(MLP)
        roles[name] = found
    _mark_attention_projections(named, blocks, roles)
    _mark_mlps(named, blocks, roles)
    if not any(HEAD in found for found in roles.values()):
        for name in [n for n, m in named.items() if is_linear(m) and n not in inside][-1:]:
            for part in (n for n in named if _is_in(n, name)):
                roles[part].add(HEAD)
    for name, module in named.items():
        for leaf, parameter in own_parameters(module).items():
            own = parameter_roles(leaf, parameter, module, name not in inside and bool(blocks))
            roles[f"{name}.{leaf}".lstrip(".")] = roles[name] | own
    return roles


def _is_in(name: str, block: str) -> bool:
    return name == block or name.startswith(f"{block}.")


def _own_roles(segment: str, module: nn.Module, in_block: bool, is_block: bool) -> set[str]:
    """Return the roles of a module without those of what it is in."""
    types = [t.lower() for t in type_names(module)]
    names = {role for role, segments in _NAMES.items() if segment.lower() in segments}
    # A head is the model's: attention has heads as well, and MLPs a layer `fc_out`.
    found = names - {HEAD} if in_block else names
    if looks_like_end(segment) and not in_block:
        found.add(HEAD)
    if is_norm(module):
        found.add(NORM)
    if own_parameters(module) and (
        any(re.search(r"embeddings?(bag)?$", t) for t in types) or calls(module) & _LOOKS_UP
    ):
        found.add(EMBEDDING)
    if not is_block and holds_parameters(module):
        if any("attention" in t or "attn" in t for t in types[:1]) and not _holds_mlp(module):
            found.add(ATTENTION)
        named = any(word in t for t in types[:1] for word in ("mlp", "feedforward", "experts"))
        # A model that is called by its parts, such as MlpMixer, has others as well.
        if named and (segment or not any(map(_is_not_linear, module.modules()))):
            found.add(MLP)
        if _projects(module) or calls(module) & _ATTENDS:
            found.add(ATTENTION)
    return found


def _is_not_linear(module: nn.Module) -> bool:
    return bool(own_parameters(module)) and not is_linear(module)


def is_adapted_by_peft(module: nn.Module) -> bool:
    """Say whether a module is a layer of peft that holds the layer it adapts."""
    return "BaseTunerLayer" in type_names(module) and "base_layer" in module._modules


def is_norm(module: nn.Module) -> bool:
    """Say whether a module normalises: by its class, or as it has only numbers per channel and computes a scale."""
    own = own_parameters(module)
    if any(map(holds_parameters, module.children())) or not all(map(is_per_channel, own.values())):
        return False
    named = any("norm" in t.lower() for t in type_names(module))
    used = calls(module) if own else set[str]()
    normalises = bool(used & _NORMALISES) or {"mean", "sqrt"} <= used
    return normalises or (named and not _is_parametrization(module))


def _is_parametrization(module: nn.Module) -> bool:
    return type(module).__module__ == "torch.nn.utils.parametrizations"


def is_per_channel(parameter: Tensor) -> bool:
    """Say whether a parameter has at most one axis that is longer than 1."""
    return sum(size > 1 for size in parameter.shape) <= 1


def calls(module: nn.Module) -> set[str]:
    """Return the names of the functions that the methods of a module's own class call, and of what else they read.

    The names of its children are no functions: `self.embedding(x)` looks up nothing itself.
    """
    used = set[str]()
    bases = type(module).__mro__
    for c in bases[: bases.index(nn.Module)]:
        for method in vars(c).values():
            used |= set(_names_in(getattr(method, "__wrapped__", method)))
    return used - module._modules.keys()


def _names_in(function: Callable[..., Any] | Any) -> Iterator[str]:
    code = getattr(function, "__code__", None)
    if isinstance(code, CodeType) and function.__name__ not in (
        "__init__",
        "reset_parameters",
        "extra_repr",
    ):
        yield from code.co_names


def is_linear(module: nn.Module) -> bool:
    """Say whether a module is a linear layer, also of a class such as transformers' `Conv1D`."""
    own = own_parameters(module)
    named = any(re.search(r"linear|^conv1d$", t, re.I) for t in type_names(module))
    if named and "parametrizations" in module._modules:  # there is its weight
        return True
    if not any(p.dim() == 2 for p in own.values()) or any(map(holds_parameters, module.children())):
        return False
    if named:
        return True
    return own.keys() <= {"weight", "bias", "kernel"} and bool(calls(module) & _MULTIPLIES)


def is_matrix_layer(module: nn.Module) -> bool:
    """Say whether a module is a linear layer or a convolution."""
    return is_linear(module) or any(
        re.search(r"conv(transpose)?\d?d", t, re.I) for t in _kinds(module)
    )


def _kinds(module: nn.Module) -> tuple[str, ...]:
    return type_names(module) if own_parameters(module) else ()


def _projects(module: nn.Module) -> bool:
    """Say whether a module computes queries, keys and values itself."""
    names = {n.lower() for n in (*module._modules, *own_parameters(module))}
    return any(needed <= names for needed in _PROJECTIONS)


def _holds_mlp(module: nn.Module) -> bool:
    return any(n.lower() in _NAMES[MLP] for n, _ in module.named_children())


def _mark_attention_projections(
    named: Mapping[str, nn.Module], blocks: tuple[str, ...], roles: Mapping[str, set[str]]
) -> None:
    """Mark the projections of a block that computes attention itself, without a module of its own for it."""
    words = {n for needed in _PROJECTIONS for n in needed}
    words |= _OUTPUTS
    for block in blocks:
        if _projects(named[block]):
            for key in named[block]._modules:
                if key.lower() in words:
                    roles[f"{block}.{key}"].add(ATTENTION)


def _mark_mlps(
    named: Mapping[str, nn.Module], blocks: tuple[str, ...], roles: Mapping[str, set[str]]
) -> None:
    """Mark the linear layers that stand beside attention in a block, and pairs that widen and narrow in any block."""
    for block in blocks:
        inside = [name for name in named if _is_in(name, block)]
        attends = any(ATTENTION in roles[name] for name in inside)
        linear = {
            n: s for n in inside if (s := _linear_shape(named[n])) and _may_be_mlp(n, roles[n])
        }
        for name, (rows, columns) in linear.items():
            around = name.rpartition(".")[0]
            pairs = (s for n, s in linear.items() if n.rpartition(".")[0] == around)
            if attends or (rows != columns and (columns, rows) in pairs):
                for part in (n for n in inside if _is_in(n, name)):
                    roles[part].add(MLP)


def _linear_shape(module: nn.Module) -> tuple[int, ...] | None:
    """Return the shape of a linear layer's weight; None for another module."""
    if not is_linear(module):
        return None
    return next((tuple(p.shape) for p in module.parameters() if p.dim() == 2), None)


def _may_be_mlp(name: str, roles: set[str]) -> bool:
    words = set(re.split(r"[._]", name.lower()))
    return not (roles & {ATTENTION, EMBEDDING, NORM} or words & _CONDITION_WORDS)


def parameter_roles(leaf: str, parameter: Tensor, module: nn.Module, outside: bool) -> set[str]:
    """Return the roles of a parameter besides those of its module; `outside` says that this is not in a block."""
    words = set(leaf.lower().split("_"))
    found: set[str] = set()
    if words & {"bias", "biases"} and not words & _TABLE_WORDS:
        found.add(BIAS)
    if leaf.lower() in ("weight", "bias") or is_matrix_layer(module):
        return found
    if words & _TABLE_WORDS and parameter.numel() > 1:
        found.add(EMBEDDING)
    if "norm" in words and is_per_channel(parameter):
        found.add(NORM)
    # Rows that are joined or added to every example's, beside the layers of a model.
    is_table = parameter.dim() > 1 and parameter.shape[-1] > 1 and not words & _MATRIX_WORDS
    if outside and is_table and BIAS not in found and any(map(holds_parameters, module.children())):
        found.add(EMBEDDING)
    return found


def is_matrix(leaf: str, parameter: Tensor, module: nn.Module, roles: set[str]) -> bool:
    """Say whether a parameter is a matrix, or several: of a linear layer, a convolution, an embedding or experts.

    `roles` are the parameter's own and its module's.
    """
    if parameter.dim() < 2 or roles & {NORM, BIAS} or getattr(parameter, "_no_weight_decay", False):
        return False
    if is_matrix_layer(module):
        return True
    if EMBEDDING in roles:
        return leaf == "weight" and parameter.dim() == 2
    if is_per_channel(parameter):
        return False
    # Beside layers stand tables as well, such as the rates of a state space.
    layers = any(map(holds_parameters, module.children()))
    return not layers or parameter.dim() > 2 or bool(set(leaf.lower().split("_")) & _MATRIX_WORDS)
