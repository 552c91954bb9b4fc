"""One description per operator; the tests in test_operators.py run over all of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.kernels.case import Case, probe, randn
from tests.kernels.layer_cases import LAYERS
from trainc.kernels.batch_norm import ghost_batch_norm
from trainc.kernels.loss import cross_entropy_consistency as consistency
from trainc.kernels.loss import linear_cross_entropy, linear_cross_entropy_consistency
from trainc.kernels.noise import multiplicative_noise, philox
from trainc.kernels.norm import add_layer_norm, rms_norm

KEY = philox.pack_key(seed=7, step=3)


def norm_arguments(
    columns: int, middle: tuple[int, ...], tail: tuple[int, ...], tail_arguments: tuple[Any, ...]
) -> Callable[[torch.dtype, int], tuple[Any, ...]]:
    def build(dtype: torch.dtype, examples: int) -> tuple[Any, ...]:
        affine = [randn(*tail, dtype=dtype) for _ in range(columns)]
        x = randn(examples, *middle, *tail, dtype=dtype)
        return x, list(tail), *affine, probe(examples, columns, dtype), *tail_arguments

    return build


def layer_norm_reference(x: Tensor, shape: list[int], *rest: Any) -> tuple[Tensor, ...]:
    weight, bias, _, eps = rest
    return (torch.nn.functional.layer_norm(x, shape, weight, bias, eps),)


def rms_norm_reference(x: Tensor, shape: list[int], *rest: Any) -> tuple[Tensor, ...]:
    weight, _, eps, casting = rest
    factor = 1 + weight if casting == rms_norm.OFFSET else weight
    return (torch.nn.functional.rms_norm(x, shape, factor, eps),)


def add_norm_arguments(
    columns: int, middle: tuple[int, ...], tail: tuple[int, ...], tail_arguments: tuple[Any, ...]
) -> Callable[[torch.dtype, int], tuple[Any, ...]]:
    plain = norm_arguments(columns, middle, tail, tail_arguments)

    def build(dtype: torch.dtype, examples: int) -> tuple[Any, ...]:
        x, *rest = plain(dtype, examples)
        return x, randn(*x.shape, dtype=dtype), *rest

    return build


def add_layer_norm_reference(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return add_layer_norm.reference(
        x, residual, lambda total: layer_norm_reference(total, *rest)[0]
    )


def add_rms_norm_reference(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return add_layer_norm.reference(x, residual, lambda total: rms_norm_reference(total, *rest)[0])


def noise_arguments(
    share: str, middle: tuple[int, ...], inputs: int
) -> Callable[[torch.dtype, int], tuple[Any, ...]]:
    def build(dtype: torch.dtype, examples: int) -> tuple[Any, ...]:
        values = [randn(2 * examples, *middle, 6, dtype=dtype) for _ in range(inputs)]
        return *values, torch.tensor(0.7), KEY, 5, 2, share, torch.tensor(2)

    return build


def noise_reference(x: Tensor, sigma: Tensor, _: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    site, views, share, first = rest
    y = multiplicative_noise.reference(x, sigma.item(), 7, 3, site, views, share, int(first))
    return (y,)


def noisy_add_reference(h0: Tensor, delta: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return (h0 + noise_reference(delta, *rest)[0],)


def loss_arguments(
    distance: str, smoothing: float, middle: tuple[int, ...]
) -> Callable[[torch.dtype, int], tuple[Any, ...]]:
    def build(dtype: torch.dtype, examples: int) -> tuple[Any, ...]:
        logits = randn(2 * examples, *middle, 5, dtype=dtype)
        targets = torch.randint(0, 4, (examples, *middle))
        targets.view(-1)[1:2] = 4  # the ignored class
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return logits, targets, torch.tensor(0.6, dtype=wide), distance, 4, smoothing

    return build


def head_arguments(
    distance: str, smoothing: float, middle: tuple[int, ...], with_bias: bool
) -> Callable[[torch.dtype, int], tuple[Any, ...]]:
    plain = loss_arguments(distance, smoothing, middle)

    def build(dtype: torch.dtype, examples: int) -> tuple[Any, ...]:
        logits, *rest = plain(dtype, examples)
        hidden = randn(*logits.shape[:-1], 7, dtype=dtype)
        bias = randn(5, dtype=dtype) if with_bias else None
        return hidden, randn(5, 7, dtype=dtype), bias, *rest

    return build


def chunked_arguments(
    smoothing: float, middle: tuple[int, ...], with_bias: bool
) -> Callable[[torch.dtype, int], tuple[Any, ...]]:
    plain = head_arguments("mse", smoothing, middle, with_bias)

    def build(dtype: torch.dtype, examples: int) -> tuple[Any, ...]:
        hidden, head, bias, targets, _, _, *options = plain(dtype, examples)
        one = hidden.detach()[:examples].requires_grad_()
        return one, head, bias, targets, *options, 2, [True, True, with_bias]

    return build


def chunked_reference(*arguments: Any) -> tuple[Tensor, ...]:
    return (linear_cross_entropy.reference(*arguments[:-2]),)


def linear_arguments(
    algorithm: str, middle: tuple[int, ...], with_bias: bool
) -> Callable[[torch.dtype, int], tuple[Any, ...]]:
    def build(dtype: torch.dtype, examples: int) -> tuple[Any, ...]:
        bias = randn(7, dtype=dtype) if with_bias else None
        affine = (randn(7, 5, dtype=dtype), bias)
        x = randn(examples, *middle, 5, dtype=dtype)
        return x, *affine, probe(examples, 1 + with_bias, dtype), algorithm

    return build


def linear_reference(x: Tensor, weight: Tensor, bias: Any, *_: Any) -> tuple[Tensor, ...]:
    return (torch.nn.functional.linear(x, weight, bias),)


def embedding_arguments(dtype: torch.dtype, examples: int) -> tuple[Any, ...]:
    ids = torch.randint(0, 3, (examples, 6), dtype=torch.int32)
    return randn(4, 5, dtype=dtype), ids, 3, probe(examples, 1, dtype)  # 3 pads


def embedding_reference(weight: Tensor, ids: Tensor, padding: int, *_: Any) -> tuple[Tensor, ...]:
    return (torch.nn.functional.embedding(ids, weight, padding),)


def ghost_arguments(dtype: torch.dtype, examples: int) -> tuple[Any, ...]:
    x = randn(examples, 4, 5, dtype=dtype)
    return x, *(randn(4, dtype=dtype) for _ in range(2)), 2, 1e-5, "merge_last"


def ghost_reference(x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    size, eps, _ = rest
    count = max(1, x.shape[0] // size)
    sizes = [size] * (count - 1) + [x.shape[0] - size * (count - 1)]
    zeros = torch.zeros(4, dtype=x.dtype)
    return ghost_batch_norm.reference(x, zeros, zeros, weight, bias, sizes, 0.1, eps)[:1]


def masked_update_arguments(dtype: torch.dtype, examples: int) -> tuple[Any, ...]:
    tensors = [randn(examples, 5, dtype=dtype, grad=False) for _ in range(2)]
    return tensors, torch.randint(0, 256, ((5 * examples + 7) // 8,), dtype=torch.uint8)


def multi_norm_arguments(dtype: torch.dtype, examples: int) -> tuple[Any, ...]:
    shapes = [(examples, 5), (70000,), ()]
    return tuple([randn(*shape, dtype=dtype, grad=False) for shape in shapes] for _ in range(2))


def sparse_adamw_arguments(dtype: torch.dtype, examples: int) -> tuple[Any, ...]:
    weight, grad = (randn(9, 7, dtype=dtype, grad=False) for _ in range(2))
    state = [randn(examples, dtype=dtype, grad=False).square() for _ in range(2)]
    index = torch.randperm(63)[:examples].int()
    scalars = [torch.tensor(value) for value in (1e-2, 0.1, 4)]
    lists = [[one] for one in (weight, grad, *state, index)]
    return *lists, *scalars, 0.9, 0.999, 1e-8, False, 1, []


NORMS = {"2d": ((), (7,)), "3d": ((4,), (7,)), "4d": ((2, 3), (5,)), "tail": ((3,), (2, 5))}
CASES = [
    *(
        Case(
            f"layer_norm-{name}",
            "layer_norm",
            norm_arguments(2, middle, tail, (1e-5,)),
            layer_norm_reference,
            4,
            "layer_norm_backward",
        )
        for name, (middle, tail) in NORMS.items()
    ),
    *(
        Case(
            f"rms_norm-{name}-{casting}",
            "rms_norm",
            norm_arguments(1, middle, tail, (1e-6, casting)),
            rms_norm_reference,
            3,
            "rms_norm_backward",
        )
        for name, (middle, tail) in NORMS.items()
        for casting in (*rms_norm.CASTINGS, rms_norm.OFFSET)
    ),
    Case(
        "add_layer_norm",
        "add_layer_norm",
        add_norm_arguments(2, (4,), (7,), (1e-5,)),
        add_layer_norm_reference,
        5,
        "add_layer_norm_backward",
    ),
    *(
        Case(
            f"add_rms_norm-{casting}",
            "add_rms_norm",
            add_norm_arguments(1, (2, 3), (5,), (1e-6, casting)),
            add_rms_norm_reference,
            4,
            "add_rms_norm_backward",
        )
        for casting in (*rms_norm.CASTINGS, rms_norm.OFFSET)
    ),
    *(
        Case(
            f"multiplicative_noise-{share}",
            "multiplicative_noise",
            noise_arguments(share, (2, 2), 1),
            noise_reference,
            None,
            "multiplicative_noise",
        )
        for share in multiplicative_noise.SHARES
    ),
    *(
        Case(
            f"noisy_add-{share}",
            "noisy_add",
            noise_arguments(share, (3,), 2),
            noisy_add_reference,
            None,
            "multiplicative_noise",
        )
        for share in multiplicative_noise.SHARES
    ),
    *(
        Case(
            f"cross_entropy_consistency-{distance}-{smoothing}",
            "cross_entropy_consistency",
            loss_arguments(distance, smoothing, middle),
            consistency.reference,
            None,
            "cross_entropy_consistency_backward",
        )
        for distance in consistency.DISTANCES
        for smoothing, middle in ((0.0, (3,)), (0.1, ()))
    ),
    *(
        Case(
            f"linear_cross_entropy_consistency-{distance}-{smoothing}",
            "linear_cross_entropy_consistency",
            head_arguments(distance, smoothing, middle, with_bias),
            linear_cross_entropy_consistency.reference,
            None,
            "linear_cross_entropy_consistency_backward",
        )
        for distance, smoothing, middle, with_bias in (
            ("mse", 0.1, (3,), True),
            ("kl", 0.0, (), False),
        )
    ),
    *(
        Case(
            f"linear_cross_entropy-{smoothing}",
            "linear_cross_entropy",
            chunked_arguments(smoothing, middle, with_bias),
            chunked_reference,
            None,
            "linear_cross_entropy_backward",
        )
        for smoothing, middle, with_bias in ((0.1, (3,), True), (0.0, (), False))
    ),
    *(
        Case(
            f"linear-{algorithm}-{len(middle) + 2}d",
            "linear",
            linear_arguments(algorithm, middle, with_bias),
            linear_reference,
            3,
            "linear_backward",
        )
        for algorithm, middle, with_bias in (
            ("auto", (), True),
            ("simultaneous", (4,), True),
            ("gram", (2, 3), False),
        )
    ),
    Case(
        "embedding", "embedding", embedding_arguments, embedding_reference, 3, "embedding_backward"
    ),
    *LAYERS,
    Case(
        "ghost_batch_norm",
        "ghost_batch_norm",
        ghost_arguments,
        ghost_reference,
        None,
        "ghost_batch_norm_backward",
    ),
    Case("masked_update_", "masked_update_", masked_update_arguments, None),
    Case("multi_norm", "multi_norm", multi_norm_arguments, None),
    Case("sparse_adamw_", "sparse_adamw_", sparse_adamw_arguments, None),
]


SMOOTH = [case for case in CASES if case.reference]
UPDATES = [case for case in CASES if not case.reference]
