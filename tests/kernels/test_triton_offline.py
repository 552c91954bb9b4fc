"""The Triton sources through the compiler and assembler for sm_90, with no GPU at hand.

This catches type errors the interpreter accepts, register spills and scalar loads, not run time.
"""

import re
from dataclasses import astuple
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest

from benchmarks.offline.machine_code import DIVISIBLE, compiled, resources
from trainc.kernels.library import occupancy
from trainc.kernels.norm import tiles

pytestmark = pytest.mark.offline

ARCHITECTURE = 90


def triton_version() -> tuple[int, ...]:
    """The installed Triton's major and minor version."""
    try:
        return tuple(int(part) for part in version("triton").split(".")[:2])
    except PackageNotFoundError:
        return ()


# The launch table is made for this version of Triton; others that are supported may spill a few bytes a thread.
TUNED = triton_version() == (3, 9)
SPILLS = 0 if TUNED else 32
# Programs of the backward pass that an H100's processor holds, by columns.
RESIDENT = {1024: 3, 2048: 4, 4096: 2, 8192: 1}
HALF, FULL, INDEX = "*bf16", "*fp32", "*i64"


def spec(module: str, function: str, arguments: str, **options: Any) -> Any:
    """One compilation: `arguments` is "NAME:type .."; upper-case options are constexprs."""
    warps = options.pop("warps", 4)
    label = "-".join([function, *(str(v) for v in options.values())])
    return pytest.param(module, function, arguments, options, warps, id=label)


NORM = f"MEAN:{FULL} RSTD:{FULL} "
FORWARD = f"X:{HALF} RESIDUAL:{HALF} TOTAL:{HALF} W:{HALF} B:{HALF} Y:{HALF} {NORM} rows:i32 width:i32 eps:fp32"
BACKWARD = f"X:{HALF} W:{HALF} DY:{HALF} DY2:{HALF} DY3:{HALF} DTOTAL:{HALF} DX:{HALF} "
BACKWARD += f"{NORM} SCRATCH:{FULL} NORMS:{FULL} "
WHOLE = f"{BACKWARD} examples:i32 rows:i32 width:i32"
SPLIT = f"{BACKWARD} rows:i32 width:i32 chunks:i32 chunk_rows:i32"
FINISH = f"SCRATCH:{FULL} DW:{HALF} DB:{HALF} NORMS:{FULL} examples:i32 chunks:i32 width:i32"
WIDE_FORWARD = FORWARD.replace("rows:i32 ", "")
WIDE_SUMS = f"X:{HALF} W:{HALF} DY:{HALF} {NORM} MEANS:{FULL} SCRATCH:{FULL} "
WIDE_SUMS += "rows:i32 width:i32 chunks:i32 chunk_rows:i32"
WIDE_FINISH = f"X:{HALF} W:{HALF} DY:{HALF} DTOTAL:{HALF} DX:{HALF} {NORM} MEANS:{FULL} {FINISH} "
WIDE_FINISH += "normed:i32 blocks:i32 finishing:i32 norming:i32 span:i32"
NOISE = f"H0:{HALF} X:{HALF} Y:{HALF} SIGMA:{FULL} KEY:{INDEX} FIRST:{INDEX} site:i32 "
NOISE += "examples:i32 tokens:i32 channels:i32 program_tokens:i32"
ENTRIES = f"Y:{FULL} KEY:{INDEX} site:i32 columns:i32"
LOSS = f"L:{HALF} TARGETS:{INDEX} CROSS_ENTROPY:{FULL} DISTANCE:{FULL} KEPT:{FULL} "
LOSS_BACK = (
    f"L:{HALF} TARGETS:{INDEX} D:{HALF} KEPT:{FULL} ON_CROSS_ENTROPY:{FULL} ON_DISTANCE:{FULL} "
)
MEANS = (
    f"CROSS_ENTROPY:{FULL} DISTANCE:{FULL} TARGETS:{INDEX} WEIGHT:{FULL} LOSS:{FULL} MEAN_CROSS_ENTROPY:{FULL} "
    f"MEAN_DISTANCE:{FULL} rows:i32 ignore_index:i32"
)
FACTORS = (
    f"TARGETS:{INDEX} ON_CROSS_ENTROPY:{FULL} ON_DISTANCE:{FULL} ROW_CROSS_ENTROPY:{FULL} ROW_DISTANCE:{FULL} "
    "rows:i32 ignore_index:i32"
)
TAIL = "rows:i32 classes:i32 ignore_index:i32 smoothing:fp32"

KINDS: list[dict[str, Any]] = [
    {"ADD": False, "RMS": False, "LLAMA": False, "OFFSET": False, "HAS_W": True, "HAS_B": True},
    {"ADD": True, "RMS": False, "LLAMA": False, "OFFSET": False, "HAS_W": True, "HAS_B": True},
    {"ADD": False, "RMS": True, "LLAMA": False, "OFFSET": True, "HAS_W": True, "HAS_B": False},
    {"ADD": True, "RMS": True, "LLAMA": True, "OFFSET": False, "HAS_W": True, "HAS_B": False},
]


def tile(direction: tiles.Direction, columns: int) -> dict[str, Any]:
    """A tile of the launch table as options."""
    found = tiles.default(direction, columns)
    options: dict[str, Any] = {"BLOCK_R": found.rows, "BLOCK_C": columns, "warps": found.warps}
    return options if direction == "forward" else {**options, "STAGES": found.stages}


def summed(norm: dict[str, Any]) -> dict[str, Any]:
    """The sums of a norm's backward."""
    return {"SUM_W": True, "SUM_B": not norm["RMS"], "COLUMNS": 2 - norm["RMS"]}


def finish(norm: dict[str, Any], examples: int, chunks: int, width: int) -> dict[str, Any]:
    """The options of the launch that finishes a norm's sums."""
    step = tiles.finish(examples, chunks, width, summed(norm)["COLUMNS"], True, 132)
    names = ("UNROLL", "BLOCK_E", "BLOCK_S", "BLOCK_C", "BLOCK_L", "BLOCK_K")
    options = dict(zip(names, astuple(step), strict=True)) | {"SQUARED": True, **summed(norm)}
    return options | {"STORE_W": True, "STORE_B": not norm["RMS"], "warps": step.warps}


def without(norm: dict[str, Any], *names: str) -> dict[str, Any]:
    """A kind of norm without some of its options."""
    return {name: value for name, value in norm.items() if name not in names}


def backward(name: str, arguments: str, norm: dict[str, Any], columns: int, **more: Any) -> Any:
    """One compilation of a norm's backward."""
    return spec(
        "norm.triton_norm", name, arguments, **without(norm, "HAS_B"), **summed(norm), WRITE_DX=True,
        **(tile("backward", columns) | {"TERMS": 1} | more),
    )  # fmt: skip


SPECS = [
    *(
        spec("norm.triton_norm", "norm_forward", FORWARD, **k, **tile("forward", c))
        for k in KINDS
        for c in (1024, 4096)
    ),
    *(spec("norm.triton_norm", "norm_forward", FORWARD, **KINDS[0], **tile("forward", c))
        for c in (2048, 8192, 16384)),
    *(backward("norm_backward_split", SPLIT, k, c, ROW_NORMS=False)
        for k in KINDS for c in (1024, 4096)),
    *(backward("norm_backward_split", SPLIT, KINDS[0], c, ROW_NORMS=False) for c in (2048, 8192)),
    *(backward("norm_backward_split", SPLIT, KINDS[0], c, ROW_NORMS=True) for c in (1024, 8192)),
    *(backward("norm_backward_whole", WHOLE, k, c, STAGES=3) for k in KINDS for c in (1024, 4096)),
    *(backward("norm_backward_split", SPLIT, k, c, ROW_NORMS=False, TERMS=terms)
        for k in KINDS[:3:2] for c, terms in ((1024, 2), (1024, 3), (4096, 2), (4096, 3))),
    *(
        spec("norm.triton_norm", "norm_finish", FINISH, **finish(k, *lines))
        for k in KINDS[1:3]
        for lines in ((1, 264, 4096), (8, 49, 768), (64, 4, 4096), (256, 1, 4096))
    ),
    *(
        spec(
            "norm.triton_wide_norm", "wide_finish", WIDE_FINISH, WRITE_DX=True, BLOCK_X=4096,
            **without(k, "HAS_B", "LLAMA"), **finish(k, 8, 4, 16384) | {"warps": 8},
        )
        for k in KINDS[1:3]
    ),
    *(
        spec("norm.triton_wide_norm", "wide_forward", WIDE_FORWARD, **k, BLOCK_C=4096, warps=8)
        for k in KINDS
    ),
    *(
        spec(
            "norm.triton_wide_norm", "wide_sums", WIDE_SUMS, **without(k, "HAS_B", "ADD"), **summed(k),
            WRITE_DX=True, ROW_NORMS=by_rows, STAGES=2, BLOCK_R=4, BLOCK_C=1024,
        )
        for k in KINDS[1:3]
        for by_rows in (False, True)
    ),
    *(
        spec(
            "noise.triton_noise", "noise", NOISE, HAS_H0=h0, HAS_FIRST=h0, SHARED=shared, FAST=fast,
            VIEWS=256, BLOCK_T=tokens, BLOCK_G=64,
        )
        for h0 in (False, True)
        for shared, fast, tokens in ((False, False, 4), (False, True, 8), (True, False, 8))
    ),
    *(
        spec("noise.triton_random_entries", "entries", ENTRIES, NORMAL=normal, BLOCK_G=256)
        for normal in (False, True)
    ),
    *(
        spec(
            "loss.triton_cross_entropy_consistency", name, arguments + TAIL, KL=kl, SMOOTHED=smoothed,
            W=width, EVEN=even, V=warps * 512 // width, warps=warps,
            **({"OTHER": width} if name == "loss_forward" else {}),
        )
        for name, arguments, warps in (
            ("loss_forward", LOSS, 1), ("loss_forward", LOSS, 4), ("loss_backward", LOSS_BACK, 4),
        )
        for kl in (False, True)
        for smoothed, width, even in ((False, 8, True), (True, 8, False))
    ),
    *(
        spec("loss.triton_means", name, arguments, BLOCK=2048, warps=8)
        for name, arguments in (("loss_means", MEANS), ("loss_factors", FACTORS))
    ),
]  # fmt: skip


def sizes(options: dict[str, Any]) -> tuple[str, ...]:
    """The sizes that a launch with these options has as multiples of 16."""
    return DIVISIBLE if options.get("EVEN", True) else ()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("module", "name", "arguments", "options", "warps"), SPECS)
def test_compiles_without_spills_and_with_vector_access(
    module: str, name: str, arguments: str, options: dict[str, Any], warps: int
) -> None:
    import importlib

    function = getattr(importlib.import_module(f"trainc.kernels.{module}"), name)
    kernel = compiled(function, arguments, options, warps, divisible=sizes(options))
    ptx, taken = kernel.asm["ptx"], resources(kernel)
    assert taken.spilled <= SPILLS
    # One reads nothing but the key, the others few numbers, once.
    if name not in ("entries", "loss_means", "loss_factors"):
        assert re.search(r"ld\.global\.\S*v4|cp\.async\.cg.*, 0x10", ptx), "no 128-bit load"
    if name == "norm_backward_split" and TUNED:
        found = occupancy.Resources(taken.registers, kernel.metadata.shared)
        assert (
            occupancy.resident(found, warps, occupancy.Processor()) >= RESIDENT[options["BLOCK_C"]]
        )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("terms", [1, 2, 3])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", [HALF, FULL])
def test_two_programs_of_4096_columns_fit_a_processor_in_every_version(
    dtype: str, added: bool, terms: int
) -> None:
    """Of some kernels only with a limit on registers: 146 a thread in float32, by Triton 3.9, and 148 by 3.6."""
    from trainc.kernels.norm import triton_norm

    norm = without(KINDS[0], "HAS_B") | {"ADD": added}
    options = (
        norm
        | summed(norm)
        | {"WRITE_DX": True, "ROW_NORMS": False, "TERMS": terms}
        | tile("backward", 4096)
    )
    warps = options.pop("warps")

    def takes(**more: Any) -> occupancy.Resources:
        kernel = compiled(
            triton_norm.norm_backward_split, SPLIT.replace(HALF, dtype), options, warps, **more
        )
        found = resources(kernel)
        return occupancy.Resources(found.registers, found.shared, found.spilled)

    processor = occupancy.Processor()
    found = occupancy.fit(takes(), lambda limit: takes(maxnreg=limit), warps, processor)
    assert found.programs == 2
    if TUNED and terms == 1:
        assert (found.limit is not None) == (added and dtype == FULL)
