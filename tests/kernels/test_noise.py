"""Philox and the noise operators: known answers, layout, moments, independence of tiling."""

from typing import Any

import pytest
import torch
from torch import Tensor

from trainc.kernels.noise import factors, normals, philox, philox_numpy
from trainc.kernels.noise import multiplicative_noise as noise
from trainc.kernels.noise.random_entries import matrix_shape, random_entries

KEY = philox.pack_key(seed=123456789, step=42)
SIGMA = torch.tensor(0.8)


# Known answers of the generator's authors (Random123, kat_vectors).
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter: Any, key: Any, words: Any) -> None:
    got = philox.philox(key, *(torch.tensor([c]) for c in counter))
    assert tuple(int(word) for word in got) == words


def test_layout_is_the_documented_one() -> None:
    got = normals.normal((5, 9), site=3, views=2, examples=4, channels=10, tokens=3)
    for view, example, token, channel in ((1, 2, 2, 9), (0, 3, 0, 4), (1, 0, 1, 3)):
        counter = (channel // 4, example, view + 256 * token, 3)
        words = philox.philox((5, 9), *(torch.tensor([c]) for c in counter))
        pair = channel % 4 // 2 * 2
        want = philox.normal_pair(words[pair], words[pair + 1])[channel % 2]
        assert torch.equal(got[view, example, token, channel], want[0])
    shared = normals.normal((5, 9), site=3, views=2, examples=4, channels=10)
    assert torch.equal(shared, got[:, :, 0])


@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 0, 4), (2, 33, 770)], ids=str)
@pytest.mark.parametrize("tokens", [None, 3])
def test_drawing_without_numpy_gives_the_same_bits(
    shape: tuple[int, int, int], tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert philox_numpy.available()
    draws = []
    for block in (64, 1 << 15):
        monkeypatch.setattr(philox_numpy, "BLOCK", block)
        draws.append(normals.normal(KEY, 2**32 - 1, *shape, tokens, torch.tensor(2**31 + 3)))
    monkeypatch.setattr(philox_numpy, "available", lambda: False)
    for chunk in (64, 1 << 16):
        monkeypatch.setattr(normals, "CHUNK", chunk)
        draws.append(normals.normal(KEY, 2**32 - 1, *shape, tokens, torch.tensor(2**31 + 3)))
    assert all(torch.equal(draws[0], other) for other in draws[1:])


@pytest.mark.parametrize("shape", [(7, 11), (3, 2, 5), (6,), (0, 4), (1, 1)], ids=str)
def test_entries_of_a_parameter_are_words_of_their_counters(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    like = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    got = random_entries(like, KEY, 5, "uniform")
    assert (got.shape, got.dtype, got.requires_grad) == (like.shape, torch.float64, False)
    rows, columns = matrix_shape(like)
    for r, row in enumerate(got.reshape(rows, columns).tolist()):
        for c, value in enumerate(row):
            words = philox.philox(KEY, *(torch.tensor([n]) for n in (c // 4, r, 0, 5)))
            assert value == (int(words[c % 4]) >> 8) / 2**24
    normal = random_entries(like.float(), KEY, 5, "normal")
    assert torch.equal(normal, normals.normal(KEY, 5, 1, rows, columns).reshape(shape))
    monkeypatch.setattr(philox_numpy, "available", lambda: False)
    assert torch.equal(random_entries(like, KEY, 5, "uniform"), got)


def test_random_entries_are_refused_outside_of_their_contract() -> None:
    for arguments, message in (
        ((torch.zeros(3, dtype=torch.int64), KEY, 0, "normal"), "of a floating tensor"),
        ((torch.zeros(3), KEY, 0, "cauchy"), "must be one of"),
        ((torch.zeros(3), KEY, -1, "normal"), "site must be"),
        ((torch.zeros(3), KEY.float(), 0, "normal"), "key must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            random_entries(*arguments)


def test_backward_takes_what_forward_drew(monkeypatch: pytest.MonkeyPatch) -> None:
    draws: list[Any] = []

    def counted(*arguments: Any, **options: Any) -> Tensor:
        draws.append(arguments)
        return normals.normal(*arguments, **options)

    monkeypatch.setattr(factors, "normal", counted)
    gradients: list[Tensor] = []
    for limit in (1 << 20, 0):
        monkeypatch.setattr(factors, "_kept", factors.FactorCache(limit))
        x = torch.randn(4, 3, 5, requires_grad=True)
        y = noise.multiplicative_noise(x, SIGMA, KEY, 3, 2)
        gradients += torch.autograd.grad(y, x, torch.ones_like(y))
        assert factors._kept.held == 0
    assert len(draws) == 1 + 2
    assert torch.equal(*gradients)
    # A graph that multiplies in place draws the factor alone, and one for all tokens in backward.
    monkeypatch.setattr(factors, "_kept", factors.FactorCache(1 << 20))
    z = noise.multiplicative_noise(torch.ones(4, 1, 5), SIGMA, KEY, 3, 2)
    assert torch.equal(noise.multiplicative_noise(torch.ones(4, 3, 5), SIGMA, KEY, 3, 2)[:, :1], z)
    assert len(draws) == 1 + 2 + 1


def test_factors_are_kept_within_a_limit_and_given_out_once() -> None:
    kept, z = factors.FactorCache(limit=100), torch.ones(10)
    for site in range(3):
        kept.keep((site,), z)
        kept.keep((site,), z)
    assert kept.held == 80
    assert kept.take((0,)) is None
    assert kept.take((2,)) is z
    assert kept.take((2,)) is None
    kept.keep((3,), torch.ones(26))
    assert kept.take((3,)) is None
    assert kept.held == 40


def test_keys_pack_both_halves_and_wrap_to_int64() -> None:
    for seed, step in ((0, 0), (2**32 - 1, 2**32 - 1), (7, 2**31)):
        key = philox.pack_key(seed, step)
        assert (int(key) & philox.MASK, (int(key) >> 32) & philox.MASK) == (seed, step)
        pair = (normals.normal(k, 1, 1, 2, 5) for k in (key, (seed, step)))
        assert torch.equal(*pair)
    with pytest.raises(ValueError, match="seed and step"):
        philox.pack_key(2**32, 0)


def test_counters_that_do_not_fit_are_refused() -> None:
    for site, views in ((2**32, 1), (0, 257), (-1, 1)):
        with pytest.raises(ValueError, match="do not fit"):
            normals.normal((0, 0), site, views, 1, 4)


def test_moments_and_independence() -> None:
    # Within four standard errors of the mean, variance and fourth moment.
    draws = normals.normal((1, 2), site=0, views=2, examples=500, channels=500)
    count = draws.numel()
    assert abs(float(draws.mean())) < 4 / count**0.5
    assert abs(float(draws.var()) - 1) < 4 * (2 / count) ** 0.5
    assert abs(float(draws.pow(4).mean()) - 3) < 4 * (96 / count) ** 0.5
    flat = draws.view(2, -1)
    for left, right in (
        (flat[0], flat[1]),
        (draws[:, 1:], draws[:, :-1]),
        (draws[..., 1:], draws[..., :-1]),
        (draws, normals.normal((1, 2), 1, 2, 500, 500)),
        (draws, normals.normal((1, 3), 0, 2, 500, 500)),
        (draws, normals.normal((2, 2), 0, 2, 500, 500)),
    ):
        assert abs(float((left * right).mean())) < 4 / left.numel() ** 0.5


def test_the_consistency_of_two_noisy_views_has_its_expected_size() -> None:
    # E |f1 - f2|^2 = 2 sigma^2 |delta|^2 for one noisy layer, over 4000 examples.
    delta = torch.randn(1, 20).expand(4000, 20)
    views = noise.multiplicative_noise(torch.cat([delta, delta]), SIGMA, KEY, 0, 2)
    distance = (views[:4000] - views[4000:]).square().sum(1).mean()
    expected = 2 * SIGMA**2 * delta[0].square().sum()
    torch.testing.assert_close(distance, expected, rtol=0.05, atol=0)


@pytest.fixture(params=noise.SHARES)
def share(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_zero_sigma_is_the_identity_bit_for_bit(dtype: torch.dtype, share: str) -> None:
    x = torch.randn(4, 3, 5).to(dtype)
    x[0, 0, 0] = -0.0
    other = torch.randn(4, 3, 5).to(dtype)
    zero = torch.tensor(0.0)
    y = noise.multiplicative_noise(x, zero, KEY, 1, 2, share)
    assert torch.equal(y.view(torch.uint8), x.view(torch.uint8))
    assert torch.equal(noise.noisy_add(other, x, zero, KEY, 1, 2, share), other + x)


@pytest.mark.parametrize("channels", [1, 3, 127])
def test_odd_sizes_agree_with_the_definition(share: str, channels: int) -> None:
    for examples, tokens in ((1, 1), (3, 3), (1, 127)):
        x = torch.randn(2 * examples, tokens, channels, dtype=torch.float64)
        got = noise.multiplicative_noise(x, SIGMA.double(), KEY, 9, 2, share)
        want = noise.reference(x, float(SIGMA), 123456789, 42, 9, 2, share)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_tokens_share_noise_or_not(share: str) -> None:
    z = noise.multiplicative_noise(torch.ones(2, 4, 3, 6), SIGMA, KEY, 0, 1, share)
    shared = torch.equal(z, z[:, :1, :1].expand_as(z))
    assert shared == (share == "token")
    assert not torch.equal(z[0], z[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_on_a_cpu_fast_noise_is_that_of_each_token_bit_for_bit(dtype: torch.dtype) -> None:
    found = []
    for share in ("none", "none_fast"):
        torch.manual_seed(0)
        h0, x = (torch.randn(4, 3, 5).to(dtype).requires_grad_() for _ in range(2))
        one = noise.multiplicative_noise(x, SIGMA, KEY, 3, 2, share, torch.tensor(7))
        two = noise.noisy_add(h0, x, SIGMA, KEY, 4, 2, share)
        found.append([one, two, *torch.autograd.grad((one * two).sum(), (h0, x))])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    shared = noise.multiplicative_noise(x, SIGMA, KEY, 3, 2, "token", torch.tensor(7))
    assert not torch.equal(found[0][0], shared)


def test_micro_batches_draw_the_noise_of_the_whole_batch(share: str) -> None:
    views = torch.randn(2, 12, 3, 8)
    whole = noise.multiplicative_noise(views.flatten(0, 1), SIGMA, KEY, 3, 2, share)
    for size in (1, 3, 5, 12):
        parts = [
            noise.multiplicative_noise(
                views[:, start : start + size].flatten(0, 1),
                SIGMA, KEY, 3, 2, share, torch.tensor(start),
            ).unflatten(0, (2, -1))
            for start in range(0, 12, size)
        ]  # fmt: skip
        assert torch.equal(torch.cat(parts, 1).flatten(0, 1), whole)


def test_noise_does_not_depend_on_other_extents(share: str) -> None:
    x = torch.randn(2, 5, 7, 9)
    whole = noise.multiplicative_noise(x, SIGMA, KEY, 3, 1, share)
    part = noise.multiplicative_noise(x[:, :, :, :6], SIGMA, KEY, 3, 1, share)
    assert torch.equal(part, whole[..., :6])
    assert not torch.equal(whole, noise.multiplicative_noise(x, SIGMA, KEY, 4, 1, share))
    other = philox.pack_key(123456789, 43)
    assert not torch.equal(whole, noise.multiplicative_noise(x, SIGMA, other, 3, 1, share))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_multiplies_in_float32_and_rounds_once(
    dtype: torch.dtype, share: str
) -> None:
    x, h0 = (torch.randn(4, 6, 127).to(dtype).requires_grad_() for _ in range(2))
    wide = noise.multiplicative_noise(x.detach().float(), SIGMA, KEY, 2, 2, share)
    y = noise.multiplicative_noise(x, SIGMA, KEY, 2, 2, share)
    assert torch.equal(y, wide.to(dtype))
    total = noise.noisy_add(h0, x, SIGMA, KEY, 2, 2, share)
    assert total.dtype == dtype
    torch.testing.assert_close(total, (h0.float() + wide).to(dtype), rtol=1e-2, atol=1e-3)
    total.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype


def test_noisy_add_promotes_and_returns_gradients_in_each_dtype() -> None:
    h0 = torch.randn(4, 5, dtype=torch.bfloat16, requires_grad=True)
    delta = torch.randn(4, 5, requires_grad=True)
    y = noise.noisy_add(h0, delta, SIGMA, KEY, 2, 2)
    assert y.dtype == torch.float32
    grads = torch.autograd.grad(y.sum(), (h0, delta))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32]
    z = noise.multiplicative_noise(torch.ones(4, 5), SIGMA, KEY, 2, 2)
    torch.testing.assert_close(grads[1], z, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("x", "views", "share", "message"),
    [
        (torch.zeros(3, 2), 2, "token", "must divide the rows of x"),
        (torch.zeros(4), 2, "token", "must be a floating-point"),
        (torch.zeros(4, 2), 2, "channel", "share must be one of"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(x: Tensor, views: int, share: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        noise.multiplicative_noise(x, SIGMA, KEY, 0, views, share)
