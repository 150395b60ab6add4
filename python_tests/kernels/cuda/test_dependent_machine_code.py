"""In the machine code of sm_90a no kernel that may be launched early touches memory before it waits."""

from __future__ import annotations

import re

import pytest

from python_tests.kernels.before_wait import LET_THE_NEXT_BEGIN, WAIT, touched_before_wait, with_addresses

# cooperative, and after a memset: these are never launched early
NEVER_EARLY = ("group_norm_kernel", "sample_absmax_kernel")


def functions(text: str, architecture: str) -> dict[str, str]:
    """The text of each kernel of an architecture, by its mangled name."""
    found = {}
    for part in re.split(r"^\s*code for ", text, flags=re.MULTILINE)[1:]:
        if part.split()[0] == architecture:
            for function in re.split(r"^\s*Function : ", part, flags=re.MULTILINE)[1:]:
                name, _, body = function.partition("\n")
                found[name] = body
    return found


def test_no_memory_is_touched_before_the_wait(machine_code: str) -> None:
    found = functions(machine_code, "sm_90a")
    early = {name: body for name, body in found.items() if not any(kernel in name for kernel in NEVER_EARLY)}
    assert len(early) > 200
    assert {name for name, body in found.items() if WAIT not in body} == set(found) - set(early)
    assert {name: touched for name, body in early.items() if (touched := touched_before_wait(body))} == {}
    assert [name for name, body in found.items() if LET_THE_NEXT_BEGIN not in body and NEVER_EARLY[0] not in name] == []


def test_older_architectures_have_neither(machine_code: str) -> None:
    found = functions(machine_code, "sm_80")
    assert found
    assert not [name for name, body in found.items() if WAIT in body or LET_THE_NEXT_BEGIN in body]


def code(*lines: str) -> str:
    return "\n".join(f"/*{16 * i:04x}*/ {line} ;" for i, line in enumerate(lines))


@pytest.mark.parametrize(
    "touch",
    ["LDG.E.CONSTANT R0, [R2.64]", "STG.E [R2.64], R0", "LD.E R0, [R2]", "RED.E.ADD [R2], R0", "EXIT", "@P0 EXIT",
     "UTMALDG.2D [UR8], [UR4]", "LDGSTS.E.BYPASS.128 [R2], [R4.64]", "BRX R2 -0x10"],
)  # fmt: skip
def test_an_access_before_the_wait_is_found_on_every_way(touch: str) -> None:
    harmless = ("LDC R0, c[0x0][0x28]", "LDS R0, [R2]", "UTMACCTL.PF [UR4]", "REDUX.MAX UR4, R2")
    assert not touched_before_wait(code(*harmless, "ACQBULK", touch, "EXIT"))
    assert touched_before_wait(code(*harmless, touch, "ACQBULK", "EXIT"))
    # a way round the wait
    assert touched_before_wait(code("@P0 BRA 0x20", "ACQBULK", touch, "ACQBULK", "EXIT"))
    assert touched_before_wait(code("@P0 ACQBULK", touch, "EXIT"))
    # the same with labels
    labelled = f"/*0000*/ @P0 BRA `(.L_x_1) ;\n/*0010*/ ACQBULK ;\n.L_x_1:\n/*0020*/ {touch} ;\n/*0030*/ EXIT ;"
    assert touched_before_wait(with_addresses(labelled))
    assert not touched_before_wait(with_addresses(labelled.replace("@P0 BRA `(.L_x_1)", "NOP")))
    # both ways wait
    assert not touched_before_wait(code("@P0 BRA 0x30", "ACQBULK", "BRA 0x40", "ACQBULK", touch, "EXIT"))
