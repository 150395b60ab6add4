"""Write what CUTLASS gives the driver for 200 convolutions: python -m python_tests.kernels.cuda.im2col.generate CUTLASS

CUTLASS is a checkout, or the folder `cutlass_library/source` of the package nvidia-cutlass (descriptors.json is of
4.2.0.0); nvcc compiles it.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
FILE = HERE / "descriptors.json"
COUNT = 200
BOXES = ((128, 128), (256, 128), (128, 64), (64, 64))  # pixels and channels that a TMA load takes
UNETS = ((320, 64, 3, 1), (640, 32, 3, 1), (1280, 8, 3, 1), (320, 128, 3, 2), (2560, 16, 3, 1), (960, 64, 1, 1))


def geometries() -> list[tuple[int, ...]]:
    """Pixels, channels; n, c, h, w, k, r, s; padding at the top, bottom, left and right; strides; dilations.

    First those of UNets, then any that TMA takes.
    """
    drawn = random.Random(0)
    found = [
        (*BOXES[0], 2, channels, size, size, 320, kernel, kernel, *(kernel // 2,) * 4, stride, stride, 1, 1)
        for channels, size, kernel, stride in UNETS
    ]
    found += [(*BOXES[3], 1, 128, 33, 17, 8, 3, 3, 0, 1, 0, 1, 2, 2, 1, 1)]  # padded at the far sides, and odd
    while len(found) < COUNT:
        height, width = drawn.randint(1, 70), drawn.randint(1, 70)
        taps, steps = [drawn.randint(1, 7) for _ in range(2)], [drawn.randint(1, 8) for _ in range(2)]
        apart, pads = [drawn.randint(1, 4) for _ in range(2)], [drawn.randint(0, 6) for _ in range(4)]
        heights = (height + pads[0] + pads[1], (taps[0] - 1) * apart[0])
        widths = (width + pads[2] + pads[3], (taps[1] - 1) * apart[1])
        if all(padded > reach for padded, reach in (heights, widths)):
            sizes = (drawn.randint(1, 5), 16 * drawn.randint(1, 40), height, width, 8 * drawn.randint(1, 9))
            found.append((*drawn.choice(BOXES), *sizes, *taps, *pads, *steps, *apart))
    return found


def lines(program: Path, given: list[tuple[int, ...]]) -> list[list[int]]:
    """The numbers that a program prints for each geometry."""
    text = "\n".join(" ".join(map(str, numbers)) for numbers in given)
    run = subprocess.run([str(program)], input=text, capture_output=True, text=True, check=True)
    return [[int(number) for number in line.split()] for line in run.stdout.splitlines()]


def main(cutlass: Path) -> None:
    """Compile the witness, ask it, and write the file."""
    with tempfile.TemporaryDirectory() as scratch:
        program = Path(scratch) / "witness"
        includes = [f"-I{cutlass / folder}" for folder in ("include", "tools/util/include")]
        command = ["nvcc", "-x", "cu", "-std=c++17", "-O0", "-w", "-arch=sm_90a", "--expt-relaxed-constexpr", *includes]
        subprocess.run([*command, str(HERE / "witness.cpp"), "-o", str(program)], check=True)
        given = geometries()
        found = lines(program, given)
    assert len(found) == len(given)
    rows = ",\n".join(json.dumps(pair) for pair in zip(given, found, strict=True))
    FILE.write_text(f"[\n{rows}\n]\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
