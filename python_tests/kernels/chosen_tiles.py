"""The tiles that the GPU backends choose for every shape of the models, without a measurement: chosen_tiles.json.

The file is compared with by a test of each backend. A table or a cost model that chooses otherwise on purpose writes it
anew, in the commit that gives the reason: python -m python_tests.kernels.chosen_tiles
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from ldmq_kernels.kernels.cuda import extension, tiles
from ldmq_kernels.kernels.gpu import FLOAT8_FROM, Gpu
from ldmq_kernels.kernels.triton import tile_choice
from ldmq_kernels.kernels.triton.tile_choice import Problem
from ldmq_kernels.kernels.triton.tile_tables import TILES, family
from ldmq_kernels.tuning.shapes import merged_of, of_models

FILE = Path(__file__).with_name("chosen_tiles.json")
MODELS = ("sd15", "sdxl", "vae_decoder")
GPUS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 188}  # multiprocessors by compute capability
CUDA_OPS = ("linear_w8a8", "linear_static_w8a8", "linear_w4a8", "conv2d_w8a8", "linear_fp8", "conv2d_fp8")
CPU = torch.device("cpu")
Chosen = dict[str, dict[str, str]]


def gemms(op: str) -> list[tuple[int, int, int, int]]:
    """m, n, k and taps of an op's calls; a pointwise convolution is a linear."""
    linears, convolutions = of_models(*MODELS)
    pointwise = [s for s in convolutions if s.kernel == s.stride == s.upsample == 1]
    if op.startswith("conv2d"):
        return sorted({(*s.product, s.kernel**2) for s in convolutions if s not in pointwise})
    return sorted({(*s.product, 1) for s in (*linears, *pointwise, *merged_of(*MODELS))})


def _chosen(name: str, op: str, choose: Callable[[int, int, int, int], str]) -> Chosen:
    return {name: {f"{m}x{n}x{k}": choose(m, n, k, taps) for m, n, k, taps in gemms(op)}}


def by_triton() -> Chosen:
    """Tile by GEMM, by table and GPU."""
    chosen: Chosen = {}

    def name(table: str, problem: Problem) -> str:
        tile = tile_choice.choose(table, problem, CPU)
        words = f"{tile.m}x{tile.n}x{tile.k} {tile.warps} warps {tile.stages} stages"
        return words + f" split-K {tile.split_k}" * (tile.split_k > 1) + " transposed" * tile.transposed

    for table, families in TILES.items():
        if "fp8" in table or "geglu" in table:  # as int8; and of products that widen, see test_tile_choice.py
            continue
        for capability, multiprocessors in GPUS.items():
            if family(capability) in families:
                gpu = Gpu(f"without measurements {capability}", capability, multiprocessors)
                with mock.patch.object(tile_choice, "gpu_of", lambda _, gpu=gpu: gpu):
                    key = f"triton {table} sm_{capability}"
                    chosen |= _chosen(key, table, lambda m, n, k, _, table=table: name(table, Problem(m, n, k)))
    return chosen


def by_cuda() -> Chosen:
    """Tile by GEMM, by op and GPU, of the tiles that the extension, or what stands in for it, has."""
    chosen: Chosen = {}
    for op in CUDA_OPS:
        for capability, multiprocessors in GPUS.items():
            if op.endswith("fp8") and capability < FLOAT8_FROM:
                continue
            gpu = Gpu(f"without measurements {capability}", capability, multiprocessors)
            with mock.patch.object(tiles, "gpu_of", lambda _, gpu=gpu: gpu):
                key = f"cuda {op} sm_{capability}"
                chosen |= _chosen(
                    key, op, lambda m, n, k, taps, op=op: tiles.candidates(op, m, n, k, CPU, taps)[0].name
                )
    return chosen


def read(backend: str) -> Chosen:
    """What the file has for a backend."""
    content = json.loads(FILE.read_text())
    names = content["tiles"]
    return {
        key: dict(zip(content["gemms"][key.split()[1].split("_")[0]], (names[i] for i in line), strict=True))
        for key, line in content["chosen"].items()
        if key.startswith(backend)
    }


def differences(chosen: Chosen, backend: str) -> list[str]:
    """Every choice of a backend that is another than the file's."""
    expected = read(backend)
    assert set(chosen) == set(expected)
    return [
        f"{key} {gemm}: {tile}, in the file {expected[key][gemm]}"
        for key, tiles_of_gemms in chosen.items()
        for gemm, tile in tiles_of_gemms.items()
        if tile != expected[key][gemm]
    ]


def write(chosen: Chosen) -> None:
    """Write the file, a line for each op and GPU."""
    names = sorted({tile for line in chosen.values() for tile in line.values()})
    lines = [f"  {json.dumps(key)}: {[names.index(tile) for tile in line.values()]}" for key, line in chosen.items()]
    shapes = {kind: [f"{m}x{n}x{k}" for m, n, k, _ in gemms(kind)] for kind in ("linear", "conv2d")}
    head = f'"gemms": {json.dumps(shapes)},\n "tiles": {json.dumps(names)},\n "chosen": {{\n'
    FILE.write_text("{" + head + ",\n".join(lines) + "\n }\n}\n")


if __name__ == "__main__":
    from python_tests.kernels.cuda.emulation import emulated_binding

    with mock.patch.object(extension, "binding", emulated_binding):
        write(by_triton() | by_cuda())
