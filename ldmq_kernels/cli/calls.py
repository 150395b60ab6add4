"""`--calls FILE`: calls of a pipeline as JSON Lines, pictures by their paths."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from ldmq_kernels.calibration.drawings import Call, check_arguments, parameters_of
from ldmq_kernels.cli.models import pipeline_class, read_prompts
from ldmq_kernels.files import parse_json, printable

PICTURE_NAMES = ("image", "images", "mask", "video")  # how arguments end that pipelines annotate with nothing


def drawn(model: Path, prompts: Path | None, calls: Path | None) -> tuple[Call, ...]:
    """The prompts, or the calls, of the file that was given.

    Raises:
        typer.BadParameter: neither or both were given.
        ValueError: the file does not hold what it should.
    """
    if (prompts is None) == (calls is None):
        raise typer.BadParameter("give --prompts FILE with one prompt a line, or --calls FILE with one call a line")
    if prompts is not None:
        return tuple(read_prompts(prompts))
    assert calls is not None
    return tuple(read_calls(calls, pipeline_class(model)))


def read_calls(path: Path, pipeline: Any) -> list[dict[str, Any]]:
    """The calls of a JSON Lines file: an object a line, with arguments of the pipeline's own call.

    Arguments that take pictures have the path of a file, absolute or from the folder of `path`, or a list of them.

    Args:
        pipeline: a pipeline, or its class.

    Raises:
        ValueError: there is no such file, it is not text, or it holds no call; or a line is no JSON object, has an
            argument that the pipeline does not know, lacks one, or names a picture that cannot be read.
    """
    objects = json_lines(path, "call", '{"prompt": "a cat"}')
    return [_call(call, where, path.parent, pipeline) for where, call in objects]


def json_lines(path: Path, what: str, example: str) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a JSON Lines file, each with the words for its place.

    Args:
        what: the file holds, in the singular.
        example: of an object, for errors.

    Raises:
        ValueError: there is no such file, it is not text, it is empty, or a line is no JSON object.
    """
    shown = printable(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"there is no file of {what}s {shown}: write one JSON object a line into it") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise ValueError(f"{shown} is not a text file in UTF-8: it must hold one JSON object a line") from None
    lines = [(f"{shown}, line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{shown} holds no {what}: write one JSON object a line into it, such as {example}")
    return [(where, _object(line, where, example)) for where, line in lines]


def _object(line: str, where: str, example: str) -> dict[str, Any]:
    value = parse_json(line, where, "a JSON object")
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not a JSON object of arguments, such as {example}")
    return value


def _call(call: dict[str, Any], where: str, folder: Path, pipeline: Any) -> dict[str, Any]:
    check_arguments(pipeline, call, where)
    parameters = parameters_of(pipeline) or {}
    return {
        name: _with_pictures(value, f"{where}, {name}", folder) if _takes_pictures(name, parameters) else value
        for name, value in call.items()
    }


def _takes_pictures(name: str, parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Whether an argument is a picture, by its annotation or its name: a text there is a path."""
    annotation = parameters[name].annotation if name in parameters else ""
    is_annotated = "PIL" in str(annotation) or "PipelineImageInput" in str(annotation)
    return is_annotated or name.rsplit("_", 1)[-1] in PICTURE_NAMES


def _with_pictures(value: Any, where: str, folder: Path) -> Any:
    if isinstance(value, list):
        return [_with_pictures(part, f"{where}[{index}]", folder) for index, part in enumerate(value)]
    if not isinstance(value, str):
        return value
    from PIL import Image

    path = folder / Path(value).expanduser()
    try:
        with Image.open(path) as picture:
            return picture.convert("L" if picture.mode in ("1", "L") else "RGB")
    except FileNotFoundError:
        raise ValueError(f"{where}: there is no picture {printable(path)}") from None
    except (OSError, ValueError, RuntimeError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where}: {printable(path)} cannot be read as a picture: {error}") from None
