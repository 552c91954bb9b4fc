"""Ghost batch norm's Triton kernels: by the interpreter against the CPU's, and compiled offline."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch

from benchmarks.offline.machine_code import compiled
from benchmarks.offline.machine_code import resources as taken_by
from tests.kernels.test_triton_architectures import OTHERS, resources
from tests.kernels.test_triton_interpreter import close
from tests.kernels.test_triton_offline import ARCHITECTURE, FULL, HALF, SPILLS, spec
from trainc.kernels.batch_norm import ghost_batch_norm as operators

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Shape, ghost size and elements held: tiles larger and smaller than a ghost, one and many channels
# a program, a remainder, and fewer examples than a ghost.
REGIMES: dict[str, tuple[tuple[int, ...], int, int]] = {
    "once": ((6, 3, 5, 4), 3, 1 << 13),
    "once-flat": ((10, 37), 4, 1 << 13),
    "once-short": ((3, 2, 7), 8, 1 << 13),
    "walked": ((7, 2, 5, 7), 3, 8),
    "walked-flat": ((21, 5), 9, 8),
}


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Any]:
    """The launchers, holding so many elements."""

    def limited(held: int) -> Any:
        module = import_module("trainc.kernels.batch_norm.triton_ghost_batch_norm")
        for name in ("FORWARD_HELD", "BACKWARD_HELD", "WALKED"):
            monkeypatch.setattr(module, name, held)
        return module

    return limited


@pytest.mark.interpreter
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("affine", "remainder"), [(True, "merge_last"), (False, "smaller")])
def test_kernels_agree_with_the_cpu(
    regime: str, dtype: torch.dtype, affine: bool, remainder: str, launch: Callable[[int], Any]
) -> None:
    shape, size, held = REGIMES[regime]
    torch.manual_seed(0)
    x, dy = (torch.randn(shape).mul(2).add(1).to(dtype) for _ in range(2))
    weight, bias = ((torch.randn(shape[1]).to(dtype) if affine else None) for _ in range(2))
    module = launch(held)
    got = module.ghost_batch_norm(x, weight, bias, size, 1e-5, remainder)
    want = operators.eager_forward(x, weight, bias, size, 1e-5, remainder)
    close(got[:1], want[:1], dtype)
    close(got[1:], want[1:], torch.float32)
    mask = [True, affine, True]
    arguments = (dy, x, weight, *want[1:3], size, 1e-5, mask)
    first, got = got, module.ghost_batch_norm_backward(*arguments)
    other = operators.eager_backward(*arguments)
    close(got[:1], other[:1], dtype)
    close(got[1:], other[1:], torch.float32)
    addresses = [t.untyped_storage().data_ptr() for t in (*first, *got) if t.numel()]
    assert len(set(addresses)) == len(addresses), "results of an operator may not share memory"


@pytest.mark.interpreter
@pytest.mark.parametrize("held", [8, 1 << 13])
def test_a_mean_far_from_zero_costs_no_digits(held: int, launch: Callable[[int], Any]) -> None:
    x = torch.randn(8, 2, 9) + 1000.0
    y, mean, rstd, var = launch(held).ghost_batch_norm(x, None, None, 4, 1e-5, "error")
    exact = operators.eager_forward(x.double(), None, None, 4, 1e-5, "error")
    # Squares of 1000 leave float32 no digits of a variance of 1; only rounding the mean is left.
    for got, want, tolerance in zip(
        (y, mean, rstd, var), exact, (2e-4, 1e-6, 1e-4, 2e-4), strict=True
    ):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.interpreter
def test_channels_last_is_read_as_it_lies(launch: Callable[[int], Any]) -> None:
    x, dy = (torch.randn(5, 6, 3, 2) for _ in range(2))
    moved = x.contiguous(memory_format=torch.channels_last)
    module = launch(1 << 13)
    weight = torch.randn(6)
    y, *statistics = module.ghost_batch_norm(moved, weight, None, 2, 1e-5, "merge_last")
    assert y.is_contiguous(memory_format=torch.channels_last)
    want = operators.eager_forward(x, weight, None, 2, 1e-5, "merge_last")
    close((y, *statistics), want, x.dtype)
    arguments = (weight, *want[1:3], 2, 1e-5, [True, True, False])
    got = module.ghost_batch_norm_backward(dy, moved, *arguments)
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    close(got, operators.eager_backward(dy, x, *arguments), x.dtype)


SIZES = "examples:i32 channels:i32 width:i32 ghosts:i32 ghost_size:i32"
STATISTICS = f"MEAN:{FULL} RSTD:{FULL}"
FORWARD = f"X:{HALF} W:{FULL} B:{FULL} Y:{HALF} {STATISTICS} VAR:{FULL} {SIZES} eps:fp32"
BACKWARD = f"DY:{HALF} X:{HALF} W:{FULL} {STATISTICS} DX:{HALF} GAIN:{FULL} SHIFT:{FULL} {SIZES}"
# Samples, channels, positions, held, warps: what `tile` gives for 7 x 7 and 14 x 14 pixels of 32
# samples, for 512 rows without pixels, and for what is walked.
TILES = {
    "ghost_forward": [(32, 1, 64, True, 4), (32, 1, 256, True, 8), (256, 1, 64, True, 16),
                      (512, 16, 1, True, 8), (1, 1, 4096, False, 8), (64, 16, 1, False, 4)],
    "ghost_backward": [(32, 1, 64, True, 4), (32, 1, 256, True, 8), (512, 16, 1, True, 8),
                       (1, 1, 4096, False, 8), (64, 16, 1, False, 4)],
}  # fmt: skip
FLAGS = {"ghost_forward": {"HAS_W": True, "HAS_B": True}}
FLAGS["ghost_backward"] = {"HAS_W": True, "WRITE_DX": True}
SPECS = [
    spec(
        "batch_norm.triton_ghost_batch_norm", name, FORWARD if name == "ghost_forward" else BACKWARD,
        **FLAGS[name], BLOCK_N=n, BLOCK_C=c, BLOCK_S=s, ONCE=once, warps=warps,
    )
    for name, tiles in TILES.items()
    for n, c, s, once, warps in tiles
]  # fmt: skip


@pytest.mark.offline
def test_the_compiled_tiles_are_those_of_the_launcher() -> None:
    module: Any = import_module("trainc.kernels.batch_norm.triton_ghost_batch_norm")
    limits = {"ghost_forward": module.FORWARD_HELD, "ghost_backward": module.BACKWARD_HELD}
    sizes = [
        (32, 64, 49),
        (32, 64, 196),
        (256, 64, 49),
        (512, 64, 1),
        (32, 64, 3136),
        (9999, 64, 1),
    ]
    for name, held in limits.items():
        found = {module.tile(*size, held) for size in sizes}
        for expected in TILES[name]:
            assert module.Tile(*expected) in found


@pytest.mark.offline
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", [ARCHITECTURE, *OTHERS])
@pytest.mark.parametrize(("samples", "positions"), [(8, 196), (4, 400)])
def test_backward_spills_nothing_where_rows_are_long_and_of_any_length(
    samples: int, positions: int, architecture: int
) -> None:
    module: Any = import_module("trainc.kernels.batch_norm.triton_ghost_batch_norm")
    chosen = module.tile(samples, 64, positions, module.BACKWARD_HELD)
    options = FLAGS["ghost_backward"] | {
        "ONCE": chosen.once,
        "BLOCK_N": chosen.samples,
        "BLOCK_C": chosen.channels,
        "BLOCK_S": chosen.positions,
    }
    more = module.limits(chosen)
    assert more == {"maxnreg": 96}
    kernel = compiled(
        module.ghost_backward, BACKWARD, options, chosen.warps, architecture, (), **more
    )
    assert taken_by(kernel, architecture).spilled <= SPILLS


@pytest.mark.offline
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", [ARCHITECTURE, *OTHERS])
@pytest.mark.parametrize(("module", "name", "arguments", "options", "warps"), SPECS)
def test_kernels_fit_every_architecture(
    record_property: Callable[[str, object], None],
    module: str,
    name: str,
    arguments: str,
    options: dict[str, Any],
    warps: int,
    architecture: int,
) -> None:
    resources(record_property, architecture, module, name, arguments, options, warps)
