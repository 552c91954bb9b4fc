"""The Triton sources through the compiler and assembler for sm_90, with no GPU at hand.

This catches type errors the interpreter accepts, register spills and scalar loads, not run time.
"""

import re
import subprocess
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

from trainc.kernels.library.launch import PINNED
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
HALF, FULL, INDEX = "*bf16", "*fp32", "*i64"


def spec(module: str, function: str, arguments: str, **options: Any) -> Any:
    """One compilation: `arguments` is "NAME:type .."; upper-case options are constexprs."""
    warps = options.pop("warps", 4)
    label = "-".join([function, *(str(v) for v in options.values())])
    return pytest.param(module, function, arguments, options, warps, id=label)


NORM = f"MEAN:{FULL} RSTD:{FULL} "
FORWARD = f"X:{HALF} RESIDUAL:{HALF} TOTAL:{HALF} W:{HALF} B:{HALF} Y:{HALF} {NORM} rows:i32 width:i32 eps:fp32"
BACKWARD = f"X:{HALF} W:{HALF} DY:{HALF} DTOTAL:{HALF} DX:{HALF} {NORM} PW:{FULL} PB:{FULL}"
WHOLE = f"{BACKWARD} NORMS:{FULL} examples:i32 rows:i32 width:i32 programs:i32"
SPLIT = f"{BACKWARD} NORMS:{FULL} rows:i32 width:i32 chunks:i32 chunk_rows:i32"
FINISH = f"PARTIAL:{FULL} EACH:{FULL} SQUARES:{FULL} examples:i32 chunks:i32 width:i32 first:i32"
WIDE_FORWARD = FORWARD.replace("rows:i32 ", "")
WIDE_ROWS = f"X:{HALF} W:{HALF} DY:{HALF} {NORM} ALONG:{FULL} LEVEL:{FULL} width:i32"
WIDE_COLUMNS = f"{BACKWARD} ALONG:{FULL} LEVEL:{FULL} rows:i32 width:i32 chunks:i32 chunk_rows:i32"
NOISE = f"H0:{HALF} X:{HALF} Y:{HALF} SIGMA:{FULL} KEY:{INDEX} FIRST:{INDEX} site:i32 "
NOISE += "examples:i32 tokens:i32 channels:i32 program_tokens:i32"
ENTRIES = f"Y:{FULL} KEY:{INDEX} site:i32 columns:i32"
LOSS = f"L:{HALF} TARGETS:{INDEX} CROSS_ENTROPY:{FULL} DISTANCE:{FULL} KEPT:{FULL} "
LOSS_BACK = (
    f"L:{HALF} TARGETS:{INDEX} D:{HALF} KEPT:{FULL} ON_CROSS_ENTROPY:{FULL} ON_DISTANCE:{FULL} "
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
    found = tiles.default(direction, torch.bfloat16, columns)
    options: dict[str, Any] = {"BLOCK_R": found.rows, "BLOCK_C": columns, "warps": found.warps}
    return options if direction == "forward" else {**options, "STAGES": found.stages}


def backward(name: str, arguments: str, norm: dict[str, Any], columns: int, **more: Any) -> Any:
    """One compilation of a norm's backward."""
    sums = 1 if norm["RMS"] else 2
    return spec(
        "norm.triton_norm", name, arguments, **norm, WRITE_DX=True, COLUMNS=sums, **more,
        **tile("backward", columns),
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
    *(backward("norm_backward_whole", WHOLE, k, c) for k in KINDS for c in (1024, 4096)),
    spec("norm.triton_norm", "norm_finish", FINISH, COLUMNS=2, BLOCK_S=64, BLOCK_C=32),
    *(
        spec(
            "norm.triton_wide_norm", "wide_rows", WIDE_ROWS, RMS=k["RMS"], OFFSET=k["OFFSET"], HAS_W=True,
            BLOCK_C=4096, warps=8,
        )
        for k in KINDS[1:3]
    ),
    *(
        spec("norm.triton_wide_norm", "wide_forward", WIDE_FORWARD, **k, BLOCK_C=4096, warps=8)
        for k in KINDS
    ),
    *(
        spec(
            "norm.triton_wide_norm", "wide_columns", WIDE_COLUMNS, **k, WRITE_DX=True, STAGES=2,
            BLOCK_R=4, BLOCK_C=1024,
        )
        for k in KINDS[1:3]
    ),
    *(
        spec(
            "noise.triton_noise", "noise", NOISE, HAS_H0=h0, HAS_FIRST=True, SHARED=shared, VIEWS=256,
            BLOCK_T=8, BLOCK_G=64,
        )
        for h0 in (False, True)
        for shared in (False, True)
    ),
    *(
        spec("noise.triton_random_entries", "entries", ENTRIES, NORMAL=normal, BLOCK_G=256)
        for normal in (False, True)
    ),
    *(
        spec("loss.triton_cross_entropy_consistency", name, arguments + TAIL, KL=kl, BLOCK_V=2048, warps=4)
        for name, arguments in (("loss_forward", LOSS), ("loss_backward", LOSS_BACK))
        for kl in (False, True)
    ),
]  # fmt: skip


def compiled(
    function: Any,
    arguments: str,
    options: dict[str, Any],
    warps: int,
    architecture: int = ARCHITECTURE,
) -> Any:
    """Compile as a launch would: pointers and sizes divisible by 16, which allows vector loads."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = dict(part.split(":") for part in arguments.split())
    signature |= dict.fromkeys(options, "constexpr")
    names = [parameter.name for parameter in function.params]
    assert set(names) == set(signature)
    divisible = [
        name for name, kind in signature.items()
        if kind.startswith("*") or name in ("width", "channels", "classes", "count")
    ]  # fmt: skip
    source = ASTSource(
        fn=function,
        signature={name: signature[name] for name in names},
        constexprs={
            (names.index(name),): getattr(tl, value) if isinstance(value, str) else value
            for name, value in options.items()
        },
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options={"num_warps": warps, **PINNED})


def assembled(ptx: str, architecture: int = ARCHITECTURE) -> tuple[int, int]:
    """Bytes of registers the assembler spills, and registers a thread takes."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = f"sm_{architecture}{'a' if architecture >= 90 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        report = subprocess.run(
            [get_ptxas(architecture).path, "-v", f"--gpu-name={target}", source,
             "-o", Path(folder) / "kernel.cubin"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    found = re.findall(r"(\d+) bytes spill (?:stores|loads)", report.stderr)
    used = re.search(r"Used (\d+) registers", report.stderr)
    assert found
    assert used
    return sum(map(int, found)), int(used[1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("module", "name", "arguments", "options", "warps"), SPECS)
def test_compiles_without_spills_and_with_vector_access(
    module: str, name: str, arguments: str, options: dict[str, Any], warps: int
) -> None:
    import importlib

    function = getattr(importlib.import_module(f"trainc.kernels.{module}"), name)
    ptx = compiled(function, arguments, options, warps).asm["ptx"]
    spilled, registers = assembled(ptx)
    assert spilled <= SPILLS
    if name != "entries":  # it reads nothing but the key
        assert re.search(r"ld\.global\.\S*v4|cp\.async\.cg.*, 0x10", ptx), "no 128-bit load"
    if name == "norm_backward_split" and TUNED:
        # What the launch table says fits a processor does: registers come in eights a thread.
        resident = tiles.default("backward", torch.bfloat16, options["BLOCK_C"]).resident
        assert resident * -(-registers // 8) * 8 * warps * 32 <= 65536
