"""A pipeline of diffusers as vLLM-Omni runs pipelines: requests in one batch, each with its own seed, and cancelled."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from vllm.transformers_utils.config import get_hf_file_to_dict
from vllm_omni.diffusion.cancellation import check_request_cancellation
from vllm_omni.diffusion.data import DiffusionOutput
from vllm_omni.diffusion.distributed.utils import get_local_device
from vllm_omni.diffusion.models.sdxl import pipeline_sdxl
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch

from ldmq_kernels.conversion.summary import summarize
from ldmq_kernels.integrations.diffusers.batch_invariance import batch_invariant
from ldmq_kernels.integrations.diffusers.card import quantized_parts

logger = logging.getLogger("vllm_omni.ldmq_kernels")  # the server shows its own

SAME_IN_A_BATCH = ("height", "width", "num_inference_steps", "guidance_scale", "guidance_rescale", "eta")


def post_process(od_config: Any) -> Callable[[Any], Any]:
    """What is done to outputs before they are sent: PIL pictures are done; the tensors of vLLM-Omni's own SDXL not."""
    of_tensors = pipeline_sdxl.get_sdxl_image_post_process_func(od_config)
    return lambda output: of_tensors(output) if isinstance(output, torch.Tensor) else output


class LdmqPipeline(nn.Module):
    """What `save_pretrained` wrote of a text-to-image pipeline, on this package's layers.

    A picture is the same alone and in a batch, to the bit. Picture i of a request with a seed is that of the seed plus
    i, so that each can be drawn again alone.
    """

    supports_request_batch = True
    supports_request_cancellation = True

    def __init__(self, *, od_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.weights_sources: list[Any] = []  # all are loaded here
        self.device = get_local_device()
        pipe: Any = DiffusionPipeline.from_pretrained(
            od_config.model, torch_dtype=od_config.dtype, revision=od_config.revision
        )
        parts = quantized_parts(pipe)
        if not parts:
            raise ValueError(
                f"nothing of {od_config.model} is quantized by ldmq_kernels: serve it with --diffusion-load-format "
                "diffusers"
            )
        for name, (model, _plan) in parts.items():
            logger.info("%s: %s", name, summarize(model))
        pipe.set_progress_bar_config(disable=True)
        self.pipe = pipe.to(self.device)

    def load_weights(self, _weights: Any) -> None:
        """Nothing is left to load."""

    def forward(self, req: DiffusionRequestBatch) -> list[DiffusionOutput]:
        """Draw all requests of a batch at once.

        Raises:
            ValueError: a request has pictures or a LoRA.
        """
        texts = [_texts(prompt) for prompt in req.prompts]
        if any(one.lora_request is not None for one in req.sampling_params_list):
            raise ValueError("a LoRA cannot be asked for here: merge it before quantizing, or load it in diffusers")
        outputs: dict[int, DiffusionOutput] = {}
        for places in self._together(texts):
            chosen = [texts[place] for place in places], [req.sampling_params_list[place] for place in places]
            outputs |= zip(places, self._draw(*chosen, in_own_size=req.is_dummy_run()), strict=True)
        return [outputs[place] for place in range(len(texts))]

    def _together(self, texts: list[tuple[str, str]]) -> list[list[int]]:
        """Which requests are drawn in one call: SDXL has zeros for no negative prompt, and a text for an empty one."""
        places = range(len(texts))
        if not self.pipe.config.get("force_zeros_for_empty_prompt"):
            return [list(places)]
        kinds = ([p for p in places if texts[p][1]], [p for p in places if not texts[p][1]])
        return [kind for kind in kinds if kind]

    def _draw(
        self, texts: list[tuple[str, str]], params: list[Any], *, in_own_size: bool = False
    ) -> list[DiffusionOutput]:
        """One call of diffusers' pipeline; the server's warm-up, whatever size it names, in the model's own."""
        count = max(1, params[0].num_outputs_per_prompt)
        shared = {name: getattr(params[0], name, None) for name in SAME_IN_A_BATCH}
        if in_own_size:
            shared["height"] = shared["width"] = None
        with torch.inference_mode(), batch_invariant(self.pipe, count * len(params)):
            pictures = self.pipe(
                prompt=[prompt for prompt, _ in texts],
                negative_prompt=[negative for _, negative in texts] if any(negative for _, negative in texts) else None,
                num_images_per_prompt=count,
                generator=[generator for one in params for generator in self._generators(one, count)],
                callback_on_step_end=_after_step,
                **{name: value for name, value in shared.items() if value is not None},
            ).images
        return [DiffusionOutput(output=pictures[start : start + count]) for start in range(0, len(pictures), count)]

    def _generators(self, params: Any, count: int) -> Sequence[torch.Generator]:
        """One for each picture of a request."""
        given = params.generator
        if isinstance(given, list):
            return given
        if given is not None and count == 1:
            return [given]
        device = given.device if given is not None else params.generator_device or self.device
        seed = given.initial_seed() if given is not None else params.seed
        if seed is None:
            seed = torch.Generator().seed()
        return [torch.Generator(device).manual_seed((seed + place) % 2**64) for place in range(count)]


class LdmqXLPipeline(LdmqPipeline):
    """The same for SDXL, of which vLLM-Omni has a pipeline of its own: that is made where no layer is quantized."""

    def __new__(cls, *, od_config: Any, prefix: str = "") -> Any:
        """This class for a quantized model, and the built-in one, asked request by request, for any other."""
        unet = get_hf_file_to_dict("unet/config.json", od_config.model, revision=od_config.revision) or {}
        if (unet.get("quantization_config") or {}).get("quant_method") == "ldmq":
            return super().__new__(cls)
        return _one_by_one(pipeline_sdxl.StableDiffusionXLPipeline)(od_config=od_config, prefix=prefix)


def _one_by_one(kind: type) -> type:
    """A pipeline that is told of batches, since the class in its place takes them, and draws one request at a time."""

    class OneByOne(kind):
        supports_request_batch = True

        def forward(self, req: DiffusionRequestBatch) -> list[DiffusionOutput]:
            return [super(OneByOne, self).forward(DiffusionRequestBatch(requests=[one])) for one in req.requests]

    OneByOne.__name__ = kind.__name__
    return OneByOne


def _texts(prompt: Any) -> tuple[str, str]:
    """The prompt and the negative prompt of a request."""
    if isinstance(prompt, str):
        return prompt, ""
    if prompt.get("multi_modal_data"):
        raise ValueError("this pipeline draws from text alone: a request with pictures cannot be served")
    return prompt.get("prompt") or "", prompt.get("negative_prompt") or ""


def _after_step(_pipe: Any, _step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
    """Stop where all requests of the batch were cancelled."""
    check_request_cancellation()
    return {}
