"""What a cold Triton cache costs: launches of one UNet call, distinct kernels among them, seconds to compile those.

No GPU is needed: the W8A8 UNet is called on tensors without memory, and each launch that it would make on an H100
is noted instead, with the types, constants and options that decide whether Triton compiles anew. The seconds are
of this machine's CPU, one kernel after the other. Run: python -m benchmarks compilations [--compile]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks.harness import results
from benchmarks.harness.tables import markdown
from benchmarks.models.definitions import MODELS, Model
from benchmarks.models.meta import on_meta
from ldmq_kernels import ops
from ldmq_kernels.kernels import dispatch
from ldmq_kernels.kernels.triton import backend as triton_backend
from ldmq_kernels.kernels.triton import tile_choice
from python_tests.kernels.triton.compile_triton import GPUS, OPTIONS, source

CAPABILITY = 90


def launches(model: Model, scheme: str) -> list[tuple[Any, dict[str, Any]]]:
    """The source and options of every launch of one call on an H100."""
    found: list[tuple[Any, dict[str, Any]]] = []

    def note(kernel: Any, *values: Any, grid: tuple, warmup: bool, **keywords: Any) -> None:
        options = {key: keywords.pop(key) for key in OPTIONS if key in keywords}
        found.append((source(kernel, values, keywords), options))

    # a call on the meta device would end in the ops' fake kernels
    servers = {name: dispatch.server(name) for name in ops.specs()}
    with (
        torch.device("meta"),
        torch.no_grad(),
        mock.patch.multiple(ops, **servers),
        mock.patch.object(triton_backend, "serves", return_value=True),
        mock.patch.object(tile_choice, "gpu_of", return_value=GPUS[CAPABILITY]),
        mock.patch.object(triton.JITFunction, "run", note),
        dispatch.use_backend("triton"),
    ):
        made = on_meta(model, scheme)
        made(**model.inputs(torch.device("meta"), torch.float16))
    return found


def distinct(found: list[tuple[Any, dict[str, Any]]]) -> list[tuple[Any, dict[str, Any]]]:
    """Those that Triton compiles: equal kernels, types, constants, alignments and options once."""
    return list({f"{code.hash()} {sorted(options.items())}": (code, options) for code, options in found}.values())


def compile_seconds(kernels: list[tuple[Any, dict[str, Any]]]) -> float:
    """Time to compile all with an empty cache."""
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": cache}):
        begin = time.perf_counter()
        for code, options in kernels:
            triton.compile(code, target=GPUTarget("cuda", CAPABILITY, 32), options=options)
        return time.perf_counter() - begin


def table(data: dict[str, Any]) -> str:
    """Launches, kernels and seconds of each model and scheme, for the pages."""
    lines = [
        [row["op"], row["scheme"], str(row["launches"]), str(row["kernels"]), f"{row['compile_seconds']:.0f}"]
        for row in data["rows"]
    ]
    words = "**What a cold Triton cache costs**: one UNet call for sm_90, compiled on one core without a GPU"
    return f"{words}\n\n" + markdown(["", "scheme", "launches", "distinct kernels", "seconds to compile"], lines)


def main(arguments: list[str]) -> None:
    """Print a line for each model, and keep the results where the kernels were compiled as well."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks compilations", description=__doc__)
    parser.add_argument("--compile", action="store_true", help="compile the kernels, and keep what that takes")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 interprets kernels: unset it, so that they are compiled")
    if options.compile:
        results.check_keep("compilations")
    rows = []
    for name in ("sd15", "sdxl"):
        for scheme in ("w8a8-static", "w8a8-dynamic"):
            found = launches(MODELS[name], scheme)
            kernels = distinct(found)
            row: dict[str, Any] = {"op": f"unet_{name}", "scheme": scheme, "launches": len(found)}
            row |= {"kernels": len(kernels), "capability": CAPABILITY}
            if options.compile:
                row["compile_seconds"] = compile_seconds(kernels)
            rows.append(row)
            print(json.dumps(row), flush=True)
    if options.compile:
        print(results.keep("compilations", rows, {}))
