"""What is read of machine code, on lines as the disassembler prints them."""

from __future__ import annotations

import pytest

from python_tests.kernels.machine_code import divides, has_unguarded_write, waits

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
