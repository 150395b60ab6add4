"""Reads the JSON of a plan: what it must hold, and the one error that says what is wrong and where."""

from __future__ import annotations

import base64
import itertools
import json
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldmq_kernels.extras import explained
from ldmq_kernels.files import NotJsonError, read_json, shortened
from ldmq_kernels.numerics.formats import SCHEMES
from ldmq_kernels.plans.former import in_current_words

VERSION = 3  # 1 and 2 are read too: 1 had no timestep groups, bias corrections and details; both had other words
KIND = "ldmq plan"
LEAST_SCALE, MOST_SCALE = 2.0**-126, 2.0**126  # float32 has them and their inverses
MOST_GROUPS = 1_000
_MOST_LETTERS = 1_000  # of an error, which may hold values and names of any length


class PlanError(ValueError):
    """A plan that is damaged, or does not fit the model."""

    def __init__(self, text: str) -> None:
        super().__init__(shortened(text, _MOST_LETTERS))


def read_plan_file(path: Path) -> Any:
    """The JSON value in a plan file.

    Raises:
        PlanError: there is no such file, or it holds no JSON.
    """
    try:
        return read_json(path)
    except FileNotFoundError:
        raise PlanError(f"there is no plan file {path}: make one with `ldmq plan`") from None
    except NotJsonError as error:
        raise PlanError(str(error)) from None


def is_plan_file(path: Path) -> bool:
    """Whether a file is a plan of any version, which a new plan may replace."""
    try:
        data = read_json(path)
    except (OSError, NotJsonError):
        return False
    return isinstance(data, dict) and "ldmq_plan" in data


def fields_of(data: Any, source: str) -> dict[str, Any]:
    """The fields of `Plan` from a JSON value, of this version or a former one, after all checks without a model.

    Raises:
        PlanError: not a plan, of a newer version, or with a value that is not accepted; `source` names the plan.
    """
    if not isinstance(data, dict) or "ldmq_plan" not in data:
        raise PlanError(f"{source} is not an ldmq plan: it has no 'ldmq_plan' entry")
    version = data["ldmq_plan"]
    if type(version) is int and version > VERSION:
        raise PlanError(
            f"{source} has plan version {version}, this package reads up to {VERSION}: upgrade ldmq_kernels"
        )
    data = _without_ranks(in_current_words(data), source)
    _check_schema(data, source)
    for name, scale in data["input_scales"].items():
        _check_scale(name, scale, source)
    check_timestep_groups(data.get("timestep_groups", []), source)
    vectors: dict[str, dict[str, Tensor | None]] = {"smoothing": {}, "bias_correction": {}}
    for key, decoded in vectors.items():
        for name, text in data.get(key, {}).items():
            decoded[name] = _decoded(text, f"{source}: the {key.replace('_', ' ')} of {name}")
    for name, vector in vectors["smoothing"].items():
        if vector is None:
            continue
        if not bool((vector > 0).all()):
            raise PlanError(f"{source}: the smoothing of {name} holds values that are not positive")
        if not LEAST_SCALE <= float(vector.min()) <= float(vector.max()) <= MOST_SCALE:
            raise PlanError(f"{source}: the smoothing of {name} holds values whose inverse is not finite")
    return {key: value for key, value in data.items() if key != "ldmq_plan"} | vectors


def _without_ranks(data: dict[str, Any], source: str) -> dict[str, Any]:
    """The plan without the detail "rank" of former versions, where it is 0: there were low-rank corrections once.

    Raises:
        PlanError: a layer has a rank that is not 0.
    """
    details = data.get("details")
    if not isinstance(details, dict):
        return data
    kept = {}
    for name, entry in details.items():
        if isinstance(entry, dict) and "rank" in entry:
            if type(entry["rank"]) is not int or entry["rank"] != 0:
                raise PlanError(
                    f"{source}: {name} has a low-rank correction (rank {shortened(entry['rank'])}), which this package "
                    "no longer computes: remove the rank from the plan's details, and give the layer a more precise "
                    "scheme if its noise matters"
                )
            entry = {key: value for key, value in entry.items() if key != "rank"}
        if entry != {}:
            kept[name] = entry
    return {**data, "details": kept}


def _schema() -> dict[str, Any]:
    """The schema of a plan file, with the schemes that are registered now."""
    schema = json.loads(resources.files("ldmq_kernels.plans").joinpath("plan.schema.json").read_text())
    schema["$defs"]["scheme"]["enum"] = list(SCHEMES)
    return schema


def _check_schema(data: dict[str, Any], source: str) -> None:
    """Refuse the first thing that is not as the schema has it."""
    with explained("reading a plan"):
        from jsonschema import Draft202012Validator, validators  # plans that are made in memory do without
    whole = Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
    error = next(validators.extend(Draft202012Validator, type_checker=whole)(_schema()).iter_errors(data), None)
    if error is not None:
        raise PlanError(f"{source}, at {shortened(error.json_path)}: {shortened(error.message, 400)}")


def _check_scale(name: str, scale: Any, source: str) -> None:
    values = scale if isinstance(scale, list) else [scale]
    if not 1 <= len(values) <= MOST_GROUPS:
        raise PlanError(f"{source}: {name} has {len(values)} input scales: give one, or one for each timestep group")
    for value in values:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and LEAST_SCALE <= value <= MOST_SCALE):
            raise PlanError(
                f"{source}: the input scale of {name} is {shortened(repr(value))}: it must be a positive number, "
                f"finite in float32 as its inverse is, from {LEAST_SCALE:.3g} to {MOST_SCALE:.3g}"
            )


def check_timestep_groups(boundaries: list[float], source: str) -> None:
    """Refuse boundaries between groups of timesteps that are not finite and descending.

    Raises:
        PlanError: they are not.
    """
    descending = all(later < earlier for earlier, later in itertools.pairwise(boundaries))
    if not (descending and all(-MOST_SCALE <= boundary <= MOST_SCALE for boundary in boundaries)):
        raise PlanError(
            f"{source} has the timestep groups {shortened(boundaries)}: timesteps must be finite and descending"
        )


def encoded(vector: Tensor | None) -> str:
    """A vector as a plan file has it; nothing for one that is among a checkpoint's tensors."""
    if vector is None:
        return ""
    return base64.b64encode(vector.cpu().numpy().astype("<f4").tobytes()).decode()


def _decoded(text: str, what: str) -> Tensor | None:
    if not text:
        return None
    try:
        values = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4")
    except ValueError as error:
        raise PlanError(f"{what} is not base64 of float32: {error}") from None
    vector = torch.from_numpy(values.astype(np.float32))
    if not bool(torch.isfinite(vector).all()):
        raise PlanError(f"{what} holds values that are not finite")
    return vector
