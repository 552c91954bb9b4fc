"""The Triton sources compiled for other GPUs than the one they were tuned for, with none at hand.

Registers and spilled bytes are recorded: `pytest --junitxml` shows them as properties of a test.
"""

import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest

from benchmarks.offline.machine_code import compiled
from benchmarks.offline.machine_code import resources as taken_by
from tests.kernels.test_triton_offline import (
    ARCHITECTURE,
    FULL,
    HALF,
    INDEX,
    SPECS,
    SPILLS,
    sizes,
    spec,
)

pytestmark = [pytest.mark.offline, pytest.mark.filterwarnings("ignore")]

OTHERS = (80, 100)
REGISTER_FILE = 65536
# The widths between the narrowest and the widest are compiled for the GPU tuned for alone.
EXTREMES = [
    one
    for one in SPECS
    if one.values[0] != "norm.triton_norm" or one.values[3]["BLOCK_C"] not in (2048, 4096)
]

SUMS = f"TABLE:{INDEX} PARTIAL:*fp64 OUT:*fp64 tensors:i32"
ADAMW = f"WEIGHT:{HALF} GRAD:{HALF} MEAN:{FULL} SQUARE:{FULL} MASTER:{FULL} INDEX:*i32 "
NUMBERS = "decay:fp32 rate:fp32 root:fp32 "
ADAMW += f"SCALARS:{FULL} {NUMBERS} count:i32 blocks:i32 beta1:fp32 beta2:fp32 eps:fp32"
TOGETHER = f"TABLE:{INDEX} SCALARS:{FULL} tensors:i32 {NUMBERS} beta1:fp32 beta2:fp32 eps:fp32"
ALIGNED: dict[str, Any] = {
    "W": "bfloat16", "D": "float32", "CHUNK": 1 << 15, "BLOCK": 2048, "ROWS": 128,
}  # fmt: skip
VECTORS = [
    *(
        spec("parameter.triton_multi_norm", "partial_sums", SUMS, PAIRED=paired, ALIGNED=True, **ALIGNED)
        for paired in (False, True)
    ),
    *(
        spec(
            "parameter.triton_sparse_adamw", "adamw", ADAMW, ON_DEVICE=master, GATHERED=False,
            HAS_MASTER=master, WIDTH=width, BLOCK=1024,
        )
        for master in (False, True)
        for width in (1, 16)
    ),
    *(
        spec(
            "parameter.triton_sparse_adamw", "adamw_together", TOGETHER, ON_DEVICE=False, W="bfloat16",
            G="bfloat16", TYPE="int32", ALIGNED=True, GATHERED=gathered, HAS_MASTER=False, WIDTH=width,
            BLOCK=1024,
        )
        for gathered, width in ((False, 16), (True, 1))
    ),
    *(
        spec(
            "parameter.triton_masked_update", "zero_outside",
            f"FIRST:{HALF} SECOND:{FULL} THIRD:{FULL} MASK:*u8 count:i32",
            TENSORS=tensors, PACKED=packed, BLOCK=2048,
        )
        for tensors in (1, 3)
        for packed in (False, True)
    ),
]  # fmt: skip
# Addresses that are only known to be those of their type, and float64 partial sums.
SCALAR = [
    spec("parameter.triton_multi_norm", "partial_sums", SUMS, PAIRED=True, **ALIGNED | {"ALIGNED": False}),
]  # fmt: skip


def resources(
    record: Callable[[str, object], None],
    architecture: int,
    module: str,
    name: str,
    arguments: str,
    options: dict[str, Any],
    warps: int,
) -> str:
    """Compile, check and record what a program takes, and return its PTX."""
    function = getattr(import_module(f"trainc.kernels.{module}"), name)
    kernel = compiled(function, arguments, options, warps, architecture, divisible=sizes(options))
    found = taken_by(kernel, architecture)
    record("registers", found.registers)
    record("spilled", found.spilled)
    assert found.spilled <= SPILLS
    assert found.registers * 32 * warps <= REGISTER_FILE
    return str(kernel.asm["ptx"])


@pytest.mark.parametrize("architecture", OTHERS)
@pytest.mark.parametrize(("module", "name", "arguments", "options", "warps"), EXTREMES)
def test_tuned_kernels_fit_other_architectures(
    record_property: Callable[[str, object], None],
    module: str,
    name: str,
    arguments: str,
    options: dict[str, Any],
    warps: int,
    architecture: int,
) -> None:
    resources(record_property, architecture, module, name, arguments, options, warps)


@pytest.mark.parametrize("architecture", [ARCHITECTURE, *OTHERS])
@pytest.mark.parametrize(
    ("vector", "module", "name", "arguments", "options", "warps"),
    [
        pytest.param(vector, *one.values, id=one.id)
        for vector, specs in ((True, VECTORS), (False, SCALAR))
        for one in specs
    ],
)
def test_operators_over_parameters_fit_and_load_vectors(
    record_property: Callable[[str, object], None],
    vector: bool,
    module: str,
    name: str,
    arguments: str,
    options: dict[str, Any],
    warps: int,
    architecture: int,
) -> None:
    ptx = resources(record_property, architecture, module, name, arguments, options, warps)
    assert bool(re.search(r"ld\.global\.\S*v4", ptx)) or not vector, "no 128-bit load"
