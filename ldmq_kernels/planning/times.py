"""How long each layer takes in each scheme on this device: measured on its real shapes, and kept in a file.

Layers of equal shapes are measured once. The file lies beside the tuner's measurements and belongs to one device,
one version of this package and of torch, and one number of threads; with other ones it starts anew.
"""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldmq_kernels.calibration.trajectory import UNetCall
from ldmq_kernels.files import read_json, write_whole
from ldmq_kernels.kernels import measurements
from ldmq_kernels.kernels.gpu import cache_folder
from ldmq_kernels.nn.kinds import FloatLayer, kind_of
from ldmq_kernels.numerics.formats import FLOAT
from ldmq_kernels.planning.knapsack import Option
from ldmq_kernels.plans.layers import layer_input, layer_shape, quantizable_layers
from ldmq_kernels.plans.plan import LayerPlan, PlanError
from ldmq_kernels.progress import track
from ldmq_kernels.sensitivity.analysis import Analysis, quantized_as
from ldmq_kernels.timing import Clock, interleaved, one_call_ms
from ldmq_kernels.version import __version__

ROUNDS = 5
WARM_UP = 2


@dataclass(frozen=True)
class LayerTimes:
    """Milliseconds of one UNet call for one picture, guidance's two halves together.

    Attributes:
        layers: (layer, scheme) -> milliseconds of the layer, "fp16" standing for the float model's dtype.
        rest: milliseconds of all that is beside the linears and convolutions.
        predicted_for: the device that all of this was predicted for; empty where it was measured.
    """

    layers: dict[tuple[str, str], float]
    rest: float
    predicted_for: str = ""

    def of(self, options: Sequence[Option]) -> list[Option]:
        """The options with their times.

        Raises:
            PlanError: one of them was not measured.
        """
        for option in options:
            if (option.layer, option.scheme) not in self.layers:
                raise PlanError(
                    f"{option.layer}: no time was measured in {option.scheme}: measure the layers' times again with "
                    "these formats"
                )
        return [replace(o, milliseconds=self.layers[o.layer, o.scheme]) for o in options]

    def recorded(self, milliseconds: float) -> dict[str, Any]:
        """What a plan says of the time of a call whose layers take so long: what is predicted is called so."""
        prefix = "predicted_" if self.predicted_for else ""
        found = {
            f"{prefix}milliseconds": round(self.rest + milliseconds, 4),
            f"{prefix}milliseconds_float": round(self.all_float, 4),
        }
        return found | ({"predicted_for": self.predicted_for} if self.predicted_for else {})

    @property
    def all_float(self) -> float:
        """Milliseconds of a call of the float model."""
        return self.rest + sum(taken for (_, scheme), taken in self.layers.items() if scheme == str(FLOAT))


@dataclass(frozen=True)
class _Input:
    """The kind of a layer's input: enough to make another one of the same kind."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool

    @classmethod
    def of(cls, x: Tensor) -> _Input:
        is_image = x.dim() == 4 and not x.is_contiguous()
        return cls(tuple(x.shape), x.dtype, is_image and x.is_contiguous(memory_format=torch.channels_last))

    def make(self, device: torch.device) -> Tensor:
        x = torch.randn(self.shape, dtype=torch.float32, device=device).to(self.dtype)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def __str__(self) -> str:
        layout = " channels_last" if self.channels_last else ""
        return f"{'x'.join(map(str, self.shape))} {str(self.dtype).removeprefix('torch.')}{layout}"


def _inputs(model: nn.Module, call: UNetCall) -> dict[str, _Input]:
    """The kind of input that each layer gets in a call, of those that run."""
    inputs: dict[str, _Input] = {}

    def note(name: str) -> Any:
        def observe(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs.setdefault(name, _Input.of(layer_input(args, kwargs)))

        return observe

    layers = quantizable_layers(model)
    handles = [layer.register_forward_pre_hook(note(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        call.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _key(layer: FloatLayer, given: _Input, layer_plan: LayerPlan) -> str:
    """All that a layer's time depends on, in words."""
    words = [kind_of(layer), str(given), "to", "x".join(map(str, layer_shape(layer)))]
    if not isinstance(layer, nn.Linear):
        words.append(f"stride {layer.stride} padding {layer.padding} dilation {layer.dilation}")
    words.append(str(layer_plan.scheme))
    details = {"smoothed": layer_plan.smoothing is not None, "first token": layer_plan.first_token}
    words += [name for name, value in details.items() if value]
    return " ".join(words)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.node()} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _head(device: torch.device) -> dict[str, Any]:
    """The device and versions that make times comparable."""
    head: dict[str, Any] = {"device": _device_name(device), "package": __version__, "torch": torch.__version__}
    if device.type != "cuda":
        return {**head, "threads": torch.get_num_threads()}
    measured = measurements.fingerprint(device)
    if not measured:
        raise PlanError(
            f"no kernel was measured on this {_device_name(device)}, so times would be those of estimated tiles: run "
            "`ldmq bench --tune` once, then plan again"
        )
    return {**head, "kernels": measured}


def cache_file(device: torch.device) -> Path | None:
    """The file that keeps this user's layer times of a device; None for a user without a home."""
    name = re.sub(r"[^a-z0-9]+", "-", _device_name(device).lower()).strip("-")
    try:
        return cache_folder() / f"layer-times-{name}.json"
    except FileNotFoundError:
        return None


def _earlier(path: Path | None, head: dict[str, Any]) -> dict[str, float]:
    """Times in the file, if they are of the same device and versions; a damaged file is written anew."""
    if path is None:
        return {}
    try:
        content = read_json(path)
        known = content["milliseconds"] if content["head"] == head else {}
        times = {str(key): float(value) for key, value in known.items()}
        return times if all(0 <= value < math.inf for value in times.values()) else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _keep(path: Path | None, head: dict[str, Any], known: dict[str, float]) -> None:
    """Keep the times for later runs; the plan, whose analysis may be hours of work, does without where that fails."""
    if path is None:
        return
    try:
        write_whole(path, (json.dumps({"head": head, "milliseconds": known}, indent=1) + "\n").encode())
    except OSError as error:
        measurements.warn_once(f"the layers' times are not kept for later runs: {error}")


def _best(works: Sequence[Callable[[], Any]], device: torch.device, timer: Clock) -> list[float]:
    """Least milliseconds of each, taken in turns."""
    samples = interleaved(dict(enumerate(works)), device, rounds=ROUNDS, warm_up=WARM_UP, clock=timer)
    return [taken.least for taken in samples.values()]


@torch.inference_mode()
def measure_times(
    model: nn.Module,
    analysis: Analysis,
    call: UNetCall,
    *,
    path: Path | None,
    timer: Clock = one_call_ms,
    show: bool = False,
) -> LayerTimes:
    """Time every layer alone on this device, as it is in float and in each of its candidates.

    Fused blocks, where neighbouring layers share work, are not part of it: what they save comes on top.

    Args:
        model: the float model, on the device that it will run on.
        call: a recorded call for one picture.
        path: the file that keeps what was measured; None for none.
        timer: milliseconds of a work on a device.

    Raises:
        PlanError: on a GPU whose kernels were not tuned.
    """
    device = call.output.device
    head = _head(device)
    known = _earlier(path, head)
    layers, inputs = quantizable_layers(model), _inputs(model, call)
    keys: dict[tuple[str, str], str] = {}
    planned = set(known)
    todo: dict[str, list[tuple[str, str]]] = {}
    for name, given in inputs.items():
        candidates = analysis.candidates.get(name, [])
        for layer_plan in [LayerPlan(FLOAT), *(candidate.layer_plan for candidate in candidates)]:
            keys[name, str(layer_plan.scheme)] = key = _key(layers[name], given, layer_plan)
            if key not in planned:
                planned.add(key)
                todo.setdefault(name, []).append((str(layer_plan.scheme), key))
    for name, group in track(list(todo.items()), "time of each layer", len(todo), show=show):
        x = inputs[name].make(device)
        works = [_work(analysis, name, layers[name], scheme, x) for scheme, _ in group]
        taken = _best(works, device, timer)
        known |= {key: round(ms, 6) for (_, key), ms in zip(group, taken, strict=True)}
        _keep(path, head, known)
    whole = _best([lambda: call.run(model)], device, timer)[0]
    times = {key: known[text] for key, text in keys.items()}
    in_layers = sum(taken for (_, scheme), taken in times.items() if scheme == str(FLOAT))
    return LayerTimes(times, max(0.0, whole - in_layers))


def _work(analysis: Analysis, name: str, layer: FloatLayer, scheme: str, x: Tensor) -> Callable[[], Any]:
    candidate = None if scheme == str(FLOAT) else analysis.candidate(name, scheme)
    module = layer if candidate is None else quantized_as(name, layer, candidate)
    return lambda: module(x)
