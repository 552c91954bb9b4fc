"""Instructions counted in machine code: what the reader makes of a listing, and what the kernels come to."""

from importlib import import_module
from typing import Any

import pytest

from benchmarks.offline.machine_code import compiled, parsed, per_element, resources
from tests.kernels.test_triton_offline import (
    FULL,
    HALF,
    INDEX,
    LOSS,
    LOSS_BACK,
    NOISE,
    TAIL,
    TUNED,
    sizes,
)

LISTING = """
        .section        .text.kernel,"ax",@progbits
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
        /*0030*/                   FADD R1, R4, R5 ;
        /*0040*/                   FADD R1, R1, R6 ;
.L_x_1:
        /*0050*/              @!P1 FMUL R1, R1, R7 ;
        /*0060*/               @P2 BRA `(.L_x_0) ;
        /*0070*/                   EXIT ;
.L_x_2:
        /*0080*/                   BRA `(.L_x_2);
"""


def test_a_listing_is_read_whole() -> None:
    code = parsed(LISTING)
    assert [one.name for one in code.instructions] == [
        "S2R", "LDG.E.128", "BRA", "FADD", "FADD", "FMUL", "BRA", "EXIT", "BRA",
    ]  # fmt: skip
    assert code.labels == {".L_x_0": 1, ".L_x_1": 5, ".L_x_2": 8}
    assert [one.predicate for one in code.instructions[2:6]] == ["P0", "", "", "!P1"]
    assert code.instructions[1].operands == "R4, desc[UR4][R2.64]"
    assert code.count("LDG") == 1
    assert code.count("FADD", "FMUL") == 3


def test_a_turn_is_the_shortest_way_through_a_loop() -> None:
    code = parsed(LISTING)
    assert [[one.name for one in turn] for turn in code.loops] == [
        ["LDG.E.128", "BRA", "FMUL", "BRA"]
    ]
    assert code.main_loop == code.loops[0]
    assert [one.name for one in code.once] == ["S2R", "EXIT", "BRA"]


def test_a_branch_that_is_always_taken_has_no_way_past_it() -> None:
    code = parsed(LISTING.replace("@P0 BRA", "BRA"))
    assert len(code.main_loop) == 4
    straight = parsed(LISTING.replace("@P0 BRA `(.L_x_1)", "NOP"))
    assert len(straight.main_loop) == 6


@pytest.mark.parametrize("branch", ["BRA.DIV ~URZ,", "BRA.DIV UR12,", "BRA.CONV ~URZ,"])
def test_a_branch_that_asks_the_threads_of_a_warp_may_be_passed(branch: str) -> None:
    listing = LISTING.replace("FADD R1, R4, R5", f"{branch} `(.L_x_2)")
    assert len(parsed(listing).main_loop) == 4
    whole = listing.replace("@P0 BRA `(.L_x_1)", "NOP")
    assert len(parsed(whole).main_loop) == 6


def test_no_loop_is_no_main_loop() -> None:
    assert parsed("        /*0000*/                   EXIT ;").main_loop == ()


def kernel(module: str, name: str, arguments: str, warps: int, **options: Any) -> Any:
    function = getattr(import_module(f"trainc.kernels.{module}"), name)
    return compiled(function, arguments, options, warps, divisible=sizes(options))


# A device of 4.3 TB/s has time for some 10 instructions while two bytes come.
@pytest.mark.offline
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kl", "most"), [(False, 6.0), (True, 9.5)])
@pytest.mark.parametrize(
    ("width", "other", "even", "warps", "more"),
    [
        (8, 8, True, 1, 0.0), (8, 8, False, 1, 0.0), (8, 8, True, 4, 0.0),
        # The second view's loads are narrower, and so more; of those by one the first view's are as many, too.
        (8, 4, False, 1, 0.5), (8, 2, False, 1, 0.5), (8, 1, False, 1, 4.0), (1, 1, True, 1, 9.0),
    ],
)  # fmt: skip
def test_loss_forward_is_not_bound_by_its_instructions(
    kl: bool, most: float, width: int, other: int, even: bool, warps: int, more: float
) -> None:
    found = kernel(
        "loss.triton_cross_entropy_consistency", "loss_forward", LOSS + TAIL, warps,
        KL=kl, SMOOTHED=False, W=width, EVEN=even, OTHER=other, V=512 * warps // width,
    )  # fmt: skip
    assert per_element(found, warps * 64 * 8 * 2) <= most + more
    assert resources(found).spilled == 0 or not TUNED


@pytest.mark.offline
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_loss_backward_compiles_wherever_rows_lie(kl: bool, width: int) -> None:
    found = kernel(
        "loss.triton_cross_entropy_consistency", "loss_backward", LOSS_BACK + TAIL, 4,
        KL=kl, SMOOTHED=True, W=width, EVEN=width == 1, V=2048 // width,
    )  # fmt: skip
    assert resources(found).spilled == 0 or not TUNED


@pytest.mark.offline
@pytest.mark.filterwarnings("ignore")
def test_a_run_of_one_row_is_read_straight() -> None:
    arguments = (
        f"DY:{HALF} SORTED:{INDEX} ORDER:{INDEX} SQUARES:{FULL} rows:i32 width:i32 padding:i32"
    )
    found = kernel("layer.triton_embedding", "run_squares", arguments, 1, BLOCK_R=4, BLOCK_C=512)
    assert per_element(found, 512, loop=False) <= 12.5


@pytest.mark.offline
@pytest.mark.filterwarnings("ignore")
def test_fast_noise_takes_half_the_instructions() -> None:
    exact, fast = (
        kernel(
            "noise.triton_noise", "noise", NOISE, 4, HAS_H0=True, HAS_FIRST=True, SHARED=False,
            FAST=fast, VIEWS=256, BLOCK_T=tokens, BLOCK_G=64,
        )
        for fast, tokens in ((False, 4), (True, 8))
    )  # fmt: skip
    assert 2 * per_element(fast, 256 * 8) <= per_element(exact, 256 * 4)
    # The device's own functions, for which there are bounds of the error, and no others.
    for name in ("lg2", "sqrt", "cos", "sin"):
        assert f"{name}.approx.ftz.f32" in fast.asm["ptx"]
    assert "cos.approx" not in exact.asm["ptx"]
