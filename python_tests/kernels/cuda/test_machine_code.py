"""The machine code of the GEMMs: the tensor cores' instructions, fed by the copies that each family has."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from python_tests.kernels.cuda.machine_loops import divides, step_loops
from python_tests.kernels.cuda.wgmma_in_flight import overwritten_operands
from python_tests.kernels.kept_builds import ROOT, kept_build
from python_tests.kernels.machine_code import waits

OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.x]*)", re.MULTILINE)
DESIGNED = re.compile(r"sm(80|90)11gemm_kernelINS0_4TileILNS_4KindE([0123])ELNS_7ElementE([01])E")
OPS = {
    ("0", "0"): "linear_w8a8",
    ("1", "0"): "conv2d_w8a8",
    ("2", "0"): "linear_w4a8",
    ("3", "0"): "linear_geglu_w8a8",
    ("0", "1"): "linear_fp8",
    ("3", "1"): "linear_geglu_fp8",
    ("1", "1"): "conv2d_fp8",
}
FP8 = ("linear_fp8", "conv2d_fp8", "linear_geglu_fp8")


@pytest.fixture(scope="session")
def kernels(machine_code: str) -> dict[tuple[str, str, str], str]:
    """Text of each GEMM kernel by architecture, mangled name and op."""
    return _gemms(machine_code)


def _gemms(text: str) -> dict[tuple[str, str, str], str]:
    found = {}
    for part in re.split(r"^\s*code for ", text, flags=re.MULTILINE)[1:]:
        architecture = part.split()[0]
        for function in re.split(r"^\s*Function : ", part, flags=re.MULTILINE)[1:]:
            name, _, body = function.partition("\n")
            if designed := DESIGNED.search(name):
                found[architecture, name, OPS[designed.group(2, 3)]] = body
    return found


def opcodes(text: str) -> Counter[str]:
    """How often each instruction stands in a text, with its modifiers."""
    return Counter(OPCODE.findall(text))


def starting(counts: Counter[str], prefix: str) -> int:
    return sum(count for name, count in counts.items() if name.startswith(prefix))


def main_loop(text: str) -> str:
    """From the first MMA of the tensor cores to the last."""
    lines = text.splitlines()
    at = [index for index, line in enumerate(lines) if re.search(r"\b[IQ]G?MMA\.", line)]
    return "\n".join(lines[at[0] : at[-1] + 1])


def test_every_op_has_kernels_of_both_families(kernels: dict) -> None:
    have = {(architecture, op) for architecture, _, op in kernels}
    wanted = {(a, op) for a in ("sm_80", "sm_90a") for op in OPS.values()}
    assert have == wanted - {("sm_80", op) for op in FP8}


def test_hopper_multiplies_by_warpgroups_what_tma_loads(kernels: dict) -> None:
    hopper = {key: text for key, text in kernels.items() if "4sm90" in key[1]}
    assert {architecture for architecture, _, _ in hopper} == {"sm_90a"}
    for (_, name, op), text in hopper.items():
        counts = opcodes(text)
        steps = 2 if "ELi64ELi10E" in name else 4  # of 32 channels
        of_bytes, of_fp8 = (sum(n for o, n in counts.items() if re.match(p, o)) for p in (r"IGMMA\b", r"QGMMA\b.*E4M3"))
        assert (of_fp8 if op in FP8 else of_bytes) >= steps, name
        assert (of_bytes if op in FP8 else of_fp8) == 0, name
        assert not [o for o in counts if re.match(r"[IQH]MMA\b", o)], name
        im2col, multicast = (sum(n for o, n in counts.items() if w in o) for w in ("IM2COL", "MULTICAST"))
        assert starting(counts, "UTMALDG") >= 2, name
        assert (im2col > 0) == op.startswith("conv2d"), name
        assert (multicast > 0) == bool(re.search(r"ELi2EEE\w*$|ELb[01]ELi2EEE", name)), name
        assert starting(counts, "LDL") == starting(counts, "STL") == 0, name


def test_the_main_loop_on_hopper_waits_for_no_fence(kernels: dict) -> None:
    """A release at cluster scope would put a fence of the whole GPU between the wgmmas."""
    for (_, name, op), text in kernels.items():
        if "4sm90" in name:
            counts = opcodes(main_loop(text))
            assert starting(counts, "MEMBAR") == 0, name
            assert op == "linear_w4a8" or starting(counts, "LDS") == 0, name


def test_products_on_hopper_stay_in_flight_until_the_tile_is_done(kernels: dict) -> None:
    """Each wait of the main loop leaves the newest products; the last one of a tile leaves none for the epilogue."""
    hopper = {name: text for (_, name, op), text in kernels.items() if "4sm90" in name and op not in FP8}
    assert hopper
    for name, text in hopper.items():
        assert set(waits(main_loop(text).splitlines())) == {1}, name
        assert waits(text.splitlines())[-1] == 0, name


def test_fp8_is_waited_for_once_a_step_and_promoted(kernels: dict) -> None:
    """Where registers allow it the next step is in flight, else the other warpgroup's products are.

    A product of the compiler's own choice would add a wait.
    """
    hopper = {name: text for (_, name, op), text in kernels.items() if "4sm90" in name and op in FP8}
    assert hopper
    for name, text in hopper.items():
        groups = len(re.findall(r"QGMMA\S.*gsb0", text))
        rows, columns = map(int, re.search(r"ElementE1ELi(\d+)ELi(\d+)E", name).groups())
        in_flight = rows == 128 and columns <= 128
        # of both registers' steps in the loop, and of either after it
        assert waits(text.splitlines()) == ([1, 1, 0, 0] if in_flight else [0] * groups), name
        assert starting(opcodes(text), "FADD") >= columns // 2 * groups, name


def test_the_int4_weight_reaches_the_tensor_cores_from_registers(kernels: dict) -> None:
    for (_, name, op), text in kernels.items():
        if "4sm90" in name:
            from_registers = re.findall(r"IGMMA\S* R\d+, (R\d+), gdesc", text)
            assert bool(from_registers) == (op == "linear_w4a8"), name


def test_no_wgmma_reads_registers_that_are_written_anew(kernels: dict) -> None:
    """An int4 step is unpacked into other registers than those that the step before still reads."""
    found = {name: overwritten_operands(text) for (_, name, op), text in kernels.items() if op == "linear_w4a8"}
    assert not {name: instructions for name, instructions in found.items() if instructions}


def test_a_register_written_too_early_is_found() -> None:
    lines = [
        "LDS.U16 R8, [R2]",
        "IGMMA.64x64x32.S8.S8 R24, R8, gdesc[UR8], R24, gsb0",
        "{}",
        "WARPGROUP.DEPBAR.LE gsb0, 0x0",
        "@P0 BRA 0x0000",
        "EXIT",
    ]
    text = "\n".join(f"/*{16 * i:04x}*/ {line} ;" for i, line in enumerate(lines))
    for harmless in (
        "IMAD R12, R8, R9, RZ",
        "STG.E.128 [R8], R8",
        "WARPGROUP.DEPBAR.LE gsb0, 0x0",
        "ISETP.NE.AND P0, PT, R8, RZ, PT",
    ):
        assert not overwritten_operands(text.format(harmless))
    for early in ("IMAD R11, R2, R3, RZ", "LDG.E.64 R10, [R2.64]", "@!P1 BRA 0x0000", "LOP3.LUT P0, R9, R2, R3, RZ"):
        assert overwritten_operands(text.format(early))


def test_no_loop_over_the_steps_of_a_convolution_divides(kernels: dict) -> None:
    """Tap and channel are carried from step to step; where a tile or a part of k begins, they are divided once."""
    convolutions = {name: text for (_, name, op), text in kernels.items() if op.startswith("conv2d")}
    assert convolutions
    for name, text in convolutions.items():
        is_hopper = "4sm90" in name
        found = step_loops(text, "UTMALDG" if is_hopper else "LDGSTS", is_hopper)
        assert found, name
        assert not [loop for loop in found if divides(loop)], name


def test_a_division_in_a_loop_over_steps_is_found() -> None:
    """In the middle one of three: over tiles, taps and channels."""

    def kernel(of_tile: str, of_tap: str) -> str:
        lines = [of_tile, of_tap, "UTMALDG.2D [UR8], [UR4]", "UTMALDG.4D.IM2COL [UR8], [UR4], UR2"]
        lines += [f"@P{i} BRA 0x{16 * place:x}" for i, place in enumerate((2, 1, 0))] + ["EXIT"]
        return "\n".join(f"/*{16 * i:04x}*/ {line} ;" for i, line in enumerate(lines))

    harmless, division = "IMAD R0, R1, R2, RZ", "MUFU.RCP R0, R1"
    assert len(step_loops(kernel(harmless, harmless), "UTMALDG", True)) == 2
    assert not any(map(divides, step_loops(kernel(division, harmless), "UTMALDG", True)))
    assert any(map(divides, step_loops(kernel(harmless, division), "UTMALDG", True)))
    assert any(map(divides, step_loops(kernel(division, harmless), "UTMALDG", False)))


def test_other_gpus_multiply_what_asynchronous_copies_bring(kernels: dict) -> None:
    others = {key: text for key, text in kernels.items() if "4sm80" in key[1]}
    assert {architecture for architecture, _, _ in others} == {"sm_80", "sm_90a"}
    for (architecture, name, op), text in others.items():
        counts = opcodes(text)
        # Hopper has no e4m3 in mma.sync: it is converted to float16
        assert starting(counts, "HMMA.16816.F32" if op in FP8 else "IMMA.16832") >= 16, name
        assert starting(counts, "LDGSTS") >= 2, name
        assert starting(counts, "LDSM") >= 1, name
        assert starting(counts, "LDL") == starting(counts, "STL") == 0, (architecture, name)


@pytest.mark.slow
@pytest.mark.parametrize("op", FP8)
def test_ada_multiplies_fp8_and_promotes_each_product(build_folder: Path, cuobjdump: str, op: str) -> None:
    """The build of the other tests has no sm_89: one file of it is compiled here."""

    def compile_for_ada(folder: Path) -> None:
        source = ROOT / f"csrc/sm89_{op}.cu"
        command = ["nvcc", "-std=c++17", "-O3", f"-I{ROOT / 'csrc/ptx'}", "-arch=sm_89", "-Xptxas=-v", "-cubin"]
        log = subprocess.run([*command, "-o", folder / "ada.cubin", source], capture_output=True, text=True, check=True)
        (folder / "log").write_text(log.stderr)

    with kept_build(f"ada_{op}", lambda: build_folder.name, compile_for_ada) as folder:
        assert set(re.findall(r"\d+ bytes spill stores, \d+ bytes spill loads", (folder / "log").read_text())) == {
            "0 bytes spill stores, 0 bytes spill loads"
        }
        text = subprocess.run(
            [cuobjdump, "-sass", folder / "ada.cubin"], capture_output=True, text=True, check=True
        ).stdout
    found = _gemms(text)
    assert len(found) == 2 * (5 if "geglu" in op else 4 if "conv2d" in op else 3)  # tiles, by what each stores
    for (_, name, found_op), body in found.items():
        counts = opcodes(body)
        products = starting(counts, "QMMA.16832.F32.E4M3.E4M3")
        assert found_op == op
        assert products >= 16, name
        assert starting(counts, "FADD") >= 4 * products, name
        assert starting(counts, "LDGSTS") >= 2, name
