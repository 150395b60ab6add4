"""The plan: which precision each layer of a UNet gets, as a JSON file that a person can read and edit.

    {
      "ldmq_plan": 3,
      "model": {"class": "UNet2DConditionModel", "layers": 93, "fingerprint": "...", "weights": {...}},
      "calibration": {"texts": ["a prompt", ...], ...}, "target": {...}, "measured": {...},
      "rules": [{"pattern": "*", "scheme": "w8a8-static"}],
      "exceptions": {"conv_in": {"scheme": "fp16", "reason": "..."}},
      "timestep_groups": [750.0, 400.0],
      "input_scales": {"conv_in": 0.0231, "conv_out": [0.041, 0.033, 0.029], ...},
      "smoothing": {"mid_block.attentions.0...": "<base64 of float32>"},
      "bias_correction": {"down_blocks.0...": "<base64 of float32>"},
      "details": {"mid_block...to_k": {"first_token": true, "rounding": "gptq"}}
    }

The last rule whose pattern (fnmatch) fits a layer's name holds for it; an exception beats all rules. `timestep_groups`
are timesteps, descending: a call belongs to the group of as many boundaries as are above its timestep.

A checkpoint has the plan's vectors among its tensors: the plan in its config.json has "" in their place.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ldmq_kernels.files import output_file, printable
from ldmq_kernels.nn.kinds import FloatLayer, kind_of, own_computation
from ldmq_kernels.numerics.formats import FLOAT, SCHEMES, Scheme
from ldmq_kernels.plans.layers import FORMER_KINDS, fingerprint, layer_shape, quantizable_layers, refusal
from ldmq_kernels.plans.reading import (
    KIND,
    VERSION,
    PlanError,
    check_timestep_groups,
    encoded,
    fields_of,
    is_plan_file,
    read_plan_file,
)

ROUNDINGS = ("nearest", "gptq", "gptq-end")
DETAILS = ("first_token", "rounding")  # what an entry of `details` may say


@dataclass(frozen=True)
class LayerPlan:
    """What one layer becomes.

    Attributes:
        input_scale: of a static scheme; one for each timestep group of a timestep scheme.
        smoothing: (C,) float32, the inverse that inputs are multiplied with.
        first_token: whether the first token's row is computed from its 16-bit input.
        bias_correction: (out,) float32, added to the bias.
        rounding: of the weight, "nearest"; "gptq", by the layer's inputs in a calibration; or "gptq-end", by what its
            errors make of the end of the trajectory too.
    """

    scheme: Scheme
    reason: str = ""
    input_scale: float | tuple[float, ...] | None = None
    smoothing: Tensor | None = None
    first_token: bool = False
    bias_correction: Tensor | None = None
    rounding: str = "nearest"

    @property
    def needs_inputs(self) -> bool:
        """Whether the weight is rounded by the layer's inputs in a calibration."""
        return self.rounding != "nearest"

    @property
    def scales(self) -> tuple[float, ...]:
        """The input scales: none, the one, or one for each timestep group."""
        scale = self.input_scale
        return () if scale is None else scale if isinstance(scale, tuple) else (scale,)


# of a kind that had no schemes when the plan was made
OF_FORMER_PLAN = LayerPlan(FLOAT, "the plan is from before such convolutions had schemes: plan again to quantize it")


@dataclass
class Plan:
    """A precision for each layer, where it came from and what was measured. See the module's text.

    Attributes:
        smoothing: layer -> (C,) float32, or None in the plan of a checkpoint, which has the vector among its tensors.
        bias_correction: layer -> (out,) float32, or None alike.
    """

    model: dict[str, Any]
    rules: list[dict[str, str]]
    exceptions: dict[str, dict[str, str]] = field(default_factory=dict)
    input_scales: dict[str, float | list[float]] = field(default_factory=dict)
    smoothing: dict[str, Tensor | None] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    target: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    timestep_groups: list[float] = field(default_factory=list)
    bias_correction: dict[str, Tensor | None] = field(default_factory=dict)
    details: dict[str, dict[str, Any]] = field(default_factory=dict)

    # -- what it says --------------------------------------------------------------------------------

    def layer(self, name: str) -> LayerPlan:
        """What the layer of this name becomes."""
        scheme, reason = self._by_rule(name)
        if name in self.exceptions:
            scheme, reason = self.exceptions[name]["scheme"], self.exceptions[name].get("reason", "exception")
        scale = self.input_scales.get(name)
        return LayerPlan(
            SCHEMES[scheme],
            reason,
            tuple(scale) if isinstance(scale, list) else scale,
            self.smoothing.get(name),
            bias_correction=self.bias_correction.get(name),
            **self.details.get(name, {}),
        )

    def _by_rule(self, name: str) -> tuple[str, str]:
        for rule in reversed(self.rules):
            if fnmatchcase(name, rule["pattern"]):
                return rule["scheme"], f"rule {rule['pattern']}"
        return str(FLOAT), "no rule"

    def set(self, name: str, layer_plan: LayerPlan) -> None:
        """Write what one layer becomes in place of what was said of it: an exception only where no rule says it."""
        for entries in (self.exceptions, self.input_scales, self.smoothing, self.bias_correction, self.details):
            entries.pop(name, None)
        if self._by_rule(name)[0] != str(layer_plan.scheme):
            self.exceptions[name] = {"scheme": str(layer_plan.scheme), "reason": layer_plan.reason}
        scale = layer_plan.input_scale
        if scale is not None:
            self.input_scales[name] = list(scale) if isinstance(scale, tuple) else scale
        if layer_plan.smoothing is not None:
            self.smoothing[name] = layer_plan.smoothing.detach().cpu()
        if layer_plan.bias_correction is not None:
            self.bias_correction[name] = layer_plan.bias_correction.detach().cpu()
        plain = LayerPlan(layer_plan.scheme)
        details = {key: getattr(layer_plan, key) for key in DETAILS if getattr(layer_plan, key) != getattr(plain, key)}
        if details:
            self.details[name] = details

    @property
    def needs_inputs(self) -> bool:
        """Whether a layer's weight is rounded by GPTQ, which takes the layer's inputs in a calibration."""
        layers = [self.layer(name) for name, details in self.details.items() if "rounding" in details]
        return any(layer.needs_inputs and layer.scheme.quantizes for layer in layers)

    def with_gptq(self, model: nn.Module, *, end: bool = False) -> Plan:
        """The same plan with every weight that it quantizes rounded by GPTQ, but those of grouped convolutions.

        The search tries GPTQ for weights of 4 bits alone. With 8 bits it pays as well in what is drawn, and costs
        nothing when the model runs; applying the plan takes the inputs of every layer then, a run of the calibration.

        Args:
            end: round by what errors make of the end of the trajectory, the pictures or final latents: the errors of a
                rounded weight are alike from step to step, and add up there. Pictures keep more by it than by the
                layers' inputs alone. Applying the plan takes gradients through the pipeline.

        Raises:
            PlanError: the plan does not fit the model.
        """
        rounded = replace(self, details={name: dict(entry) for name, entry in self.details.items()})
        quantizable = quantizable_layers(model)
        for name, layer_plan in self.layers(model).items():
            if layer_plan.scheme.quantizes and getattr(quantizable[name], "groups", 1) == 1:
                rounded.details.setdefault(name, {})["rounding"] = "gptq-end" if end else "gptq"
        return rounded

    @property
    def has_vectors(self) -> bool:
        """Whether all vectors are here; those of a checkpoint's plan are among the checkpoint's tensors."""
        vectors = (*self.smoothing.values(), *self.bias_correction.values())
        return all(vector is not None for vector in vectors)

    def without_vectors(self) -> Plan:
        """The plan as a checkpoint has it: only the names of the layers with vectors, and no calibration texts."""
        return replace(
            self,
            smoothing=dict.fromkeys(self.smoothing),
            bias_correction=dict.fromkeys(self.bias_correction),
            calibration={key: value for key, value in self.calibration.items() if key != "texts"},
        )

    def layers(self, model: nn.Module, *, vectors_elsewhere: bool = False) -> dict[str, LayerPlan]:
        """What each quantizable layer of the model becomes, after checking that the plan fits it.

        Args:
            vectors_elsewhere: whether the caller has the vectors of a checkpoint's plan from the checkpoint.

        Raises:
            PlanError: the plan was made for another model, names layers that are not there, or gives a layer
                what it cannot have: a scheme, scales, vectors or details of another kind or size.
        """
        if not (self.has_vectors or vectors_elsewhere):
            raise PlanError(
                "this is the plan of a checkpoint, which has the plan's vectors among its tensors: load the "
                "checkpoint, or take the plan file that it was made by"
            )
        layers = quantizable_layers(model)
        known = layers
        if self.model["fingerprint"] != fingerprint(model):
            known = {name: layer for name, layer in layers.items() if kind_of(layer) in FORMER_KINDS}
        if self.model["fingerprint"] not in (fingerprint(model), fingerprint(model, FORMER_KINDS)):
            raise PlanError(
                f"this plan is for a {self.model['class']} with {self.model['layers']} layers (fingerprint "
                f"{self.model['fingerprint']}), the model is a {type(model).__name__} with {len(layers)} "
                f"({fingerprint(model)}): make a plan for this model with `ldmq plan`"
            )
        for group in (self.exceptions, self.input_scales, self.smoothing, self.bias_correction, self.details):
            for name in group:
                if name not in known:
                    raise PlanError(f"the plan names a layer {name!r} that the model does not have: remove it")
        check_timestep_groups(self.timestep_groups, "the plan")
        layer_plans = {name: self.layer(name) if name in known else OF_FORMER_PLAN for name in layers}
        for name, layer_plan in layer_plans.items():
            try:
                _check_layer_plan(layers[name], layer_plan, len(self.timestep_groups) + 1)
            except PlanError as error:
                raise PlanError(f"{name}: {error}") from None
        return layer_plans

    # -- file ----------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The plan as a JSON object."""
        return {
            "ldmq_plan": VERSION,
            "model": self.model,
            "calibration": self.calibration,
            "target": self.target,
            "measured": self.measured,
            "rules": self.rules,
            "exceptions": self.exceptions,
            "timestep_groups": self.timestep_groups,
            "input_scales": self.input_scales,
            "smoothing": {name: encoded(vector) for name, vector in self.smoothing.items()},
            "bias_correction": {name: encoded(vector) for name, vector in self.bias_correction.items()},
            "details": self.details,
        }

    @classmethod
    def from_dict(cls, data: Any, source: str = "plan") -> Plan:
        """Check against the schema and build.

        Raises:
            PlanError: not a plan, of a newer version, or with a value that is not accepted.
        """
        return cls(**fields_of(data, source))

    def to_bytes(self) -> bytes:
        """The content of a plan file."""
        return (json.dumps(self.to_dict(), indent=1) + "\n").encode()

    def save(self, path: str | Path) -> None:
        """Write the plan, whole or not at all; an older plan may be there, and is replaced.

        Raises:
            OSError: the place cannot be written, or holds something else than a plan.
        """
        with plan_output(path) as write:
            write(self)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file.

        Raises:
            PlanError: there is no such file, or it does not hold a plan.
        """
        path = Path(path).expanduser()
        return cls.from_dict(read_plan_file(path), printable(path))


@contextlib.contextmanager
def plan_output(path: str | Path) -> Iterator[Callable[[Plan], None]]:
    """Reserve the place of a plan file before the plan is made, and give the function that writes it.

    Raises:
        OSError: the place cannot be written, holds something else than a plan, or another run is writing to it.
        MisplacedError: from the function: the plan lies elsewhere, since the place turned bad.
    """
    with output_file(Path(path), is_plan_file, KIND) as write:
        yield lambda plan: write(plan.to_bytes())


def _check_layer_plan(layer: FloatLayer, layer_plan: LayerPlan, groups: int) -> None:
    """Refuse what a layer cannot become; `groups` is the number of timestep groups."""
    scheme, kind, (out, channels) = layer_plan.scheme, kind_of(layer), layer_shape(layer)[:2]
    if kind not in scheme.format.layers:
        accepted = ", ".join(n for n, s in SCHEMES.items() if kind in s.format.layers)
        raise PlanError(f"there is no {scheme} for a {kind}: choose one of {accepted}")
    if why_not := refusal(layer, scheme):
        raise PlanError(why_not)
    scale = layer_plan.input_scale
    if scheme.is_static and scale is None:
        raise PlanError(
            f"{scheme} needs an entry in input_scales, which only a calibration gives: "
            "plan again, or choose the dynamic scheme"
        )
    if scheme.has_timestep_scales and len(layer_plan.scales) != groups:
        raise PlanError(
            f"input_scales has {len(layer_plan.scales)} values, {scheme} takes one for each of the {groups} timestep "
            "groups: plan again, or choose the static or dynamic scheme"
        )
    if scheme.is_static and not scheme.has_timestep_scales and isinstance(scale, tuple):
        raise PlanError(f"input_scales has a list of {len(scale)} values, {scheme} takes one number: give its largest")
    for what, vector, size in (
        ("smoothing", layer_plan.smoothing, channels),
        ("bias_correction", layer_plan.bias_correction, out),
    ):
        if vector is not None and vector.shape != (size,):
            raise PlanError(f"{what} has {vector.numel()} values, the layer takes {size}: plan again, or remove it")
    if layer_plan.first_token and kind != "linear":
        raise PlanError(f"details has first_token, which only a linear has, this is a {kind}: remove it")
    if layer_plan.rounding not in ROUNDINGS:
        raise PlanError(f"details has rounding {layer_plan.rounding!r}: choose one of {', '.join(ROUNDINGS)}")
    if not scheme.quantizes and layer_plan.rounding != "nearest":
        raise PlanError(f"details has a rounding, but {scheme} has no quantized weight: remove the entry")


def model_record(model: nn.Module) -> dict[str, Any]:
    """How a plan names its model."""
    return {
        "class": type(model).__name__,
        "layers": len(quantizable_layers(model)),
        "fingerprint": fingerprint(model),
    }


def check_uniform(scheme: str) -> None:
    """Refuse a scheme that a model cannot have without a calibration.

    Raises:
        PlanError: the scheme is unknown or static.
    """
    accepted = ", ".join(name for name, s in SCHEMES.items() if not s.is_static)
    if scheme not in SCHEMES:
        raise PlanError(f"unknown scheme {scheme!r}: choose one of {accepted}")
    if SCHEMES[scheme].is_static:
        raise PlanError(
            f"{scheme} needs activation scales, which only a calibration gives: make a plan with `ldmq.plan` or "
            f"`ldmq plan` and give that, or choose one of {accepted}"
        )


def uniform_plan(model: nn.Module, scheme: str, leave: Sequence[str] = ()) -> Plan:
    """Every layer that can have it in one scheme, the others in float; for schemes that need no calibration.

    Args:
        leave: names of layers, or of modules that hold some, that stay in float: "proj_out", "blocks.0", "*.to_k".

    Raises:
        PlanError: the scheme is unknown or static, the model has no layer that could be quantized, or none of such a
            name.
    """
    check_uniform(scheme)
    if not quantizable_layers(model):
        raise PlanError(f"this {type(model).__name__} has no linear and no convolution: nothing of it can be quantized")
    reasons = {
        name: own_computation(layer) or refusal(layer, SCHEMES[scheme])
        for name, layer in quantizable_layers(model).items()
    }
    exceptions = {name: {"scheme": str(FLOAT), "reason": reason} for name, reason in reasons.items() if reason}
    for left in leave:
        names = [name for name in quantizable_layers(model) if _is_called(name, left)]
        if not names:
            raise PlanError(f"no layer of this {type(model).__name__} is called {left!r}, nor a module that holds some")
        exceptions |= {name: {"scheme": str(FLOAT), "reason": f"left out as {left}"} for name in names}
    return Plan(model_record(model), [{"pattern": "*", "scheme": scheme}], exceptions)


def _is_called(layer: str, name: str) -> bool:
    """Whether a name is that of a layer, of its end, or of what holds it; with * it is a pattern of the whole name."""
    return fnmatchcase(layer, name) if "*" in name else f".{name}." in f".{layer}."
