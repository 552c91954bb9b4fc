"""Draw standard normals, or uniforms, by their coordinates, on any device; `philox` has the counters."""

import torch
from torch import Tensor

from trainc.kernels.noise import philox_numpy
from trainc.kernels.noise.philox import (
    MAX_SITES,
    MAX_TOKENS,
    MAX_VIEWS,
    TOP,
    Key,
    normal_pair,
    pack_key,
    philox,
)

# Groups drawn at once: ten or so temporaries of 512 KB.
CHUNK = 1 << 16


def normal(
    key: Key,
    site: int,
    views: int,
    examples: int,
    channels: int,
    tokens: int | None = None,
    first_example: Tensor | int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normals in float32, (views, examples, channels) or (.., examples, tokens, channels).

    `first_example` is the index, within the step's batch, of the first example asked for.
    """
    return _drawn(True, key, site, views, examples, channels, tokens, first_example, device)


def uniform(
    key: Key,
    site: int,
    views: int,
    examples: int,
    channels: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniforms in [0, 1), multiples of 2^-24 in float32, (views, examples, channels): channel c is word c % 4."""
    return _drawn(False, key, site, views, examples, channels, None, 0, device)


def _drawn(
    as_normals: bool,
    key: Key,
    site: int,
    views: int,
    examples: int,
    channels: int,
    tokens: int | None,
    first_example: Tensor | int,
    device: torch.device | str | None,
) -> Tensor:
    if not (0 <= site < MAX_SITES and views <= MAX_VIEWS and (tokens or 0) <= MAX_TOKENS):
        raise ValueError(
            f"site {site}, {views} views and {tokens} tokens do not fit the noise counters: "
            f"site is in [0, {MAX_SITES}), and views and tokens are at most {MAX_VIEWS} and {MAX_TOKENS}"
        )
    if device is None:
        device = key.device if isinstance(key, Tensor) else "cpu"
    key = pack_key(*key) if isinstance(key, tuple) else key
    extents = (views, examples, 1 if tokens is None else tokens, (channels + 3) // 4)
    if torch.device(device).type == "cpu" and philox_numpy.available():
        draw = philox_numpy.normal if as_normals else philox_numpy.uniform
        noise = draw(int(key), site, *extents, int(first_example))
    else:
        noise = _by_torch(as_normals, key.to(device), site, *extents, first_example)
    shape = (views, examples, channels) if tokens is None else (views, examples, tokens, channels)
    return noise[:, :channels].reshape(shape)


def _by_torch(
    as_normals: bool,
    key: Tensor,
    site: int,
    views: int,
    examples: int,
    tokens: int,
    groups: int,
    first: Tensor | int,
) -> Tensor:
    """(views * examples * tokens, 4 * groups) numbers of any device, `first` added to examples."""
    device, shape = key.device, (views, examples, tokens)
    view, example, token, group = (torch.arange(n, device=device) for n in (*shape, groups))
    rows = (example + first).view(1, -1, 1).expand(shape).reshape(-1, 1)
    where = (view.view(-1, 1, 1) + MAX_VIEWS * token).expand(shape).reshape(-1, 1)
    place = torch.full((), site, dtype=torch.int64, device=device)
    noise = torch.empty((rows.shape[0], groups, 2, 2), device=device)
    lanes = noise.permute(3, 2, 0, 1)
    step = max(1, CHUNK // max(groups, 1))
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        w0, w1, w2, w3 = philox(key, group.unsqueeze(0), rows[part], where[part], place)
        pairs = torch.stack((w0, w2)), torch.stack((w1, w3))
        if as_normals:
            normal_pair(*pairs, *lanes[:, :, part])
        else:
            for word, lane in zip(pairs, lanes[:, :, part], strict=True):
                torch.mul(word.bitwise_and_(TOP), 2.0**-32, out=lane)
    return noise.flatten(1)
