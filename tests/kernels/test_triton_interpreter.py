"""The Triton sources on the CPU, by Triton's interpreter, against the eager kernels.

The interpreter costs milliseconds per program, so shapes are small and odd.
"""

from typing import Any

import pytest
import torch

from trainc.kernels.loss import cross_entropy_consistency as consistency
from trainc.kernels.noise import multiplicative_noise, philox, random_entries
from trainc.kernels.norm import layer_norm, rms_norm

pytestmark = pytest.mark.interpreter

KEY = philox.pack_key(seed=2**32 - 5, step=2**31 + 9)
# examples, rows, width and programs: fewer examples than programs is the split regime.
REGIMES = {"split": (2, 33, 40, 8), "one-chunk": (3, 2, 17, 4), "whole": (7, 3, 33, 3)}
REGIMES |= {"rows-1": (5, 1, 127, 2), "width-1": (2, 3, 1, 8), "width-3": (3, 127, 3, 2)}


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> Any:
    return request.param


def close(got: Any, want: Any, dtype: torch.dtype) -> None:
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    for mine, theirs in zip(got, want, strict=True):
        scale = max([1.0, *theirs.abs().flatten().tolist()])
        torch.testing.assert_close(
            mine.float(), theirs.float(), rtol=tolerance, atol=tolerance * scale
        )
        assert mine.dtype == theirs.dtype


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("affine", ["weight+bias", "weight", "bias"])
def test_layer_norm(regime: str, affine: str, dtype: torch.dtype) -> None:
    if affine != "weight+bias" and (dtype == torch.float16 or regime not in ("split", "whole")):
        pytest.skip("covered with both")
    from trainc.kernels.norm import triton_norm_launch as launch

    examples, rows, width, programs = REGIMES[regime]
    torch.manual_seed(0)
    x, dy = (torch.randn(examples, rows, width).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(width).to(dtype) for _ in range(2))
    given = (weight if "weight" in affine else None, bias if "bias" in affine else None)
    probe = torch.zeros(examples, 2)
    want: Any = layer_norm.eager_forward(x, [width], *given, probe, 1e-5)
    got = launch.forward(x, [width], *given, 1e-5, dtype, rms=False)
    close(got, want, dtype)
    mask = [True, given[0] is not None, given[1] is not None]
    want = layer_norm.eager_backward(dy, x, [width], want[1], want[2], *given, mask)
    *gradients, norms = launch.backward(
        dy, x, [width], *got[1:], given, mask, rms=False, programs=programs
    )
    close(gradients, want[:3], dtype)
    torch.testing.assert_close(norms, want[3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("casting", [*rms_norm.CASTINGS, rms_norm.OFFSET])
def test_rms_norm(regime: str, casting: str, dtype: torch.dtype) -> None:
    from trainc.kernels.norm import triton_norm_launch as launch

    examples, rows, width, programs = REGIMES[regime]
    torch.manual_seed(0)
    x, weight = torch.randn(examples, rows, width).to(dtype), torch.randn(width).to(dtype)
    want = rms_norm.eager_forward(x, [width], weight, None, 1e-5, casting)
    y, _, rstd = launch.forward(x, [width], weight, None, 1e-5, dtype, rms=True, casting=casting)
    close((y, rstd), want, dtype)
    dy = torch.randn(x.shape).to(dtype)
    want_back = rms_norm.eager_backward(
        dy, x, [width], want[1], weight, casting, [True, True], True
    )
    dx, dweight, _, norms = launch.backward(
        dy, x, [width], rstd, rstd, (weight, None), [True, True, False], rms=True, casting=casting,
        programs=programs,
    )  # fmt: skip
    close((dx, dweight), want_back[:2], dtype)
    # The interpreter truncates to bfloat16 where a device rounds, which llama's inner cast shows.
    loose = 2e-2 if casting == "llama" and dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(norms, want_back[2], rtol=loose, atol=1e-5)


def test_operators_launch_without_optional_parts() -> None:

    x, dy, weight = torch.randn(3, 4, 8), torch.randn(3, 4, 8), torch.randn(8)
    probe = torch.zeros(3, 2)
    forward = layer_norm.OPERATOR.cuda_forward(x, [8], weight, None, probe, 1e-5)
    close(forward, layer_norm.eager_forward(x, [8], weight, None, probe, 1e-5), x.dtype)
    arguments: Any
    for mask in ([True, False, False], [False, True, False]):
        arguments = (dy, x, [8], *forward[1:], weight, None, mask)
        close(
            layer_norm.OPERATOR.cuda_backward(*arguments),
            layer_norm.eager_backward(*arguments),
            x.dtype,
        )
    plain = rms_norm.OPERATOR.cuda_forward(x, [4, 8], None, None, 1e-5, "none")
    arguments = (dy, x, [4, 8], plain[1], None, "none", [True, False], False)
    close(rms_norm.OPERATOR.cuda_backward(*arguments), rms_norm.eager_backward(*arguments), x.dtype)


def test_philox_words_are_bit_equal_to_tritons() -> None:
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def generate(key, counters, out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        lane = tl.arange(0, BLOCK)
        c0 = tl.load(counters + lane)
        c1 = tl.load(counters + BLOCK + lane)
        c2 = tl.load(counters + 2 * BLOCK + lane)
        c3 = tl.load(counters + 3 * BLOCK + lane)
        w0, w1, w2, w3 = tl.philox(tl.load(key), c0, c1, c2, c3)
        tl.store(out + lane, w0)
        tl.store(out + BLOCK + lane, w1)
        tl.store(out + 2 * BLOCK + lane, w2)
        tl.store(out + 3 * BLOCK + lane, w3)

    counters = torch.randint(-(2**31), 2**31, (4, 256), dtype=torch.int32)
    out = torch.empty_like(counters)
    generate[(1,)](KEY, counters, out, BLOCK=256)
    want = torch.stack(philox.philox(KEY, *(counters.long() & philox.MASK)))
    assert torch.equal(out.long() & philox.MASK, want)


@pytest.mark.parametrize("share", multiplicative_noise.SHARES)
@pytest.mark.parametrize("shape", [(4, 3, 40), (6, 1, 3), (2, 5, 127), (4, 1)], ids=str)
def test_noise(share: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from trainc.kernels.noise import triton_noise

    x, h0 = (torch.randn(shape).to(dtype) for _ in range(2))
    for first in (None, torch.tensor(5)):
        arguments = (x, torch.tensor(0.7), KEY, 2**32 - 2, 2, share, first)
        got = triton_noise.multiplicative_noise(*arguments)
        close([got], [multiplicative_noise.eager_multiply(*arguments)], dtype)
        got = triton_noise.noisy_add(h0, *arguments)
        close([got], [multiplicative_noise.eager_add(h0, *arguments)], dtype)


@pytest.mark.parametrize("share", multiplicative_noise.SHARES)
@pytest.mark.parametrize(("groups", "tokens", "program"), [(1, 1, 1), (2, 4, 8), (16, 2, 64)])
def test_noise_is_the_same_for_any_tiling(
    share: str, groups: int, tokens: int, program: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On ones the result is the factor itself: the same bits, however programs divide it, as on the CPU."""
    from trainc.kernels.noise import triton_noise

    arguments = (torch.tensor(0.7), KEY, 7, 2, share, torch.tensor(3))
    ones = torch.ones(4, 11, 38)
    whole = triton_noise.multiplicative_noise(ones, *arguments)
    for name, size in (("GROUPS", groups), ("TOKENS", tokens), ("TOKENS_ALONE", tokens)):
        monkeypatch.setattr(triton_noise, f"BLOCK_{name}", size)
    monkeypatch.setattr(triton_noise, "PROGRAM_TOKENS", program)
    tiled = triton_noise.multiplicative_noise(ones, *arguments)
    assert torch.equal(tiled, whole)
    close([tiled], [multiplicative_noise.eager_multiply(ones, *arguments)], torch.float32)


@pytest.mark.parametrize("share", multiplicative_noise.SHARES)
def test_every_pass_multiplies_by_the_same_bits(share: str) -> None:
    """Forward by both operators, backward on another gradient, recomputed, and by micro-batches."""
    from trainc.kernels.noise import triton_noise

    arguments = (torch.tensor(0.7), KEY, 7, 2, share)
    ones = torch.ones(2, 5, 3, 12)
    z = triton_noise.multiplicative_noise(ones.flatten(0, 1), *arguments, None)
    assert torch.equal(triton_noise.noisy_add(0 * z, ones.flatten(0, 1), *arguments, None), z)
    assert torch.equal(
        triton_noise.multiplicative_noise(4 * ones.flatten(0, 1), *arguments, None), 4 * z
    )
    for start, end in ((0, 2), (2, 3), (3, 5)):
        part = ones[:, start:end].flatten(0, 1)
        got = triton_noise.multiplicative_noise(part, *arguments, torch.tensor(start))
        assert torch.equal(got.view(2, -1, 3, 12), z.view(2, 5, 3, 12)[:, start:end])


def test_the_fast_pair_is_box_muller_on_all_of_its_words() -> None:
    """In exact functions; a radius near 0 and the largest one are among the words."""
    import triton
    import triton.language as tl

    from trainc.kernels.noise import triton_noise

    @triton.jit  # type: ignore[untyped-decorator]
    def draw(words, out, PAIR: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        lane = tl.arange(0, BLOCK)
        cosine, sine = PAIR(tl.load(words + lane), tl.load(words + BLOCK + lane))
        tl.store(out + lane, cosine)
        tl.store(out + BLOCK + lane, sine)

    edges = torch.tensor([0, 255, 256, 2**31 - 1, 2**31, 2**32 - 512, 2**32 - 256, 2**32 - 1])
    edges = torch.cat(
        [edges, torch.randint(2**32, (56,), generator=torch.Generator().manual_seed(0))]
    )
    words = torch.cartesian_prod(edges, edges).T.contiguous()
    out = torch.empty(words.shape)
    draw[(1,)](
        words.to(torch.uint32), out, PAIR=triton_noise._fast_normal_pair, BLOCK=words.shape[1]
    )
    first, second = (words >> 8).double() / 2**24
    radius, angle = (-2 * (first + 2.0**-24).log()).sqrt(), 2 * torch.pi * second
    want = torch.stack([radius * angle.cos(), radius * angle.sin()])
    # An angle of nearly 2 pi in float32 is off by 4e-7, and radii go up to 5.8.
    torch.testing.assert_close(out.double(), want, rtol=0, atol=3e-6)
    assert float(want.abs().max()) > 5.7


def test_fast_noise_has_the_moments_and_the_distribution_of_a_normal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Within four standard errors, and by Kolmogorov's distance at one in a thousand; one large program."""
    from trainc.kernels.noise import triton_noise

    for name, size in (("BLOCK_GROUPS", 1024), ("BLOCK_TOKENS", 64), ("PROGRAM_TOKENS", 64)):
        monkeypatch.setattr(triton_noise, name, size)
    arguments = (torch.ones(1, 64, 4096), torch.tensor(1.0), KEY, 3, 1)
    drawn = triton_noise.multiplicative_noise(*arguments, "none_fast", None)
    exact = multiplicative_noise.eager_multiply(*arguments, "none", None)
    torch.testing.assert_close(drawn, exact, rtol=0, atol=5e-6)
    eps = (drawn.double() - 1).flatten().sort().values
    count = len(eps)
    assert abs(float(eps.mean())) < 4 / count**0.5
    assert abs(float(eps.var()) - 1) < 4 * (2 / count) ** 0.5
    assert abs(float(eps.pow(4).mean()) - 3) < 4 * (96 / count) ** 0.5
    below = torch.arange(count + 1) / count
    cdf = torch.special.ndtr(eps)
    distance = torch.maximum(below[1:] - cdf, cdf - below[:-1]).max()
    assert float(distance) < 1.95 / count**0.5


@pytest.mark.parametrize("distribution", random_entries.DISTRIBUTIONS)
@pytest.mark.parametrize("shape", [(5, 40), (3, 2, 127), (9,), (1, 1)], ids=str)
def test_random_entries(distribution: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from trainc.kernels.noise import triton_random_entries

    arguments = torch.zeros(shape, dtype=dtype), KEY, 2**32 - 2, distribution
    got, want = triton_random_entries.random_entries(*arguments), random_entries.eager(*arguments)
    close([got], [want], torch.float32)
    assert distribution == "normal" or torch.equal(got, want)


def test_zero_sigma_is_the_identity_bit_for_bit(dtype: torch.dtype) -> None:
    from trainc.kernels.noise import triton_noise

    x = torch.randn(4, 3, 9).to(dtype)
    got = triton_noise.multiplicative_noise(x, torch.tensor(0.0), KEY, 1, 2, "none", None)
    assert torch.equal(got, x)


@pytest.mark.parametrize("distance", consistency.DISTANCES)
@pytest.mark.parametrize("classes", [1, 3, 127])
def test_loss(distance: str, classes: int, dtype: torch.dtype) -> None:
    from trainc.kernels.loss import triton_cross_entropy_consistency as triton_loss

    torch.manual_seed(0)
    logits = torch.randn(6, classes).to(dtype)
    targets = torch.randint(0, classes, (3,))
    targets[1] = -100
    options: Any = (distance, -100, 0.1)
    arguments = (logits, targets, torch.tensor(0.4), *options)
    *got, kept = triton_loss.forward(*arguments)
    *want, nothing = consistency.eager_forward(*arguments)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    scales = (torch.tensor(0.9), torch.tensor(0.3))
    gradient = triton_loss.backward(logits, targets, kept, *scales, *options)
    other = consistency.eager_backward(logits, targets, nothing, *scales, *options)
    close([gradient], [other], dtype)


@pytest.mark.parametrize(
    ("count", "classes", "width", "even"),
    [(2, 128, 8, True), (2, 124, 8, False), (2, 126, 4, False), (2, 127, 2, False), (3, 9, 1, True)],
)  # fmt: skip
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_in_several_blocks(
    count: int,
    classes: int,
    width: int,
    even: bool,
    smoothing: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from trainc.kernels.loss import triton_cross_entropy_consistency as triton_loss
    from trainc.kernels.loss import triton_rows

    assert triton_rows.lay(count, classes) == {"W": width, "EVEN": even}
    read = triton_rows.lay_to_read(count, classes)
    assert read == {"W": 8, "EVEN": classes % 8 == 0, "OTHER": width}
    tiny = triton_rows.lay_to_read(1, 7)  # eight numbers may not be there
    assert tiny == {"W": 1, "EVEN": True, "OTHER": 1}
    monkeypatch.setattr(triton_loss, "BLOCKS", {1: 32, 4: 32})
    monkeypatch.setattr(triton_loss, "BACKWARD_BLOCK", 32)
    for distance in consistency.DISTANCES:
        logits, targets = torch.randn(2 * count, classes), torch.tensor([3, classes - 1, 0])[:count]
        logits[0, 5] = 6.0  # nothing larger comes after
        options: Any = (distance, -100, smoothing)
        arguments = (logits, targets, torch.tensor(0.4), *options)
        *got, kept = triton_loss.forward(*arguments)
        *want, nothing = consistency.eager_forward(*arguments)
        torch.testing.assert_close(got, want)
        scales = (torch.tensor(1.0), torch.tensor(0.3))
        torch.testing.assert_close(
            triton_loss.backward(logits, targets, kept, *scales, *options),
            consistency.eager_backward(logits, targets, nothing, *scales, *options),
            rtol=1e-5,
            atol=1e-6,
        )


@pytest.mark.parametrize(("count", "classes"), [(2, 64), (2, 60), (2, 62), (2, 63)])
def test_pairs_of_logits_read_as_words_are_those_read_apart(
    count: int, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainc.kernels.loss import triton_cross_entropy_consistency as triton_loss

    monkeypatch.setattr(triton_loss, "BLOCKS", {1: 32, 4: 32})
    torch.manual_seed(0)
    logits = torch.randn(2 * count, classes).bfloat16()
    targets = torch.tensor([5, classes - 1])
    got, want = (
        triton_loss.forward(given, targets, torch.tensor(0.4), "kl", -100, 0.1)
        for given in (logits, logits.float())
    )
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
