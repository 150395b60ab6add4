"""The plan: which precision each layer of a UNet gets, as a JSON file that a person can read and edit.

    {
      "ldmq_plan": 1,
      "model": {"class": "UNet2DConditionModel", "layers": 93, "fingerprint": "..."},
      "calibration": {...}, "target": {...}, "measured": {...},
      "rules": [{"pattern": "*", "scheme": "w8a8-static"}],
      "exceptions": {"conv_in": {"scheme": "fp16", "reason": "..."}},
      "input_scales": {"conv_in": 0.0231, ...},
      "smoothing": {"mid_block.attentions.0...": "<base64 of float32>"}
    }

The last rule whose pattern (fnmatch) fits a layer's name holds for it; an exception beats all rules.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import torch
from torch import Tensor, nn

from ldmq_kernels.files import write_whole
from ldmq_kernels.numerics.formats import FLOAT, SCHEMES, Scheme

VERSION = 1


class PlanError(ValueError):
    """A plan that is damaged, or does not fit the model."""


@dataclass(frozen=True)
class LayerPlan:
    """What one layer becomes. `input_scale` is a float, `smoothing` the (C,) float32 reciprocal vector."""

    scheme: Scheme
    reason: str = ""
    input_scale: float | None = None
    smoothing: Tensor | None = None


def quantizable_layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Every linear and every 2-D convolution of a model by name, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def kind_of(layer: nn.Module) -> str:
    """ "linear" or "conv2d"."""
    return "linear" if isinstance(layer, nn.Linear) else "conv2d"


def layer_shape(layer: nn.Linear | nn.Conv2d) -> tuple[int, ...]:
    """Shape of the float weight, whatever the layer holds now."""
    if isinstance(layer, nn.Linear):
        return (layer.out_features, layer.in_features)
    return (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)


def fingerprint(model: nn.Module) -> str:
    """Hash of the names, kinds and shapes of all quantizable layers; the same before and after quantization."""
    lines = [f"{name} {kind_of(m)} {layer_shape(m)}" for name, m in quantizable_layers(model).items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@dataclass
class Plan:
    """A precision for each layer, where it came from and what was measured. See the module's text."""

    model: dict[str, Any]
    rules: list[dict[str, str]]
    exceptions: dict[str, dict[str, str]] = field(default_factory=dict)
    input_scales: dict[str, float] = field(default_factory=dict)
    smoothing: dict[str, Tensor] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    target: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)

    # -- what it says --------------------------------------------------------------------------------

    def layer(self, name: str) -> LayerPlan:
        """What the layer of this name becomes."""
        scheme, reason = str(FLOAT), "no rule"
        for rule in self.rules:
            if fnmatchcase(name, rule["pattern"]):
                scheme, reason = rule["scheme"], f"rule {rule['pattern']}"
        if name in self.exceptions:
            scheme, reason = self.exceptions[name]["scheme"], self.exceptions[name].get("reason", "exception")
        return LayerPlan(SCHEMES[scheme], reason, self.input_scales.get(name), self.smoothing.get(name))

    def layers(self, model: nn.Module) -> dict[str, LayerPlan]:
        """What each quantizable layer of the model becomes, after checking that the plan fits it.

        Raises:
            PlanError: the plan was made for another model, names layers that are not there, gives a
                layer a scheme that its kind does not have, or lacks a scale that a static scheme needs.
        """
        found = quantizable_layers(model)
        if self.model["fingerprint"] != fingerprint(model):
            raise PlanError(
                f"this plan is for a {self.model['class']} with {self.model['layers']} layers (fingerprint "
                f"{self.model['fingerprint']}), the model is a {type(model).__name__} with {len(found)} "
                f"({fingerprint(model)}): make a plan for this model with `ldmq plan`"
            )
        for group in (self.exceptions, self.input_scales, self.smoothing):
            for name in group:
                if name not in found:
                    raise PlanError(f"the plan names a layer {name!r} that the model does not have: remove it")
        chosen = {name: self.layer(name) for name in found}
        for name, choice in chosen.items():
            kind = kind_of(found[name])
            if kind not in choice.scheme.format.layers:
                accepted = ", ".join(n for n, s in SCHEMES.items() if kind in s.format.layers)
                raise PlanError(f"{name}: there is no {choice.scheme} for a {kind}: choose one of {accepted}")
            if choice.scheme.is_static and choice.input_scale is None:
                raise PlanError(
                    f"{name}: {choice.scheme} needs an entry in input_scales, which only a calibration gives: "
                    "plan again, or choose the dynamic scheme"
                )
            channels = layer_shape(found[name])[1]
            if choice.smoothing is not None and choice.smoothing.shape != (channels,):
                raise PlanError(
                    f"{name}: smoothing has {choice.smoothing.numel()} values, the layer {channels} channels"
                )
        return chosen

    # -- file ----------------------------------------------------------------------------------------

    def to_dict(self, *, with_smoothing: bool = True) -> dict[str, Any]:
        """The JSON object; `with_smoothing=False` leaves out what a checkpoint's tensors hold anyway."""
        plan = {
            "ldmq_plan": VERSION,
            "model": self.model,
            "calibration": self.calibration,
            "target": self.target,
            "measured": self.measured,
            "rules": self.rules,
            "exceptions": self.exceptions,
            "input_scales": self.input_scales,
            "smoothing": {
                name: base64.b64encode(vector.cpu().numpy().astype("<f4").tobytes()).decode() if with_smoothing else ""
                for name, vector in self.smoothing.items()
            },
        }
        return plan

    @classmethod
    def from_dict(cls, data: Any, source: str = "plan") -> Plan:
        """Check against the schema and build.

        Raises:
            PlanError: not a plan, of a newer version, or with a value that the schema does not accept.
        """
        if not isinstance(data, dict) or "ldmq_plan" not in data:
            raise PlanError(f"{source} is not an ldmq plan: it has no 'ldmq_plan' entry")
        version = data["ldmq_plan"]
        if isinstance(version, int) and version > VERSION:
            raise PlanError(
                f"{source} has plan version {version}, this package reads up to {VERSION}: upgrade ldmq_kernels"
            )
        schema = json.loads(resources.files("ldmq_kernels.planning").joinpath("plan.schema.json").read_text())
        errors = sorted(jsonschema.Draft202012Validator(schema).iter_errors(data), key=lambda e: e.json_path)
        if errors:
            raise PlanError(f"{source}, at {errors[0].json_path}: {errors[0].message}")
        for name, scale in data["input_scales"].items():
            if not (math.isfinite(scale) and scale > 0):
                raise PlanError(f"{source}: the input scale of {name} is {scale}, it must be positive and finite")
        fields = {key: value for key, value in data.items() if key not in ("ldmq_plan", "smoothing")}
        smoothing = {name: _decode(text, name, source) for name, text in data["smoothing"].items()}
        return cls(**fields, smoothing=smoothing)

    def save(self, path: str | Path) -> None:
        """Write the plan, whole or not at all."""
        write_whole(Path(path), (json.dumps(self.to_dict(), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file.

        Raises:
            PlanError: there is no such file, or it does not hold a plan.
        """
        path = Path(path)
        try:
            data = json.loads(path.read_text())
        except FileNotFoundError:
            raise PlanError(f"there is no plan file {path}: make one with `ldmq plan`") from None
        except (json.JSONDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
            raise PlanError(f"{path} is not a JSON file: {error}") from None
        return cls.from_dict(data, str(path))


def _decode(text: str, name: str, source: str) -> Tensor:
    try:
        values = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4")
    except ValueError as error:
        raise PlanError(f"{source}: the smoothing of {name} is not base64 of float32: {error}") from None
    vector = torch.from_numpy(values.astype(np.float32))
    if not bool((torch.isfinite(vector) & (vector > 0)).all()):
        raise PlanError(f"{source}: the smoothing of {name} holds values that are not positive and finite")
    return vector


def model_record(model: nn.Module) -> dict[str, Any]:
    """How a plan names its model."""
    return {
        "class": type(model).__name__,
        "layers": len(quantizable_layers(model)),
        "fingerprint": fingerprint(model),
    }


def uniform_plan(model: nn.Module, scheme: str) -> Plan:
    """Every layer that has it in one scheme, the others in float; for schemes that need no calibration.

    Raises:
        PlanError: the scheme is unknown or static.
    """
    if scheme not in SCHEMES or SCHEMES[scheme].is_static:
        accepted = ", ".join(n for n, s in SCHEMES.items() if not s.is_static)
        raise PlanError(f"a uniform plan without calibration takes one of {accepted}, not {scheme!r}")
    exceptions = {
        name: {"scheme": str(FLOAT), "reason": f"no {scheme} for a {kind_of(m)}"}
        for name, m in quantizable_layers(model).items()
        if kind_of(m) not in SCHEMES[scheme].format.layers
    }
    return Plan(model_record(model), [{"pattern": "*", "scheme": scheme}], exceptions)
