"""The Triton sources through the compiler and assembler for sm_90, with no GPU at hand.

This catches type errors the interpreter accepts, register spills and scalar loads, not run time.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.offline

ARCHITECTURE = 90
HALF, FULL, INDEX = "*bf16", "*fp32", "*i64"


def spec(module: str, function: str, arguments: str, **options: Any) -> Any:
    """One compilation: `arguments` is "NAME:type .."; upper-case options are constexprs."""
    warps = options.pop("warps", 4)
    label = "-".join([function, *(str(v) for v in options.values())])
    return pytest.param(module, function, arguments, options, warps, id=label)


NORM = f"MEAN:{FULL} RSTD:{FULL} "
FORWARD = f"X:{HALF} W:{HALF} B:{HALF} Y:{HALF} {NORM} rows:i32 width:i32 eps:fp32"
BACKWARD = f"X:{HALF} W:{HALF} DY:{HALF} DX:{HALF} {NORM} PW:{FULL} PB:{FULL}"
WHOLE = f"{BACKWARD} NORMS:{FULL} examples:i32 rows:i32 width:i32 programs:i32"
SPLIT = f"{BACKWARD} rows:i32 width:i32 chunks:i32 chunk_rows:i32"
FINISH = f"PARTIAL:{FULL} TOTAL:{FULL} SQUARES:{FULL} examples:i32 chunks:i32 width:i32"
NOISE = f"H0:{HALF} X:{HALF} Y:{HALF} SIGMA:{FULL} KEY:{INDEX} FIRST:{INDEX} site:i32 "
NOISE += "examples:i32 tokens:i32 channels:i32 program_tokens:i32"
LOSS = f"L:{HALF} TARGETS:{INDEX} TASK:{FULL} DISTANCE:{FULL} "
LOSS_BACK = f"L:{HALF} TARGETS:{INDEX} D:{HALF} ON_TASK:{FULL} ON_DISTANCE:{FULL} "
TAIL = "rows:i32 classes:i32 ignore_index:i32 smoothing:fp32"

KINDS: list[dict[str, Any]] = [
    {"RMS": False, "LLAMA": False, "HAS_W": True, "HAS_B": True},
    {"RMS": True, "LLAMA": False, "HAS_W": True, "HAS_B": False},
    {"RMS": True, "LLAMA": True, "HAS_W": True, "HAS_B": False},
]
TILES: list[dict[str, Any]] = [
    {"BLOCK_R": 4, "BLOCK_C": 1024, "warps": 4},
    {"BLOCK_R": 1, "BLOCK_C": 4096, "warps": 8},
]
SPECS = [
    *(spec("triton_norm", "norm_forward", FORWARD, **k, **t) for k in KINDS for t in TILES),
    *(
        spec("triton_norm", "norm_backward_split", SPLIT, **k, WRITE_DX=True, **t)
        for k in KINDS
        for t in TILES
    ),
    *(
        spec(
            "triton_norm", "norm_backward_whole", WHOLE, **k, WRITE_DX=True,
            COLUMNS=1 if k["RMS"] else 2, **t,
        )
        for k in KINDS
        for t in TILES
    ),
    spec("triton_norm", "norm_finish", FINISH, BLOCK_S=8, BLOCK_C=128),
    *(
        spec(
            "triton_noise", "noise", NOISE, HAS_H0=h0, HAS_FIRST=True, SHARED=shared, VIEWS=256,
            BLOCK_T=8, BLOCK_G=64,
        )
        for h0 in (False, True)
        for shared in (False, True)
    ),
    *(
        spec("triton_loss", name, arguments + TAIL, KL=kl, BLOCK_V=4096, warps=8)
        for name, arguments in (("loss_forward", LOSS), ("loss_backward", LOSS_BACK))
        for kl in (False, True)
    ),
]  # fmt: skip


def compiled(function: Any, arguments: str, options: dict[str, Any], warps: int) -> Any:
    """Compile as a launch would: pointers and sizes divisible by 16, which allows vector loads."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = dict(part.split(":") for part in arguments.split())
    signature |= dict.fromkeys(options, "constexpr")
    names = [parameter.name for parameter in function.params]
    assert set(names) == set(signature)
    divisible = [
        name for name, kind in signature.items()
        if kind.startswith("*") or name in ("width", "channels", "classes")
    ]  # fmt: skip
    source = ASTSource(
        fn=function,
        signature={name: signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in options.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    target = GPUTarget("cuda", ARCHITECTURE, 32)
    return triton.compile(source, target=target, options={"num_warps": warps})


def spilled(ptx: str) -> int:
    """Bytes of registers the assembler spills."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        report = subprocess.run(
            [get_ptxas(ARCHITECTURE).path, "-v", f"--gpu-name=sm_{ARCHITECTURE}a", source,
             "-o", Path(folder) / "kernel.cubin"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    found = re.findall(r"(\d+) bytes spill (?:stores|loads)", report.stderr)
    assert found
    return sum(map(int, found))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("module", "name", "arguments", "options", "warps"), SPECS)
def test_compiles_without_spills_and_with_vector_access(
    module: str, name: str, arguments: str, options: dict[str, Any], warps: int
) -> None:
    import importlib

    function = getattr(importlib.import_module(f"trainc.kernels.{module}"), name)
    ptx = compiled(function, arguments, options, warps).asm["ptx"]
    assert spilled(ptx) == 0
    assert re.search(r"ld\.global\.\S*v4", ptx), "no 128-bit load"
