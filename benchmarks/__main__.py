"""python -m benchmarks COMMAND: the one way to start whatever is measured."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "op": ("benchmarks.commands.op", "an op by each of our backends, beside other libraries"),
    "model": ("benchmarks.commands.model", "a whole UNet or VAE decoder, beside float, compiled and other tools"),
    "machine": ("benchmarks.commands.machine", "what this machine can do at most, and what the host spends on a call"),
    "all": ("benchmarks.commands.all", "all of these, recorded in benchmarks/results"),
    "tables": ("benchmarks.commands.tables", "docs/results.md and the README's table, from the results files"),
    "gpu": ("benchmarks.on_gpu", "everything that a GPU machine should bring home, in order of value"),
    "device": ("benchmarks.gpu_run.device", "what this GPU machine is"),
    "smoke": ("benchmarks.gpu_run.smoke", "every kernel in a process of its own, and the tuner's tiles at once"),
    "early-launches": (
        "benchmarks.gpu_run.early_launches",
        "whether early launches give equal results, and their gain",
    ),
    "sanitizer": ("benchmarks.gpu_run.sanitizer", "what compute-sanitizer finds in the CUDA kernels"),
    "collect": ("benchmarks.commands.collect", "results files of the rows that `gpu` brought home"),
    "study": (
        "benchmarks.study.run",
        "decisions of the method, in parts: search, calibration, FP8, published lists of layers",
    ),
    "pictures": ("benchmarks.study.pictures", "how many dB in the picture for how many bytes, by which tool"),
    "remedies": ("benchmarks.study.remedies", "what would make 8-bit activations finer, in the final latent"),
    "drawn-remedies": ("benchmarks.study.drawn_remedies", "the same in the pictures, drawn"),
    "rounding": ("benchmarks.study.rounding", "what other ways of GPTQ rounding do to the pictures"),
    "robustness": ("benchmarks.study.robustness", "one plan at other guidance, steps, schedulers and sizes"),
    "estimates": ("benchmarks.study.planner_estimates", "how well the planner's estimates hold on the demo model"),
    "ends": ("benchmarks.study.end_noise", "how well noise in latents and pictures is known before they are drawn"),
    "end-plans": ("benchmarks.study.end_plans", "plans for the pictures beside plans for the UNet's output"),
    "mixed": ("benchmarks.study.mixed", "plans of 4 and 8 bits at 0.32 of the bytes of fp16, by what they may use"),
    "plan-time": ("benchmarks.study.plan_time", "what planning for the pictures costs beside the model's output"),
    "plan": ("benchmarks.study.plan_large", "the method on a UNet of full size: minutes and memory"),
    "breadth": ("benchmarks.breadth", "every kind of pipeline planned through its own calls, and quantized"),
    "gallery": (
        "benchmarks.study.gallery",
        "frames of a video UNet and pictures of a transformer, float and quantized",
    ),
    "serve": ("benchmarks.serving", "what the server must reach: the same pictures, overhead, leavers, load"),
    "cold-start": ("benchmarks.models.cold_start", "seconds to the first call with an empty Triton cache"),
    "memory": ("benchmarks.models.memory", "memory of this process over many input sizes, by the backend that serves"),
    "compilations": ("benchmarks.models.compilations", "kernels that a first call compiles, counted without a GPU"),
    "attention": ("benchmarks.models.attention", "attention in bfloat16 on this CPU, beside torch's"),
    "predict": ("benchmarks.commands.predict", "milliseconds of a model on a GPU that is not there, from data sheets"),
    "shapes": ("benchmarks.models.shapes", "the models' layers, into the package's tuning/model_shapes.json"),
}


def usage() -> str:
    """Every command with what it answers."""
    lines = "\n".join(f"  {name:16}{words}" for name, (_, words) in COMMANDS.items())
    return f"usage: python -m benchmarks COMMAND [...], --help after a command tells its options\n\n{lines}"


def main(arguments: list[str]) -> int:
    """Run a command; what it returns is the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, *others = arguments
    if name not in COMMANDS:
        print(f"there is no command {name}\n\n{usage()}", file=sys.stderr)
        return 2
    module = importlib.import_module(COMMANDS[name][0])
    return module.main(others) or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
