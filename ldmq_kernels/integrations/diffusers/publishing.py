"""Every save and upload of a quantized model has its card, and no path of this machine."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
import shutil
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any

import wrapt
from huggingface_hub import HfApi, ModelCard

from ldmq_kernels.files import printable, write_whole
from ldmq_kernels.integrations.diffusers.card import PICTURES, card_of, quantized_parts
from ldmq_kernels.integrations.diffusers.origin import (
    CARD,
    Origin,
    is_own,
    is_repo,
    leave_out_local_paths,
    license_in,
    origin_of,
    read_card,
)

logger = logging.getLogger(__name__)

Call = Callable[..., Any]

_users_card: ContextVar[ModelCard | None] = ContextVar("users_card", default=None)


def write_card(
    loaded: Any, folder: str | Path, *, base_model: str | None = None, pictures: bytes | None = None, name: str = ""
) -> None:
    """Write the card of a quantized pipeline or model, README.md, into the folder that it was saved to.

    `save_pretrained` of a pipeline does so too, with what the pipeline knows of its origin. On the Hub the card puts
    the model under "Quantizations" of its base model.

    Args:
        loaded: the pipeline, or the model alone.
        folder: where it was saved.
        base_model: the base model on the Hub, such as "stabilityai/stable-diffusion-2-1", where it was loaded from a
            local folder that does not tell.
        pictures: a PNG of float and quantized pictures for the card, written beside it.
        name: what the model will be loaded by; the folder's name if empty.

    Raises:
        FileExistsError: there is a README.md that somebody else wrote.
        ValueError: `base_model` is no name on the Hub, or nothing in `loaded` is quantized by this package.
    """
    folder = Path(folder)
    if base_model is not None and not is_repo(base_model):
        raise ValueError(f"base_model {base_model!r} is no name on the Hub: give it as owner/name")
    if not quantized_parts(loaded):
        raise ValueError(f"nothing of this {type(loaded).__name__} is quantized: call ldmq.quantize before")
    older = read_card(folder)
    if (older is None and (folder / CARD).exists()) or (older is not None and not is_own(older)):
        raise FileExistsError(
            f"{printable(folder / CARD)} is of somebody else, and is kept: move it away, or add the metadata by hand"
        )
    origin = origin_of(loaded)
    if base_model is not None:
        origin = dataclasses.replace(origin, repo=base_model, revision=None)
    if pictures is not None:
        write_whole(folder / PICTURES, pictures)
    _put_card(loaded, folder, name or folder.resolve().name, origin)


def _as_text(name: str) -> str:
    """A folder's name in characters that a text file can hold; bytes that are none become question marks."""
    return os.fsencode(name).decode(errors="replace")


def _put_card(loaded: Any, folder: Path, name: str, origin: Origin) -> None:
    """Write the card, with the pictures that lie in the folder or that the model was loaded with."""
    kept = None if origin.folder is None else origin.folder / PICTURES
    if not (folder / PICTURES).exists() and kept is not None and kept.is_file() and _wrote_card_in(kept.parent):
        shutil.copyfile(kept, folder / PICTURES)
    card = card_of(loaded, _as_text(name), origin, pictures=(folder / PICTURES).exists())
    write_whole(folder / CARD, card.content.encode())


def _wrote_card_in(folder: Path) -> bool:
    card = read_card(folder)
    return card is not None and is_own(card)


def wrap_pipelines(module: ModuleType) -> None:
    """Have every save of a pipeline with a quantized part write a card, and no local path.

    Args:
        module: `diffusers.pipelines.pipeline_utils`, which is complete.
    """
    wrapt.wrap_function_wrapper(module, "DiffusionPipeline.save_pretrained", _save_pipeline)


def _save_pipeline(save: Call, pipe: Any, args: Any, kwargs: Any) -> Any:
    if not quantized_parts(pipe):
        return save(*args, **kwargs)
    call = inspect.signature(save).bind(*args, **kwargs)
    folder = Path(os.path.abspath(call.arguments["save_directory"]))
    older = read_card(folder)
    users = older if older is not None and not is_own(older) else None
    token = _users_card.set(users)
    try:
        result = save(*args, **kwargs)
    finally:
        _users_card.reset(token)
    if not folder.is_dir():  # diffusers has said why
        return result
    leave_out_local_paths(folder)
    if call.arguments.get("push_to_hub"):
        return result  # the card was written for the upload
    try:
        write_card(pipe, folder)
    except FileExistsError as error:
        logger.warning("%s", error)
    return result


def upload_with_card(upload: Call, loaded: Any, args: Any, kwargs: Any) -> Any:
    """Upload a folder as diffusers does; that of a quantized pipeline or model with its card, and no local path."""
    call = inspect.signature(upload).bind(*args, **kwargs)
    given = call.arguments
    if given.get("subfolder") or not _is_quantized(loaded):
        return upload(*args, **kwargs)
    folder, repo = Path(given["working_dir"]), given["repo_id"]
    leave_out_local_paths(folder)
    users, there = _users_card.get(), read_card(folder)
    if users is None and there is not None and not is_own(there):
        users = there  # the one on the Hub, which diffusers has fetched
    origin = _with_license(origin_of(loaded), given.get("token"))
    if users is None:
        _put_card(loaded, folder, repo, origin)
    else:
        _complete(users, card_of(loaded, repo, origin))
        write_whole(folder / CARD, users.content.encode())
        logger.warning("the card of %s is yours and keeps its text: only metadata that it lacked was added", repo)
    return upload(*args, **kwargs)


def _is_quantized(loaded: Any) -> bool:
    return hasattr(loaded, "config") and bool(quantized_parts(loaded))


def _complete(users: ModelCard, own: ModelCard) -> None:
    """Add to a user's card the metadata that it lacks."""
    said, more = users.data.to_dict(), own.data.to_dict()
    for key, value in more.items():
        if not said.get(key):
            users.data[key] = value
    users.data["tags"] = [*dict.fromkeys([*(said.get("tags") or []), *more["tags"]])]


def _with_license(origin: Origin, token: str | None) -> Origin:
    """What is known of a base model, with its licence and task from the Hub where its name is all there is."""
    if origin.license or origin.repo is None:
        return origin
    try:
        data = HfApi(token=token).model_info(origin.repo).card_data
    except Exception as error:  # no network, a gated model, whatever the client of today raises: the upload goes on
        logger.warning("the licence of %s is not known (%s): add it to the card", origin.repo, error)
        return origin
    if data is None:
        return origin
    return dataclasses.replace(origin, license=license_in(data.to_dict()), tag=origin.tag or data.pipeline_tag)
