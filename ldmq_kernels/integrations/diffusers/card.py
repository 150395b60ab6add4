"""The card of a quantized model, README.md: the Hub's metadata, how it is loaded, and what was measured."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from torch import nn

from ldmq_kernels.calibration.denoisers import denoisers
from ldmq_kernels.conversion.summary import Summary, summarize
from ldmq_kernels.integrations.diffusers.origin import MARK, Origin
from ldmq_kernels.integrations.diffusers.quantizer import LdmqQuantizer
from ldmq_kernels.integrations.vllm_omni.classes import CLASSES
from ldmq_kernels.numerics.formats import FLOAT
from ldmq_kernels.plans.cost import time_in_words
from ldmq_kernels.plans.plan import Plan

PICTURES = "float-and-quantized.png"
MADE = {"num_frames": "video", "audio_length_in_s": "audio", "audio_end_in_s": "audio"}  # by an argument of its own
FAMILIES = {"StableDiffusionXL": "stable-diffusion-xl", "StableDiffusion": "stable-diffusion"}
MEASURED = {
    "held_out_sqnr_db": "SQNR of the output",
    "held_out_latent_db": "SQNR of the final latents, mean over pictures",
    "held_out_latent_db_worst_tenth": "SQNR of the final latents, worst tenth",
    "held_out_psnr_db": "PSNR of the pictures, mean",
    "held_out_psnr_db_worst_tenth": "PSNR of the pictures, worst tenth",
}
VLLM_OMNI = "vllm serve {name} --omni --dtype {dtype}"
BY_DIFFUSERS = " --diffusion-load-format diffusers"  # where vLLM-Omni has no pipeline of this package
SGLANG = "sglang serve --model-path {name} --backend diffusers"


def quantized_parts(loaded: Any) -> dict[str, tuple[nn.Module, Plan]]:
    """The quantized denoisers of a pipeline by name, or the model itself at "", each with its plan."""
    models = {"": loaded} if isinstance(loaded, nn.Module) else denoisers(loaded)
    found = {name: (model, vars(model).get("hf_quantizer")) for name, model in models.items()}
    return {
        name: (model, quantizer.quantization_config.plan)
        for name, (model, quantizer) in found.items()
        if isinstance(quantizer, LdmqQuantizer) and quantizer.quantization_config.plan is not None
    }


def card_of(loaded: Any, name: str, origin: Origin, *, pictures: bool = False) -> ModelCard:
    """The card of a pipeline, or of a model alone, that is quantized.

    Args:
        name: what it is loaded by: a repository on the Hub, or the name of a folder.
        origin: what it was made from.
        pictures: whether a picture of that name lies beside the card.
    """
    parts = quantized_parts(loaded)
    summaries = {part: summarize(model) for part, (model, _) in parts.items()}
    sections = [
        f"# {name.rpartition('/')[2]}",
        _opening(loaded, origin, summaries),
        *([f"![Float pictures above, pictures of the quantized model below]({PICTURES})"] if pictures else []),
        "## Use\n\n" + _use(loaded, name),
        "## What is quantized",
        *(_table(part, summary) for part, summary in summaries.items()),
        *(text for part, (_, plan) in parts.items() if (text := _measured(part, plan.measured))),
    ]
    data = _metadata(loaded, origin, summaries)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{MARK}\n\n" + "\n\n".join(sections) + "\n")


def _metadata(loaded: Any, origin: Origin, summaries: Mapping[str, Summary]) -> ModelCardData:
    schemes = {name for summary in summaries.values() for name in summary.schemes if name != str(FLOAT)}
    bits = {f"int{digit}" for scheme in schemes for digit in "48" if scheme.startswith(f"w{digit}")}
    family = next((tag for start, tag in FAMILIES.items() if type(loaded).__name__.startswith(start)), None)
    said: dict[str, Any] = (
        {} if origin.repo is None else {"base_model": origin.repo, "base_model_relation": "quantized"}
    )
    said |= origin.license
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=origin.tag or _task(loaded),
        tags=["quantization", "ldmq", *sorted(bits), *sorted(schemes), *([family] if family else [])],
        **said,
    )


def _task(loaded: Any) -> str | None:
    """What the Hub calls the work of a pipeline, by the arguments of its call; None for a model alone."""
    if isinstance(loaded, nn.Module):
        return None
    takes = {*inspect.signature(type(loaded).__call__).parameters}
    made = next((kind for argument, kind in MADE.items() if argument in takes), "image")
    if made != "audio" and takes & {"image", "video"}:
        return f"image-to-{made}"
    if not takes & {"prompt", "prompts", "prompt_embeds", "image_embeds", "image_embeddings"}:
        return "unconditional-image-generation" if made == "image" else None
    return f"text-to-{made}"


def _opening(loaded: Any, origin: Origin, summaries: Mapping[str, Summary]) -> str:
    of = "a model whose name this card was not given"
    if origin.repo is not None:
        of = f"[{origin.repo}](https://huggingface.co/{origin.repo})"
        of += f" at commit {origin.revision}" if origin.revision else ""
    before = sum(summary.bytes_before for summary in summaries.values())
    after = sum(summary.bytes_after for summary in summaries.values())
    parts = "" if isinstance(loaded, nn.Module) else f"{' and '.join(summaries)} of a "
    return (
        f"The {parts}{type(loaded).__name__}, made from {of}, in integers: {after:,} bytes of weights in place of "
        f"{before:,} in 16 bit ({after / before:.3f}x). Quantized with `ldmq_kernels`."
    )


def _use(loaded: Any, name: str) -> str:
    part = next(iter(quantized_parts(loaded).values()))[0]
    dtype = str(part.dtype).removeprefix("torch.")
    alone = isinstance(loaded, nn.Module)
    kind, variable = (type(loaded).__name__, "model") if alone else ("DiffusionPipeline", "pipe")
    lines = [
        "```python",
        "import torch",
        "import ldmq_kernels  # makes diffusers know the format: pip install 'ldmq_kernels[diffusers]'",
        f"from diffusers import {kind}",
        "",
        f'{variable} = {kind}.from_pretrained("{name}", torch_dtype=torch.{dtype})',
        *(['picture = pipe("a prompt").images[0]'] if _task(loaded) == "text-to-image" else []),
        "```",
    ]
    if not alone:
        by_diffusers = "" if type(loaded).__name__ in CLASSES else BY_DIFFUSERS
        folder = name.rpartition("/")[2]
        commands = [f"hf download {name} --local-dir {folder}"] if folder != name else []
        commands += [f"ldmq serve {folder}    # pip install 'ldmq_kernels[serve]'"]
        commands += [of.format(name=name, dtype=dtype) for of in (VLLM_OMNI + by_diffusers, SGLANG)]
        shown = (f"    {command}" for command in commands)
        lines += ["", "Served, where `ldmq_kernels` is installed beside the server:", "", *shown]
    return "\n".join(lines)


def _rows(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _table(part: str, summary: Summary) -> str:
    rows = [
        [name, str(of.convolutions), str(of.linears), f"{of.bytes_before:,}", f"{of.bytes_after:,}"]
        for name, of in summary.schemes.items()
    ]
    other = f"{summary.other_bytes:,}"
    rows.append(["biases, norms, other", "", "", other, other])
    counts = [str(summary.convolutions), str(summary.linears)]
    rows.append(["all", *counts, f"{summary.bytes_before:,}", f"{summary.bytes_after:,}"])
    return _rows([part or "scheme", "convolutions", "linears", "bytes in 16 bit", "bytes"], rows)


def _measured(part: str, measured: Mapping[str, Any]) -> str:
    """A table of the dB that the plan was verified with, and the time of a call; nothing where it has neither."""
    rows = [[words, f"{measured[key]:.2f} dB"] for key, words in MEASURED.items() if key in measured]
    where = measured.get("verified_on", "held-out prompts")
    table = _rows([f"{part or 'model'}, measured against float on {where}", ""], rows) if rows else ""
    time = time_in_words(measured)
    return "\n\n".join(text for text in (table, f"By its plan, {time}." if time else "") if text)
