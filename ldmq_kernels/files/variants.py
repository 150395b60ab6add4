"""Files of weights in directories of diffusers and transformers: plain, or of a variant as model.fp16.safetensors."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from ldmq_kernels.files.json_of_others import read_json
from ldmq_kernels.files.paths import printable

PIPELINE_FILE = "model_index.json"
# a file of weights, or a shard of one
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>[\w-]+?))?(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)"
)
Parts = Mapping[str, Collection[str | None]]


class VariantError(OSError, ValueError):
    """Weights that are there in other variants than the one that is asked for: diffusers raises either for it."""


def weights_of(folder: Path) -> dict[str | None, list[Path]]:
    """The files of weights in a model's folder, by variant; those of none at None."""
    found: dict[str | None, list[Path]] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = WEIGHTS.fullmatch(file.name)
        if match is not None:
            found.setdefault(match["variant"], []).append(file)
    return found


def parts_of(folder: Path) -> dict[str, Path]:
    """The folders of a pipeline's directory that may hold weights, by the name of the part; a model's own one.

    Raises:
        NotJsonError: the pipeline's index is no JSON.
    """
    index = folder / PIPELINE_FILE
    if not index.is_file():
        return {folder.name: folder}
    content = read_json(index)
    return {name: folder / name for name in content} if isinstance(content, dict) else {}


def variants_in(folder: Path) -> dict[str, set[str | None]]:
    """The variants of each part that has weights; None for plain ones."""
    return {name: set(found) for name, part in parts_of(folder).items() if (found := weights_of(part))}


def chosen_variant(folder: Path, asked: str | None = None) -> str | None:
    """The variant to load of a directory: the one that is asked for; else the only one, where plain weights lack.

    As in diffusers, a part of a pipeline that lacks the variant is loaded from its plain weights.

    Raises:
        VariantError: no part has the variant, a part has neither it nor plain weights, or none is asked for where
            there are several and no plain weights.
        NotJsonError: the pipeline's index is no JSON.
    """
    parts = variants_in(folder)
    if asked is not None:
        check_variant(folder, asked, parts)
        return asked
    lacking = [variants for variants in parts.values() if None not in variants]
    common = set[str | None]().union(*lacking).intersection(*lacking)
    if lacking and len(common) != 1:
        raise VariantError(
            f"{printable(folder)} holds weights as variants alone, and not as one for all parts, but {_listed(parts)}: "
            "say which variant is meant, or keep the files of one"
        )
    return next(iter(common), None)


def check_variant(folder: Path, asked: str | None, parts: Parts) -> None:
    """Refuse a variant that a directory does not hold.

    Args:
        asked: the variant, None for plain weights.
        parts: the variants of each part that has weights.

    Raises:
        VariantError: with those that are there.
    """
    is_there = any(asked in variants for variants in parts.values())
    lacking = [name for name, variants in parts.items() if not {asked, None} & set(variants)]
    if not parts or (is_there and not lacking):
        return
    what = "plain weights" if asked is None else f"weights of the variant {asked!r}"
    where = f" for {', '.join(lacking)}" if is_there else ""
    otherwise = "" if asked is None else ", or leave it out for plain weights"
    raise VariantError(
        f"{printable(folder)} has no {what}{where}, it holds {_listed(parts)}: give a variant that is there{otherwise}"
    )


def _listed(parts: Parts) -> str:
    shown = {name: sorted(variant or "plain" for variant in variants) for name, variants in parts.items()}
    return "; ".join(f"{name} ({', '.join(variants)})" for name, variants in sorted(shown.items()))
