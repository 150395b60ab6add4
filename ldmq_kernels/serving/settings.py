"""What a server is told: its models and its limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

FORBID_UNKNOWN = {"extra": "forbid"}  # for pydantic, which reads these from a cluster's configuration


@dataclass(frozen=True)
class ServedModel:
    """A diffusers directory and the name that requests call it by.

    Attributes:
        may_be_float: serve it although none of its layers is quantized.
    """

    __pydantic_config__ = FORBID_UNKNOWN

    folder: Path
    name: str
    may_be_float: bool = False


@dataclass(frozen=True)
class Limits:
    """What a server takes, and how long it waits.

    Attributes:
        max_batch: pictures drawn in one call of a pipeline.
        batch_wait_s: seconds in which no other request of a kind comes, after which those that came are drawn.
        max_pixels: of one picture.
        max_steps: of one picture.
        max_waiting: pixels x steps of all pictures that wait.
        deadline_s: seconds from a request's arrival to its answer.
        body_s: seconds in which a request's body must have come.
        max_json: bytes of a body in JSON.
        max_form: bytes of a body with pictures.
        max_kept: bytes of pictures kept for answers by URL.
        kept_s: seconds that they are kept.
    """

    __pydantic_config__ = FORBID_UNKNOWN

    max_batch: int = 8
    batch_wait_s: float = 0.005
    max_pixels: int = 1024 * 1024
    max_steps: int = 200
    max_waiting: float = 32 * 1024 * 1024 * 30.0
    deadline_s: float = 600.0
    body_s: float = 30.0
    max_json: int = 2**20
    max_form: int = 32 * 2**20
    max_kept: int = 256 * 2**20
    kept_s: float = 3600.0


@dataclass(frozen=True)
class ServerSettings:
    """All that `make_app` needs.

    Attributes:
        models: the first is drawn by requests that name none.
        devices: a lane of work for each, with its own copy of the models; all GPUs, or the processor, if none is named.
        dtype: in which the models are loaded.
        variant: of the weights that are loaded, in the folders that have it.
        steps, guidance: of requests that give none; a pipeline's own if None.
        api_keys: one of which a request must bear; none are needed where there are none.
        loras: name and place of adapters, loaded into the first model.
        allow_unknown: ignore arguments that are not known.
    """

    __pydantic_config__ = FORBID_UNKNOWN

    models: Sequence[ServedModel]
    devices: Sequence[str] = ()
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    steps: int | None = None
    guidance: float | None = None
    api_keys: Sequence[str] = ()
    loras: Mapping[str, Path] = field(default_factory=dict)
    allow_unknown: bool = False
    limits: Limits = field(default_factory=Limits)
    variant: str | None = None
