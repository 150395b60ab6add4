"""This package in SGLang's diffusion servers, which find it by the entry points of `sglang.multimodal_gen.plugins`.

    sglang serve --model-path DIR --backend diffusers --batching-max-size 8

SGLang 0.5.23 has no pipeline of its own for Stable Diffusion's UNets, and draws with diffusers. There its batching ends
the worker, since the cost of a request is computed from a VAE that the backend does not have, and where it does not,
all pictures of a batch come from the first request's seed. Both are mended by hooks, SGLang's own means for that, and a
picture is the same alone and in a batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch

PACKAGE = "sglang.multimodal_gen"
LATENT = 8  # pixels of a picture's side for one of its latents'

logger = logging.getLogger(__name__)


def register() -> None:
    """Make diffusers know the format, and hook the batching; called in each process of a server."""
    from ldmq_kernels.integrations.diffusers import register as register_with_diffusers

    register_with_diffusers()
    try:
        from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType
    except ImportError as error:
        logger.warning("this SGLang has no hooks (%s): leave its batching off, it draws from one seed", error)
        return
    cost = f"{PACKAGE}.configs.pipeline_configs.base.PipelineConfig.estimate_request_cost"
    stage = f"{PACKAGE}.runtime.pipelines.diffusers_pipeline.DiffusersExecutionStage"
    HookRegistry.register(cost, cost_of_request, HookType.AROUND)
    HookRegistry.register(f"{stage}._build_pipeline_kwargs", own_seeds, HookType.AFTER)
    HookRegistry.register(f"{stage}.forward", each_as_alone, HookType.AROUND)


def cost_of_request(estimate: Callable[..., float], config: Any, request: Any, *rest: Any, **more: Any) -> float:
    """What SGLang estimates; latents times pictures where its configuration lacks a VAE's factor."""
    try:
        return estimate(config, request, *rest, **more)
    except AttributeError:
        width, height = (math.ceil(int(side or 0) / LATENT) for side in (request.width, request.height))
        return float(max(1, width * height) * _count(request))


def each_as_alone(forward: Callable[..., Any], stage: Any, request: Any, *rest: Any, **more: Any) -> Any:
    """What SGLang draws, each picture of merged requests as its request would alone, to the bit."""
    from ldmq_kernels.integrations.diffusers.batch_invariance import batch_invariant

    with batch_invariant(stage.diffusers_pipe, len(_seeds(request)) * _count(request) or 1):
        return forward(stage, request, *rest, **more)


def _seeds(request: Any) -> list[int]:
    """Of merged requests."""
    return (request.extra or {}).get("dynamic_batch_seeds") or []


def _count(request: Any) -> int:
    """How many pictures each prompt asks for."""
    return max(1, int(request.num_outputs_per_prompt or 1))


def own_seeds(arguments: dict[str, Any], stage: Any, request: Any) -> dict[str, Any]:
    """The arguments of diffusers' call for merged requests, with a generator and a negative prompt for each.

    Several pictures of one request come from one generator, as when the request is drawn alone.
    """
    seeds = _seeds(request)
    if not seeds:
        return arguments
    device, count = stage._get_generator_device(request), _count(request)
    arguments["generator"] = [
        generator for seed in seeds for generator in [torch.Generator(device=device).manual_seed(int(seed))] * count
    ]
    if isinstance(arguments.get("negative_prompt"), str):
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(seeds)
    return arguments
