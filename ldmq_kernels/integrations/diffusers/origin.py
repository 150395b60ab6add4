"""Where a model was loaded from: its repository on the Hub where that is known, and no local path in what is saved."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ldmq_kernels.files import NotJsonError, read_json, write_whole

CARD = "README.md"
MARK = "<!-- Written by ldmq_kernels, which writes it anew when it saves. To keep changes, remove this line. -->"
OF_DIFFUSERS = "This model card has been automatically generated"  # in the card of an upload that says nothing
LICENSE = ("license", "license_name", "license_link")
_PATH = "_name_or_path"
_SNAPSHOT = re.compile(r"models--(?P<id>[^/\\]+)[/\\]snapshots[/\\](?P<revision>[0-9a-f]{40})(?:[/\\]|$)")


@dataclass(frozen=True)
class Origin:
    """What a quantized model was made from, as far as it is known.

    Attributes:
        repo: the base model's name on the Hub.
        revision: the base model's commit, 40 hex digits.
        license: the entries of the base model's card that say its licence.
        tag: the task that the base model's card names.
        folder: the local folder that it was loaded from.
    """

    repo: str | None = None
    revision: str | None = None
    license: dict[str, Any] = field(default_factory=dict)
    tag: str | None = None
    folder: Path | None = None


def repo_of(name: str) -> tuple[str | None, str | None]:
    """The repository and the commit that `_name_or_path` stands for; None for each that it does not tell."""
    found = _SNAPSHOT.search(name)
    if found is not None:
        return found["id"].replace("--", "/"), found["revision"]
    if Path(name).expanduser().exists():
        return None, None
    return (name, None) if is_repo(name) else (None, None)


def is_repo(name: str) -> bool:
    """Whether the Hub could have a model of that name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def read_card(folder: Path) -> ModelCard | None:
    """The card in a folder; None where there is none, or none that can be read."""
    try:
        return ModelCard((folder / CARD).read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except (OSError, UnicodeDecodeError, ValueError):
        return None


def is_own(card: ModelCard) -> bool:
    """Whether a card may be written anew: it is this package's, or what diffusers writes for any upload."""
    return MARK in card.content or OF_DIFFUSERS in card.content


def origin_of(loaded: Any) -> Origin:
    """What a pipeline or a model was loaded from, by its config and by the card of the folder that this names."""
    name = (getattr(loaded, "config", None) or {}).get(_PATH)
    if not isinstance(name, str | Path) or not str(name):
        return Origin()
    name = str(name)
    repo, revision = repo_of(name)
    for folder in (Path(name), Path(name).parent):  # a part's folder has the pipeline's card above it
        card = read_card(folder)
        if card is not None:
            return _by_card(card, repo, revision, folder)
    return Origin(repo, revision, folder=Path(name) if repo is None else None)


def _by_card(card: ModelCard, repo: str | None, revision: str | None, folder: Path) -> Origin:
    said = card.data.to_dict()
    base = said.get("base_model")
    if repo is None and MARK in card.content and isinstance(base, str):
        repo = base  # of a model that was quantized, saved and loaded again
    return Origin(repo, revision, license_in(said), said.get("pipeline_tag"), folder)


def license_in(said: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a card's metadata that say the licence."""
    return {key: said[key] for key in LICENSE if said.get(key)}


def _configs(folder: Path) -> Iterator[Path]:
    for place in (folder, *(entry for entry in folder.iterdir() if entry.is_dir())):
        yield from (file for file in place.glob("*.json") if file.name == "model_index.json" or "config" in file.name)


def leave_out_local_paths(folder: Path) -> None:
    """Take from the configs in a folder, and in its parts' folders, where on this machine a model was loaded from.

    A path in the Hub's cache becomes the name of the repository.
    """
    for file in _configs(folder):
        try:
            content = read_json(file)
        except (NotJsonError, OSError):
            continue
        name = content.get(_PATH) if isinstance(content, dict) else None
        if not isinstance(name, str) or repo_of(name)[0] == name:
            continue
        del content[_PATH]
        if repo_of(name)[0] is not None:
            content[_PATH] = repo_of(name)[0]
        write_whole(file, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
