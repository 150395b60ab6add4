"""vLLM-Omni serves what `save_pretrained` wrote, by this package's pipeline: batches, seeds, leavers, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm_omni", reason="`make test-servers` installs it")

from diffusers import StableDiffusionXLPipeline
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

import ldmq_kernels as ldmq
from python_tests.breadth.parts import stable_diffusion_xl
from python_tests.servers.serving import PROMPT, Server, draw, save_model, serving

SERVE = ("--omni", "--dtype", "float32", "--max-num-seqs", "8", "--request-batch-max-wait-ms", "200")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("model") / "quantized"
    return folder, save_model(folder)


@pytest.fixture(scope="module")
def server(saved: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(("vllm", "serve", str(saved[0]), *SERVE), log) as server:
        yield server


def test_a_picture_is_diffusers_to_the_bit(saved: tuple[Path, Any], server: Server) -> None:
    assert np.array_equal(server.pictures(seed=5)[0], draw(saved[1], 5))


def test_requests_at_once_are_each_as_if_alone(saved: tuple[Path, Any], server: Server) -> None:
    seeds = range(20, 24)
    for seed, picture in zip(seeds, server.at_once(seeds), strict=True):
        assert np.array_equal(picture, draw(saved[1], seed)), seed


def test_pictures_of_one_request_have_seeds_that_count_up(saved: tuple[Path, Any], server: Server) -> None:
    pictures = server.pictures(seed=40, n=2)
    assert all(np.array_equal(picture, draw(saved[1], 40 + place)) for place, picture in enumerate(pictures))


def test_a_client_that_leaves_stops_its_request(saved: tuple[Path, Any], server: Server) -> None:
    with pytest.raises(TimeoutError):
        server.ask(timeout=3, seed=1, num_inference_steps=200)
    assert server.says("Stopped cancelled diffusion request")
    assert np.array_equal(server.pictures(seed=6)[0], draw(saved[1], 6))


def test_the_log_says_what_is_quantized(server: Server) -> None:
    assert server.says("linears quantized")


def test_a_model_of_another_class_is_refused(saved: tuple[Path, Any], tmp_path: Path) -> None:
    from ldmq_kernels.integrations.vllm_omni.method import LdmqMethod

    shutil.copytree(saved[0], tmp_path / "flux")
    index = tmp_path / "flux" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "FluxPipeline"}))
    LdmqMethod().maybe_update_config(str(saved[0]))
    with pytest.raises(ValueError, match="FluxPipeline with layers of ldmq_kernels"):
        LdmqMethod().maybe_update_config(str(tmp_path / "flux"))
    with pytest.raises(ValueError, match="is a layer of vLLM's"):
        LdmqMethod().get_quant_method(torch.nn.Linear(1, 1), "unet.proj")


def test_sdxl_is_drawn_in_a_batch_as_alone(tmp_path: Path) -> None:
    from ldmq_kernels.integrations.vllm_omni import pipeline

    pipe = ldmq.quantize(StableDiffusionXLPipeline(**stable_diffusion_xl()), scheme="w8a8-dynamic")
    pipe.save_pretrained(tmp_path)
    served = pipeline.LdmqXLPipeline(od_config=SimpleNamespace(model=str(tmp_path), dtype=torch.float32, revision=None))
    size = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 4.0}
    seeds = (3, 9, 11)
    prompts = ["a red circle", {"prompt": "a blue square", "negative_prompt": "grey"}, "a green circle"]
    params = [OmniDiffusionSamplingParams(seed=seed, **size) for seed in seeds]
    requests = [
        OmniDiffusionRequest(prompt=prompt, sampling_params=one, request_id="a")
        for prompt, one in zip(prompts, params, strict=True)
    ]
    outputs = served.forward(DiffusionRequestBatch(requests=requests))
    for seed, request, output in zip(seeds, requests, outputs, strict=True):
        alone = served.forward(DiffusionRequestBatch(requests=[request]))[0].output[0]
        assert np.array_equal(np.asarray(output.output[0]), np.asarray(alone)), seed
    generator = torch.Generator().manual_seed(3)
    expected = served.pipe(prompts[0], generator=generator, **size).images[0]
    assert np.array_equal(np.asarray(outputs[0].output[0]), np.asarray(expected))


def test_sdxl_is_served_by_this_package_s_pipeline(tmp_path: Path) -> None:
    pipe = ldmq.quantize(StableDiffusionXLPipeline(**stable_diffusion_xl()), scheme="w8a8-dynamic")
    pipe.save_pretrained(tmp_path / "xl")
    again = StableDiffusionXLPipeline.from_pretrained(tmp_path / "xl", torch_dtype=torch.float32)
    generator = torch.Generator().manual_seed(7)
    drawing = {"num_inference_steps": 2, "guidance_scale": 4.0, "height": 16, "width": 16}
    expected = np.asarray(again(PROMPT, generator=generator, **drawing).images[0])
    with serving(("vllm", "serve", str(tmp_path / "xl"), *SERVE), tmp_path / "log") as server:
        assert np.array_equal(server.pictures(seed=7, size="16x16")[0], expected)


def test_sdxl_in_float_is_vllm_omni_s_own(saved: tuple[Path, Any], tmp_path: Path, monkeypatch: Any) -> None:
    from ldmq_kernels.integrations.vllm_omni import pipeline

    class BuiltIn(torch.nn.Module):
        supports_request_batch = False

        def __init__(self, **_: Any) -> None:
            super().__init__()

        def forward(self, req: Any) -> str:
            return "".join(req.requests)

    monkeypatch.setattr(pipeline.pipeline_sdxl, "StableDiffusionXLPipeline", BuiltIn)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    config = SimpleNamespace(model=str(tmp_path), revision=None)
    made = pipeline.LdmqXLPipeline(od_config=config)
    assert isinstance(made, BuiltIn)
    assert made.forward(SimpleNamespace(requests=["a", "b"])) == ["a", "b"]
    quantized = pipeline.LdmqXLPipeline.__new__(
        pipeline.LdmqXLPipeline, od_config=SimpleNamespace(model=str(saved[0]), revision=None)
    )
    assert isinstance(quantized, pipeline.LdmqXLPipeline)
