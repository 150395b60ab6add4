"""One model with random weights, beside float and other tools: python -m benchmarks model sdxl

Weights are random, so these are speed figures and say nothing of quality. On a GPU, float, compiled and quantized
forms as they are and as CUDA graphs; on a CPU, a UNet in float32, bfloat16 and W8A8, and its peak memory.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.commands.op import names
from benchmarks.harness import machine, results
from benchmarks.models import cpu, cpu_rivals, gpu
from benchmarks.models.definitions import MODELS, TOYS

BY = ("triton", "cuda")


def main(arguments: list[str]) -> None:
    """Measure one model, print and keep what was found."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=[*MODELS, *(name for name in cpu.SUBJECTS if name not in MODELS)])
    parser.add_argument(
        "--against",
        type=names,
        metavar="NAMES",
        help=f"with commas between: {', '.join(gpu.BASELINES)}; on a CPU {', '.join(cpu.RIVALS)}",
    )
    parser.add_argument("--by", choices=BY, help="offer every call to this backend before the others")
    parser.add_argument("--trace", type=Path, help="write a trace of one replayed call there, on a GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="without: the GPU where there is one")
    parser.add_argument("--rounds", type=int, help="timed calls of each: 15 on a GPU, 7 on a CPU")
    parser.add_argument("--threads", type=int, help="of torch, on a CPU")
    parser.add_argument("--toy", action="store_true", help="a model of a few layers, to see that this runs")
    results.add_options(parser)
    options = parser.parse_args(arguments)
    try:
        if options.device:
            machine.use_device(options.device)
    except ValueError as error:
        parser.error(str(error))
    if options.threads:
        torch.set_num_threads(options.threads)
    whole = machine.device().type == "cpu" and not options.toy
    known = cpu.RIVALS if whole else gpu.BASELINES
    unknown = [name for name in options.against or () if name not in known]
    if unknown:
        parser.error(f"no model is measured beside {', '.join(unknown)} here; it is beside {', '.join(known)}")
    if whole:
        reasons = [f"{name}: {why}" for name in options.against or () if (why := cpu_rivals.missing(name))]
        if reasons:
            parser.error("; ".join(reasons))
    elif options.model not in MODELS:
        parser.error(f"{options.model} is measured on a CPU, with --device cpu and without --toy")
    if options.toy and options.record:
        parser.error("a toy is no result: leave out --record")
    if whole:
        rows, text = cpu.measure(options.model, options.rounds or 7, options.against or cpu.usual_rivals()), cpu.text
        what = cpu.SUBJECTS[options.model].key
    else:
        dtype = torch.bfloat16 if options.model == "vae_decoder" else torch.float16
        described = (TOYS if options.toy else MODELS)[options.model]
        rows = gpu.measure(
            options.model,
            described,
            torch.float32 if options.toy else dtype,
            options.rounds or 15,
            options.against or known,
            options.trace,
        )
        text, what = gpu.text, f"model_{options.model}{f'_{options.by}' if options.by else ''}"
    output = results.Output.of(what, options)
    with gpu.served_first(options.by):
        for row in rows:
            output.add(row)
            print(text(row), flush=True)
    print(*output.files, sep="\n", end="")
