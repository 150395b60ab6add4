"""What is read of machine code, on lines as the disassembler prints them."""

from __future__ import annotations

import pytest

from python_tests.kernels.machine_code import divides, has_unguarded_write, main_loop, of_every_step, waits

PRODUCT = "IGMMA.64x128x32.S8.S8 R24, gdesc[UR12], R24, gsb0 ;"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x{} ;"
BARRIER, LOAD, STORE = "BAR.SYNC.DEFER_BLOCKING 0x0 ;", "@UP1 UTMALDG.2D [UR16], [UR4] ;", "STS.128 [R2], R8 ;"


def test_waits_tell_how_many_products_stay_in_flight() -> None:
    assert waits([PRODUCT, WAIT.format(0), BARRIER, PRODUCT, WAIT.format(1)]) == [0, 1]
    assert waits(["HMMA.16816.F32 R4, R8, R12, R4 ;"]) == []


@pytest.mark.parametrize("write", [LOAD, STORE])
def test_a_write_between_a_wait_and_the_barrier_is_found_round_the_loop(write: str) -> None:
    wait = WAIT.format(0)
    assert not has_unguarded_write([PRODUCT, wait, BARRIER, write])
    assert not has_unguarded_write([BARRIER, write, PRODUCT, wait])
    assert not has_unguarded_write([PRODUCT, wait])
    assert has_unguarded_write([PRODUCT, wait, write, BARRIER])
    assert has_unguarded_write([write, BARRIER, PRODUCT, wait])


def test_a_division_by_a_reciprocal_is_found() -> None:
    assert divides([PRODUCT, "MUFU.RCP R8, R9 ;"])
    assert not divides([PRODUCT, "IMAD.HI.U32 R8, R9, R10, RZ ;", "MUFU.EX2 R8, R9 ;"])


def test_the_loop_is_the_shortest_that_multiplies_and_no_return_from_a_wait() -> None:
    waiting = [".L_x_4:", "@!P0 BRA `(.L_x_4) ;", "BRA `(.L_x_3) ;"]
    loop = [".L_x_2:", "MUFU.RCP R8, R9 ;", "@!P0 BRA `(.L_x_4) ;", ".L_x_3:", PRODUCT, "@P1 BRA `(.L_x_2) ;"]
    idle = [".L_x_5:", LOAD, "@P0 BRA `(.L_x_5) ;"]
    assert main_loop("\n".join([".L_x_1:", *idle, *loop, "BRA.U UP0, `(.L_x_1) ;", "EXIT ;", *waiting])) == loop
    assert main_loop("\n".join([*idle, "EXIT ;"])) == []
    # one that is left at its beginning
    top = [".L_x_6:", "@P0 BRA `(.L_x_7) ;", PRODUCT, "@P1 EXIT ;", "BRA `(.L_x_6) ;"]
    assert main_loop("\n".join([*top, ".L_x_7:", "        /*0a10*/                   EXIT ;"])) == top


def test_what_a_branch_passes_over_is_not_of_every_step() -> None:
    division = "MUFU.RCP R8, R9 ;"
    over = ["@P0 BRA `(.L_x_2) ;", division, ".L_x_2:"]
    assert not divides(of_every_step([".L_x_1:", *over, PRODUCT, "@P1 BRA `(.L_x_1) ;"]))
    assert divides(of_every_step([".L_x_1:", *over, division, PRODUCT, "@P1 BRA `(.L_x_1) ;"]))
    # one warp multiplies for all: what is beside its products is of every step
    product = ["BRA.U !UP0, `(.L_x_2) ;", division, PRODUCT, ".L_x_2:"]
    assert divides(of_every_step([".L_x_1:", *product, "@P1 BRA `(.L_x_1) ;"]))
    # and where a warp waits elsewhere, nothing is passed over
    waits_elsewhere = ["@!P0 BRA `(.L_x_9) ;", ".L_x_3:", division, PRODUCT]
    assert divides(of_every_step([".L_x_1:", *waits_elsewhere, "@P1 BRA `(.L_x_1) ;"]))
