"""One model on a GPU, in turns float, compiled and quantized, eager and as CUDA graphs.

Weights are random, so these are speed figures and say nothing of quality. All layers are W8A8 with static
scales. "graph_fp16" is eager torch, replayed as a CUDA graph. "compiled_fp16" is channels_last, cudnn.benchmark,
torch.compile with Inductor's defaults, replayed as a CUDA graph as ours is. The VAE decoder is measured in bfloat16.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import ldmq_kernels as ldmq
from benchmarks.harness.baselines import TOOLS, lazily
from benchmarks.harness.cases import working
from benchmarks.harness.clocks import sampled
from benchmarks.harness.machine import device
from benchmarks.harness.tables import markdown
from benchmarks.harness.timing import Call, Variants, medians
from benchmarks.models.definitions import Model
from ldmq_kernels.integrations.diffusers.fused import fuse, unfuse
from ldmq_kernels.kernels import dispatch, measurements
from ldmq_kernels.kernels.backend import usual_order
from ldmq_kernels.kernels.dependent_launch import dependent_launches, is_on
from ldmq_kernels.nn import QuantConv2d, QuantizedLayer, QuantLinear
from ldmq_kernels.numerics.formats import SCHEMES

NEEDED = ("ldmq_eager", "eager_fp16")
BASELINES = ("eager_fp16", "graph_fp16", "compiled_fp16", *(f"{tool}_compiled" for tool in TOOLS))
LATE = "ldmq_graph_without_early_launches"  # measured where "ldmq_graph" has them
INPUT_SCALE = 8 / 127  # of random activations after a norm, in place of a calibrated one
KINDS = {
    "attention": ("flash", "fmha", "attention", "cudnn_generated_fort_native_sdpa"),
    "int8 linear": ("_linear_w8a8", "_linear_w4a8", "add_splits"),
    "int8 convolution": ("_conv2d_w8a8", "_conv2d_w4a8", "_convolve"),
    "int8 linear or convolution, CUDA": ("ldmq::sm90::gemm_kernel", "ldmq::sm80::gemm_kernel"),
    "norm and quantization": (
        "statistics",
        "normalize",
        "group_norm",
        "layer_norm",
        "geglu",
        "silu",
        "_quantize",
        "_part_maximum",
    ),
    "copies and sums": ("copy", "elementwise", "cat", "memcpy", "memset", "fill"),
}


def materialize(model: nn.Module, dtype: torch.dtype, on: torch.device) -> nn.Module:
    """A model of the meta device with random weights of the variance that keeps activations near 1."""
    model.to_empty(device=on)
    generator = torch.Generator(on).manual_seed(0)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            with torch.no_grad():
                if parameter.dim() > 1:
                    parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
                else:
                    parameter.fill_(1.0 if name == "weight" else 0.0)
    return model.to(dtype).to(memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]


def quantized(model: nn.Module) -> nn.Module:
    """A copy with every linear and convolution in static W8A8, its blocks fused."""
    clone = copy.deepcopy(model)
    for name, module in list(clone.named_modules()):
        if isinstance(module, nn.Linear | nn.Conv2d):
            kind = QuantLinear if isinstance(module, nn.Linear) else QuantConv2d
            scale = torch.full((1,), INPUT_SCALE, device=module.weight.device)
            clone.set_submodule(name, kind.from_float(module, SCHEMES["w8a8-static"], input_scale=scale))
    return fuse(clone)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and of its quantized layers' buffers."""
    tensors = list(model.parameters())
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            tensors += [tensor for name, tensor in module.state_dict().items() if name != "bias"]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def caller(model: nn.Module, inputs: dict[str, Any]) -> Call:
    """One call, without gradients."""

    def call() -> Tensor:
        with torch.no_grad():
            return model(**inputs)[0]

    return call


def plain_forms(float_model: nn.Module, ours: nn.Module, inputs: dict[str, Any], on_gpu: bool) -> Variants:
    """Both models as they are and, on a GPU, as CUDA graphs."""
    found = {"ldmq_eager": caller(ours, inputs), "eager_fp16": caller(float_model, inputs)}
    if on_gpu:
        for name, model in (("graph_fp16", float_model), ("ldmq_graph", ours)):
            found[name] = caller(ldmq.capture(_Shell(model).eval()), inputs)
        if is_on(device()):
            found[LATE] = _without_early_launches(caller(ldmq.capture(_Shell(ours).eval()), inputs))
    return found


def _without_early_launches(call: Call) -> Call:
    """The same, by whose first calls nothing is captured that may be launched early."""

    def without() -> Tensor:
        with dependent_launches(False):
            return call()

    return without


def compiled_forms(float_model: nn.Module, ours: nn.Module, inputs: dict[str, Any]) -> Variants:
    """Run by torch.compile, replayed as CUDA graphs; ours also with its blocks unfused, for Inductor to fuse."""
    models: dict[str, Callable[[], nn.Module]] = {
        "compiled_fp16": lambda: float_model,
        "ldmq_compiled": lambda: ours,
        "ldmq_unfused_compiled": lambda: unfuse(copy.deepcopy(ours)),
    }
    models |= {f"{tool}_compiled": partial(by_tool, float_model) for tool, by_tool in TOOLS.items()}
    return {name: lazily(partial(_compiled_call, make, inputs)) for name, make in models.items()}


def _compiled_call(make: Callable[[], nn.Module], inputs: dict[str, Any]) -> Call:
    return caller(ldmq.capture(_compiled(make())), inputs)


class _Shell(nn.Module):
    """Another module around the same one, to be captured by itself."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.call: Callable[..., Any] = inner

    def forward(self, **inputs: Any) -> Any:
        """Return what the inner module does."""
        return self.call(**inputs)


def _compiled(module: nn.Module) -> nn.Module:
    shell = _Shell(module).eval()
    shell.call = torch.compile(module, fullgraph=True)
    return shell


def peak_bytes(call: Callable[[], Tensor]) -> int | None:
    """Most GPU memory that a call takes beyond the weights, after a first one."""
    if not torch.cuda.is_available():
        return None
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def breakdown(call: Callable[[], Tensor], trace: Path | None = None) -> dict[str, float]:
    """Milliseconds of the GPU by kind of kernel in one call; "gaps" is what lies between kernels.

    Args:
        call: what is looked at; a replayed graph has the GPU's own gaps, an eager call those of the host.
        trace: where a trace of every kernel is written, for a browser; compressed where it ends with .gz.
    """
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    if trace is not None:
        profile.export_chrome_trace(str(trace))
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    found: dict[str, float] = {}
    for event in kernels:
        name = event.name.lower()
        kind = next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "rest")
        found[kind] = found.get(kind, 0.0) + event.time_range.elapsed_us() / 1e3
    if kernels:
        whole = max(e.time_range.end for e in kernels) - min(e.time_range.start for e in kernels)
        found["gaps"] = whole / 1e3 - sum(found.values())
    return found


@contextlib.contextmanager
def served_first(backend: str | None) -> Iterator[None]:
    """Offer every call to a backend before the others inside of the block; None leaves the usual order."""
    if backend is None:
        yield
        return
    order = (backend, *(name for name in usual_order(device()) if name != backend))
    with mock.patch.object(dispatch, "usual_order", return_value=order):
        measurements.forget()
        try:
            yield
        finally:
            measurements.forget()


def served(call: Call) -> dict[str, dict[str, int]]:
    """How many calls of each op each backend serves in a call of a model."""
    dispatch.reset_dispatch_report()
    call()
    found: dict[str, dict[str, int]] = {}
    for (op, name), count in sorted(dispatch.calls_by_backend().items()):
        found.setdefault(op, {})[name] = count
    return found


def measure(
    name: str,
    model: Model,
    dtype: torch.dtype,
    rounds: int,
    against: Collection[str] = BASELINES,
    trace: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """The model's row, first without what has to be compiled, then again with each compiled form.

    Args:
        name: the model's.
        model: how it is made and called.
        dtype: of the float model and of what lies between quantized layers.
        rounds: timed calls of each form.
        against: those of `BASELINES` to measure; "eager_fp16", which all ratios start from, always is.
        trace: where a trace of one replayed call is written, on a GPU.
    """
    on = device()
    torch.backends.cudnn.benchmark = True
    with torch.device("meta"):
        empty = model.make()
    float_model = materialize(empty, dtype, on)
    ours = quantized(float_model)
    inputs = model.inputs(on, dtype)
    on_gpu = on.type == "cuda"
    left_out = set(BASELINES) - set(against) - set(NEEDED)
    plain = plain_forms(float_model, ours, inputs, on_gpu)
    calls, notes = working({form: call for form, call in plain.items() if form not in left_out}, NEEDED)
    row = {
        "op": name,
        "dtype": str(dtype).removeprefix("torch."),
        "peak_bytes": {form: peak_bytes(calls[form]) for form in NEEDED},
        "weight_bytes": {"ldmq": weight_bytes(ours), "float": weight_bytes(float_model)},
        "weight_share_of_fp16": weight_bytes(ours) / (2 * sum(p.numel() for p in float_model.parameters())),
        "served": served(calls["ldmq_eager"]),
    }
    timed = _timed(row, calls, notes, rounds)
    yield timed
    if on_gpu:
        row["breakdown_ms"] = breakdown(calls.get("ldmq_graph", calls["ldmq_eager"]), trace)
        yield timed | {"breakdown_ms": row["breakdown_ms"]}
    more = compiled_forms(float_model, ours, inputs) if on_gpu else {}
    for form in [form for form in more if form not in left_out]:
        kept, failed = working({form: more[form]}, ())
        notes |= failed
        if kept:
            calls |= kept
            yield _timed(row, calls, notes, rounds)


def _timed(row: dict[str, Any], calls: Variants, notes: dict[str, str], rounds: int) -> dict[str, Any]:
    """The row with the milliseconds of the calls in turns, and the GPU's clock and power meanwhile."""
    with sampled() as state:
        ms = medians(calls, rounds)
    timed = row | {"ms": ms, "notes": dict(notes)} | state
    return timed | {"summary": summary(timed)}


def summary(row: dict[str, Any]) -> dict[str, float]:
    """What a results file says of a model in short."""
    name, ms = row["op"], row["ms"]
    key = name if name.startswith("vae") else f"unet_{name}"
    best = min((form for form in ms if form.startswith("ldmq") and form != LATE), key=lambda form: ms[form])
    found = {f"{key}/ms": ms[best], f"{key}/vs_eager_fp16": ms["eager_fp16"] / ms[best]}
    if "compiled_fp16" in ms:
        found[f"{key}/vs_compiled_fp16"] = ms["compiled_fp16"] / ms[best]
    if LATE in ms:
        found[f"{key}/early_launches"] = ms[LATE] / ms["ldmq_graph"]
    peaks, weights = row["peak_bytes"], row["weight_bytes"]
    if peaks["ldmq_eager"] is not None:
        share = (peaks["ldmq_eager"] + weights["ldmq"]) / (peaks["eager_fp16"] + weights["float"])
        found[f"{key}/peak_memory_share"] = share
    return found | {"weights/w8_share_of_fp16": row["weight_share_of_fp16"]}


def table(data: dict[str, Any]) -> str:
    """Milliseconds of one call in every form, for the pages."""
    row = data["rows"][0]
    lines = [[name, f"{value:.2f}"] for name, value in sorted(row["ms"].items(), key=lambda pair: pair[1])]
    words = f"one call, {row['dtype']}, random weights; weights {row['weight_share_of_fp16']:.2f}x of fp16"
    return f"**{row['op']}**, {words}\n\n" + markdown(["", "ms"], lines)


def text(row: dict[str, Any]) -> str:
    """A row as lines for a terminal."""
    lines = [f"{form:24} {value:9.3f} ms" for form, value in sorted(row["ms"].items(), key=lambda pair: pair[1])]
    lines += [f"  {part:22} {value:9.3f} ms" for part, value in (row.get("breakdown_ms") or {}).items()]
    lines += [f"{form} is left out: {why}" for form, why in row["notes"].items()]
    return "\n".join([*lines, *(f"{key}: {value:.4g}" for key, value in row["summary"].items())])
