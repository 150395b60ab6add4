"""The files of a model in a folder: saved over an older one as a whole, and shards read by an index that is whole.

diffusers saves config.json, then the tensors, file after file over the older ones. Here it writes to a scratch folder
in the same one, from which the files are moved once all are there. What a kill leaves half moved is moved on by the
next save or load.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import wrapt
from diffusers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFETENSORS_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    _add_variant,
)

from ldmq_kernels.files import (
    PART,
    NotJsonError,
    finish_writing_into,
    printable,
    read_json,
    shortened,
    write_into,
)
from ldmq_kernels.integrations.diffusers.integrity import MARK, SAVE_AGAIN, CheckpointError, refuse_marked
from ldmq_kernels.integrations.diffusers.origin import leave_out_local_paths

Call = Callable[..., Any]


def wrap_models(module: ModuleType) -> None:
    """Have every save of a quantized model be whole, and every load find whole saves and read indices that are.

    An upload carries the model's card.

    Args:
        module: `diffusers.models.modeling_utils`, which is complete.
    """
    wrapt.wrap_function_wrapper(module, "ModelMixin.save_pretrained", _save_pretrained)
    wrapt.wrap_function_wrapper("diffusers.configuration_utils", "ConfigMixin.load_config", _load_config)
    wrapt.wrap_function_wrapper("diffusers.utils.hub_utils", "PushToHubMixin._upload_folder", _upload_folder)
    wrapt.wrap_function_wrapper(module, "_get_checkpoint_shard_files", _shard_files)
    wrapt.wrap_function_wrapper(module, "ModelMixin._load_pretrained_model", _load_tensors)


def _save_pretrained(save: Call, model: Any, args: Any, kwargs: Any) -> Any:
    from ldmq_kernels.integrations.diffusers.quantizer import LdmqQuantizer  # which diffusers may be importing yet

    if not isinstance(vars(model).get("hf_quantizer"), LdmqQuantizer):
        return save(*args, **kwargs)
    call = inspect.signature(save).bind(*args, **kwargs)
    call.apply_defaults()
    options = call.arguments
    folder = Path(os.path.abspath(options["save_directory"]))
    if folder.is_file():  # diffusers says so
        return save(*args, **kwargs)
    if options["push_to_hub"]:
        options["kwargs"].setdefault("repo_id", folder.name)

    def fill(place: Path) -> None:
        options["save_directory"] = str(place)
        save(*call.args, **call.kwargs)
        leave_out_local_paths(place)
        for file in place.glob("*.safetensors"):
            _order_metadata(file)

    write_into(folder, fill, lambda place: of_weights(place, options["safe_serialization"], options["variant"]))


def _upload_folder(upload: Call, loaded: Any, args: Any, kwargs: Any) -> Any:
    from ldmq_kernels.integrations.diffusers.publishing import upload_with_card  # as above

    return upload_with_card(upload, loaded, args, kwargs)


def _order_metadata(file: Path) -> None:
    """Put the entries of a safetensors file's metadata in order, which come in a random one: one model, one file."""
    with file.open("r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            opened.seek(8)
            opened.write(text.ljust(size))


def _load_config(load: Call, _model: Any, args: Any, kwargs: Any) -> Any:
    folder = args[0] if args else kwargs.get("pretrained_model_name_or_path")
    if isinstance(folder, str | os.PathLike):
        finish_saves(Path(folder))
        if kwargs.get("subfolder"):
            finish_saves(Path(folder, kwargs["subfolder"]))
    return load(*args, **kwargs)


def _load_tensors(load: Call, _model: Any, args: Any, kwargs: Any) -> Any:
    """Refuse the tensors of a quantized model for a config.json that says nothing of it, as of a float one."""
    given = inspect.signature(load).bind(*args, **kwargs).arguments
    if given.get("hf_quantizer") is None:
        refuse_marked([str(file) for file in given["resolved_model_file"] if file and os.path.isfile(file)])
    return load(*args, **kwargs)


def _shard_files(find: Call, _none: object, args: Any, kwargs: Any) -> Any:
    """What diffusers makes of an index; what is wrong with the index, in place of what reading it ends in."""
    call = inspect.signature(find).bind(*args, **kwargs)
    index = Path(call.arguments["index_filename"])
    problem = _problem_of(index, Path(call.arguments["pretrained_model_name_or_path"]).is_dir())
    try:
        found = find(*args, **kwargs)
    except (ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise problem or error from None
    if problem is not None and _is_marked(index):
        raise problem
    return found


def _problem_of(index: Path, is_local: bool) -> Exception | None:
    """What is wrong with the index of a sharded checkpoint, whose files are there already where it is local."""
    name = printable(index)
    try:
        content = read_json(index)
    except NotJsonError as error:
        return CheckpointError(f"the index of the shards is damaged: {error}: {SAVE_AGAIN}")
    except OSError:  # it is no file of its own, but in an archive
        return None
    if not isinstance(content, dict):
        return CheckpointError(f"{name} is damaged: it holds no JSON object: {SAVE_AGAIN}")
    for entry in ("metadata", "weight_map"):
        if not isinstance(content.get(entry), dict):
            return CheckpointError(f"{name} is damaged: its {entry} is no object: {SAVE_AGAIN}")
    for tensor, file in content["weight_map"].items():
        said = f"{name} says that {shortened(tensor)} is in {shortened(repr(file))}, and"
        if not (isinstance(file, str) and file.endswith((".safetensors", ".bin")) and os.path.basename(file) == file):
            return CheckpointError(f"{said} that is no name of a file of tensors beside it: {SAVE_AGAIN}")
        if is_local and not os.path.exists(index.parent / file):
            return FileNotFoundError(f"{said} there is no such file beside it: copy it there, or save the model again")
    return None


def _is_marked(index: Path) -> bool:
    """Whether a quantized model was saved with an index, which may be damaged."""
    return next(iter(MARK)).encode() in index.read_bytes()


def of_weights(folder: Path, safe: bool, variant: str | None) -> list[str]:
    """The files in a folder that hold one model's weights: those that a save of the same kind takes the place of.

    They are the file that is named so, the index that is, and the shards that the index names; a model in another
    serialization or variant stays, and so does all else.

    Args:
        folder: in which a model was saved, or none.
        safe: in safetensors, else pickled.
        variant: as the model was saved, such as "fp16".
    """
    index = _add_variant(SAFE_WEIGHTS_INDEX_NAME if safe else WEIGHTS_INDEX_NAME, variant)
    names = {index, _add_variant(SAFETENSORS_WEIGHTS_NAME if safe else WEIGHTS_NAME, variant)}
    # where there is none, or it is damaged, nobody knows its shards
    with contextlib.suppress(OSError, NotJsonError, LookupError, TypeError, AttributeError):
        names |= {name for name in read_json(folder / index)["weight_map"].values() if os.path.basename(name) == name}
    return [name for name in sorted(names) if (folder / name).is_file()]


def finish_saves(folder: Path) -> None:
    """Before a model or a pipeline is loaded: put in order what a killed save has left in its folder, or in its parts'.

    Raises:
        OSError: the folder cannot be written.
    """
    for part in (folder / PART, *folder.glob(f"*/{PART}")):
        if part.is_dir():
            finish_writing_into(part.parent)
