"""Milliseconds of one call of a model on a GPU that is not there: python -m benchmarks predict sdxl --device h200

Nothing is measured. The model is called once without memory, and each of its operations takes what data sheets, the
waves of the tiles that the kernels choose, and what their compiled loops lose allow (`ldmq_kernels.prediction`). A
measurement is held against it: "floor" is what no kernel goes below, by operations or by bytes.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.tables import aligned
from benchmarks.models.definitions import MODELS, Model
from benchmarks.models.meta import on_meta
from ldmq_kernels.files import write_whole
from ldmq_kernels.kernels.devices import DEVICES, Device, device_of
from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.prediction import BACKENDS, Operation, Predicted, Prediction, predict, record

WORDS = {"triton": "Triton", "cuda": "CUDA", "compiled": "compiled fp16"}


def recorded(model: Model, scheme: str) -> list[Operation]:
    """The operations of one call with every layer in a scheme, or in "fp16"."""
    with torch.device("meta"):
        made = on_meta(model, scheme)
        inputs = model.inputs(torch.device("meta"), torch.float16)
        return record(made, lambda: made(**inputs))


def predictions(model: Model, scheme: str, device: Device) -> list[Prediction]:
    """One for each backend, and the compiled float model."""
    ours, floating = recorded(model, scheme), recorded(model, "fp16")
    return [predict(floating if backend == "compiled" else ours, device, backend) for backend in BACKENDS]


def sums(found: list[Prediction]) -> str:
    """Milliseconds by kind of operation, a column for each backend."""
    rows = [[kind, *(f"{one.by_kind[kind]:.2f}" for one in found)] for kind in found[0].by_kind]
    rows.append(["sum, ms", *(f"{one.milliseconds:.2f}" for one in found)])
    rows.append(["with dependent launches, ms", *(f"{one.early_milliseconds:.2f}" for one in found)])
    rows.append(["kernels", *(str(one.launches) for one in found)])
    return aligned(["", *(WORDS[one.backend] for one in found)], rows)


def _cells(row: Predicted) -> list[str]:
    tile = ["", "", ""] if row.gemm is None else [row.gemm.tile, f"{row.gemm.waves:.2f}", f"{row.gemm.loop_share:.0%}"]
    floors = (row.operations_ms, row.bytes_ms, row.milliseconds)
    return [row.served_by, *tile, *(f"{1e3 * value:.1f}" for value in floors)]


def layers(found: Prediction, each: bool) -> str:
    """A row for each operation, or for equal ones together, the longest first."""
    head = ["", "sizes", "by", "tile", "waves", "loop", "floor: operations", "bytes", "us each", "ms"]
    if each:
        rows = [[f"{r.layer or 'model'} ({r.op})", r.words, *_cells(r), f"{r.milliseconds:.4f}"] for r in found.rows]
        return aligned(head, rows)
    counts = Counter((row.op, row.words) for row in found.rows)
    alike = {(row.op, row.words): row for row in found.rows}
    ordered = sorted(alike.items(), key=lambda pair: -counts[pair[0]] * pair[1].milliseconds)
    rows = [
        [f"{counts[key]} x {row.op}", row.words, *_cells(row), f"{counts[key] * row.milliseconds:.3f}"]
        for key, row in ordered
    ]
    return aligned(head, rows)


def as_json(found: list[Prediction]) -> dict[str, Any]:
    """All of it, for a program to hold a measurement against."""
    return {
        "predicted_for": found[0].device._asdict(),
        "backends": {
            one.backend: {
                "ms": one.milliseconds,
                "ms_with_dependent_launches": one.early_milliseconds,
                "ms_by_kind": one.by_kind,
                "kernels": one.launches,
                "rows": [
                    {
                        "op": row.op,
                        "served_by": row.served_by,
                        "layer": row.layer,
                        "sizes": row.words,
                        "ms": row.milliseconds,
                        "floor_ms": {"operations": row.operations_ms, "bytes": row.bytes_ms},
                        "kernels": row.launches,
                        "tile": row.gemm and row.gemm.tile,
                    }
                    for row in one.rows
                ],
            }
            for one in found
        },
    }


def main(arguments: list[str]) -> None:
    """Print sums of all backends, and the rows of one."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--device", choices=DEVICES, default="h200")
    parser.add_argument("--scheme", choices=[n for n, s in SCHEMES.items() if s.quantizes], default="w8a8-static")
    parser.add_argument("--backend", choices=BACKENDS, default="triton", help="whose rows are printed")
    parser.add_argument("--each", action="store_true", help="a row for each layer by its name, none put together")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every row of every backend")
    options = parser.parse_args(arguments)
    device = device_of(options.device)
    found = predictions(MODELS[options.model], options.scheme, device)
    if options.json:
        write_whole(options.json, (json.dumps(as_json(found), indent=1) + "\n").encode())
    print(f"{options.model}, {options.scheme}, one call on {device.name}: predicted from {device.source}, not measured")
    print(sums(found), layers(found[BACKENDS.index(options.backend)], options.each), sep="\n\n")
