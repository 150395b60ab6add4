"""The arguments of OpenAI's images API: honoured, ignored by rule, or refused with a reason."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ldmq_kernels.serving.errors import ApiError
from ldmq_kernels.serving.loading import Served
from ldmq_kernels.serving.settings import ServerSettings
from ldmq_kernels.serving.tasks import Key

IGNORED = ("user", "safety_identifier", "moderation", "style", "complexity", "input_fidelity")
MAX_SEED = 2**63 - 1
MAX_PROMPT = 32_000
EDIT_STRENGTH, MASK_STRENGTH = 0.8, 1.0
STEPS_OF_QUALITY = {"low": 0.5, "high": 2.0}  # of the usual steps; any other quality takes these

Prompt = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]


class Generation(BaseModel):
    """A request for pictures of a prompt."""

    model_config = ConfigDict(extra="forbid")

    prompt: Prompt
    background: Literal["auto", "opaque", "transparent"] | None = None
    complexity: Any = None
    frame_count: Any = None
    frame_duration_ms: Any = None
    input_fidelity: Any = None
    model: str | None = None
    moderation: Any = None
    n: Annotated[int, Field(ge=1, le=10)] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    output_format: Literal["png", "jpeg", "webp", "gif", "svg"] | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    safety_identifier: Any = None
    size: str | None = None
    stream: bool | None = None
    style: Any = None
    svg: Any = None
    user: Any = None
    seed: Seed | list[Seed] | None = None
    negative_prompt: Annotated[str, Field(max_length=MAX_PROMPT)] | None = None
    num_inference_steps: Annotated[int, Field(ge=1)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    clip_skip: Annotated[int, Field(ge=0, le=8)] | None = None
    lora: str | dict[str, float] | None = None


class Edit(Generation):
    """A request for pictures made from a picture."""

    strength: Annotated[float, Field(gt=0, le=1)] | None = None


@dataclass(frozen=True)
class Asked:
    """What a request comes to, beside its pictures in and out."""

    key: Key
    prompt: str
    negative: str
    seeds: tuple[int, ...]
    output_format: str
    compression: int
    by_url: bool
    stream: bool
    partials: int


def read_arguments(kind: type[Generation], given: dict[str, Any], settings: ServerSettings) -> Generation:
    """Arguments of the right types and within their bounds.

    Raises:
        ApiError: 400, with the argument that is wrong.
    """
    if settings.allow_unknown:
        given = {name: value for name, value in given.items() if name in kind.model_fields}
    try:
        asked = kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = ".".join(str(place) for place in first["loc"][:1]) or None
        known = f"; known are {', '.join(kind.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise ApiError(400, f"{_shown(param or 'the body')}: {first['msg']}{known}", _shown(param)) from None
    for name in ("prompt", "negative_prompt"):
        text = getattr(asked, name)
        if text is not None and not _is_text(text):
            raise ApiError(400, f"{name} holds half a character (a lone surrogate)", name)
    if not asked.prompt.strip():
        raise ApiError(400, "prompt is blank", "prompt")
    if asked.background == "transparent":
        raise ApiError(400, "background: pictures are opaque here, give opaque or auto", "background")
    if asked.output_format in ("gif", "svg"):
        raise ApiError(400, "output_format: png, jpeg and webp are written here", "output_format")
    for name in ("frame_count", "frame_duration_ms", "svg"):
        if getattr(asked, name) is not None:
            raise ApiError(400, f"{name}: single pictures are drawn here", name)
    return asked


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(name: str | None) -> str | None:
    return None if name is None else name[:80].encode("ascii", "backslashreplace").decode()


def size_of(asked: Generation, served: Served, settings: ServerSettings, usual: tuple[int, int]) -> tuple[int, int]:
    """Width and height.

    Raises:
        ApiError: 400, with what is accepted.
    """
    width, height = usual
    if asked.size not in (None, "auto"):
        found = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", str(asked.size))
        if found is None:
            raise ApiError(400, "size: give auto or WIDTHxHEIGHT such as 512x512", "size")
        width, height = int(found[1]), int(found[2])
    multiple, most = served.multiple, settings.limits.max_pixels
    if width % multiple or height % multiple or not width or not height:
        raise ApiError(400, f"size {width}x{height}: width and height must be multiples of {multiple}", "size")
    if width * height > most:
        raise ApiError(400, f"size {width}x{height}: {width * height} pixels, {most} at most (--max-pixels)", "size")
    return width, height


def _seeds(asked: Generation) -> tuple[int, ...]:
    count = asked.n or 1
    if isinstance(asked.seed, list):
        if len(asked.seed) != count:
            raise ApiError(400, f"seed has {len(asked.seed)} numbers for n = {count} pictures", "seed")
        return tuple(asked.seed)
    first = secrets.randbelow(2**32) if asked.seed is None else asked.seed
    if first + count - 1 > MAX_SEED:
        raise ApiError(400, f"seed: picture i has seed + i, at most {MAX_SEED}", "seed")
    return tuple(range(first, first + count))


def _lora(asked: Generation, served: Served, settings: ServerSettings) -> tuple[str, float] | None:
    if asked.lora is None:
        return None
    name, scale = (asked.lora, 1.0) if isinstance(asked.lora, str) else next(iter(asked.lora.items()), ("", 1.0))
    several = isinstance(asked.lora, dict) and len(asked.lora) != 1
    if several or name not in settings.loras or served.name != settings.models[0].name or not abs(scale) <= 100:
        there = ", ".join(settings.loras) or "none"
        raise ApiError(
            400,
            f"lora: give one name, or one name and its scale, of those that {settings.models[0].name} has: {there}",
            "lora",
        )
    return name, scale


def resolve(
    asked: Generation, served: Served, settings: ServerSettings, kind: str = "text", usual: tuple[int, int] = (0, 0)
) -> Asked:
    """What a request comes to for a model.

    Args:
        kind: "text", "image" or "mask".
        usual: width and height where none are given; the model's own if 0.

    Raises:
        ApiError: 400, with the argument that cannot be honoured.
    """
    width, height = size_of(asked, served, settings, usual if usual[0] else (served.width, served.height))
    steps = asked.num_inference_steps or max(1, round(served.steps * STEPS_OF_QUALITY.get(asked.quality or "", 1.0)))
    if steps > settings.limits.max_steps:
        limit = settings.limits.max_steps
        raise ApiError(400, f"num_inference_steps: {steps}, {limit} at most (--max-steps)", "num_inference_steps")
    strength = None
    if kind != "text":
        given = getattr(asked, "strength", None)
        strength = given or (EDIT_STRENGTH if kind == "image" else MASK_STRENGTH)
        if int(steps * strength) < 1:
            raise ApiError(400, f"strength {strength} of {steps} steps leaves none to draw: give more", "strength")
    for name in ("negative_prompt", "clip_skip"):
        if getattr(asked, name) is not None and name not in served.arguments:
            raise ApiError(400, f"{name}: {served.about['pipeline']} takes none", name)
    key = Key(
        served.name,
        kind,
        width,
        height,
        steps,
        served.guidance if asked.guidance_scale is None else asked.guidance_scale,
        asked.negative_prompt is not None,
        strength,
        asked.clip_skip,
        _lora(asked, served, settings),
    )
    if asked.stream and (asked.n or 1) > 1:
        raise ApiError(400, "stream: one picture is streamed, n must be 1", "n")
    if asked.stream and asked.response_format == "url":
        raise ApiError(400, "response_format: streamed pictures come as b64_json", "response_format")
    compression = 90 if asked.output_compression is None else asked.output_compression
    return Asked(
        key,
        asked.prompt,
        asked.negative_prompt or "",
        _seeds(asked),
        asked.output_format or "png",
        compression,
        asked.response_format == "url",
        bool(asked.stream),
        asked.partial_images or 0,
    )
