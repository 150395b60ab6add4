"""The images API over a tiny quantized pipeline, as OpenAI's client and others call it.

From one process, and where Ray is installed (`make test-servers`) from two replicas on a cluster.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from PIL import Image

import ldmq_kernels as ldmq
from ldmq_kernels.numerics.formats import FLOAT
from ldmq_kernels.serving.app import make_app
from python_tests.serving.served import GENERATIONS, Server, settings_of
from python_tests.tiny import mixed_plan, tiny_pipeline

SERVED_BY = ["a process", *["two replicas"] * (importlib.util.find_spec("ray") is not None)]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pipe = tiny_pipeline(tmp_path_factory.mktemp("tokenizer"))
    return ldmq.quantize(pipe, mixed_plan(pipe.unet))


@pytest.fixture(scope="module", params=SERVED_BY)
def url(request: pytest.FixtureRequest, pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    settings = settings_of(guidance=4.0)
    if request.param == "two replicas":
        yield from on_ray(pipe, tmp_path_factory.mktemp("saved") / "tiny", vars(settings.limits))
        return
    with Server(make_app(settings, lambda *_: {"tiny": pipe})) as url:
        yield url


def on_ray(pipe: Any, folder: Path, limits: dict[str, Any]) -> Iterator[str]:
    from ldmq_kernels.serving.ray import app
    from python_tests.servers.on_ray import cluster, start

    pipe.save_pretrained(folder)
    with cluster() as url:
        start(app({"models": str(folder), "steps": 2, "guidance": 4.0, "limits": limits, "min_replicas": 2}))
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def pixels(data: str | bytes) -> np.ndarray:
    raw = base64.b64decode(data) if isinstance(data, str) else data
    return np.asarray(Image.open(io.BytesIO(raw)).convert("RGB"))


def drawn(pipe: Any, prompt: str, seed: int, **settings: Any) -> np.ndarray:
    arguments = {"num_inference_steps": 2, "guidance_scale": 4.0} | settings
    return np.asarray(pipe(prompt, generator=torch.Generator().manual_seed(seed), **arguments).images[0])


def png(size: tuple[int, int] = (16, 16), mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.effect_noise(size, 60).convert(mode).save(out, "PNG")
    return out.getvalue()


def test_each_picture_of_a_request_is_the_pipelines_own(client: openai.OpenAI, pipe: Any) -> None:
    answer = client.images.generate(prompt="a red circle", n=3, extra_body={"seed": 7})
    assert (answer.size, answer.output_format) == ("16x16", "png")
    assert [picture.seed for picture in answer.data] == [7, 8, 9]
    for picture in answer.data:
        np.testing.assert_array_equal(pixels(picture.b64_json), drawn(pipe, "a red circle", picture.seed))


def test_extensions_reach_the_pipeline(client: openai.OpenAI, pipe: Any) -> None:
    extra = {"seed": [3], "negative_prompt": "blue", "num_inference_steps": 3, "guidance_scale": 2.0}
    answer = client.images.generate(prompt="a cat", size="24x16", extra_body=extra)
    expected = drawn(
        pipe,
        "a cat",
        3,
        negative_prompt="blue",
        num_inference_steps=3,
        guidance_scale=2.0,
        width=24,
        height=16,
    )
    np.testing.assert_array_equal(pixels(answer.data[0].b64_json), expected)


def test_a_picture_by_url(client: openai.OpenAI, pipe: Any, url: str) -> None:
    answer = client.images.generate(prompt="a cat", response_format="url", extra_body={"seed": 1})
    found = openai.DefaultHttpxClient().get(answer.data[0].url)
    assert found.headers["content-type"] == "image/png"
    np.testing.assert_array_equal(pixels(found.content), drawn(pipe, "a cat", 1))


def test_partial_pictures_come_before_the_last(client: openai.OpenAI, pipe: Any) -> None:
    extra = {"seed": 5, "num_inference_steps": 6}
    events = [*client.images.generate(prompt="a cat", stream=True, partial_images=2, extra_body=extra)]
    assert [event.type for event in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert pixels(events[0].b64_json).shape == (16, 16, 3)
    np.testing.assert_array_equal(pixels(events[2].b64_json), drawn(pipe, "a cat", 5, num_inference_steps=6))


def test_a_mask_keeps_what_is_opaque(client: openai.OpenAI) -> None:
    image, mask = png(), io.BytesIO()
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(mask, "PNG")
    settings = {"seed": 1, "strength": 0.5}
    edited = client.images.edit(
        image=("i.png", image), mask=("m.png", mask.getvalue()), prompt="a cat", extra_body=settings
    )
    alone = client.images.edit(image=[("i.png", image)], prompt="a cat", extra_body=settings)
    assert pixels(edited.data[0].b64_json).shape == pixels(alone.data[0].b64_json).shape == (16, 16, 3)
    other = client.images.edit(image=("i.png", png()), prompt="a cat", extra_body=settings)
    assert (pixels(other.data[0].b64_json) != pixels(alone.data[0].b64_json)).any()


def test_what_is_served_is_told(client: openai.OpenAI, pipe: Any, url: str) -> None:
    client.images.generate(prompt="a cat")
    model = client.models.list().data[0]
    assert model.id == "tiny"
    assert model.ldmq["batch_invariant"]
    assert model.ldmq["weights_bytes"] < model.ldmq["weights_bytes_fp16"]
    layers = {scheme: count for scheme, count in model.ldmq["layers"].items() if scheme != str(FLOAT)}
    assert sum(layers.values()) == model.ldmq["quantized_layers"]
    http = openai.DefaultHttpxClient(base_url=url)
    assert http.get("/health").status_code == http.get("/ready").status_code == 200
    metrics = http.get("/metrics").text
    assert re.search('ldmq_layers{model="tiny",(replica="\\w+",)?scheme="w8a8-dynamic"}', metrics)
    assert "ldmq_images_total" in metrics
    assert 'ldmq_op_calls_total{backend="' in metrics


WRONG = {
    "prompt": ["", " \n", "x" * 33_000, "\ud800", 3, None],
    "size": ["-8x8", "17x16", "99999x99999", "0x0", "16", "1e9x8", "64x72", ""],
    "seed": [-1, 2**63, 1.5, "x", [1, 2], [-1]],
    "n": [0, 11, -1, 2.5],
    "num_inference_steps": [0, -3, 401, 10**30],
    "guidance_scale": [-1, 1e9, "nan"],
    "output_format": ["gif", "svg", "bmp"],
    "background": ["transparent", "pink"],
    "response_format": ["file", 5],
    "partial_images": [4, -1],
    "frame_count": [2],
    "lora": ["none", {"a": 1.0, "b": 2.0}, {}],
    "unheard_of": [1],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_an_argument_that_cannot_be_honoured_is_named(url: str, name: str, value: Any) -> None:
    body = {"prompt": "a cat"} | {name: value}
    answer = openai.DefaultHttpxClient(base_url=url).post(GENERATIONS, content=json.dumps(body))
    assert answer.status_code == 400, answer.text
    assert name in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == name


def test_a_streamed_picture_has_no_url(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="streamed pictures come as b64_json"):
        client.images.generate(prompt="a cat", stream=True, response_format="url")


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff\xfe", b"NaN", b'{"prompt": NaN}', b"[" * 100_000])
def test_a_body_that_is_no_object_is_refused(url: str, body: bytes) -> None:
    assert openai.DefaultHttpxClient(base_url=url).post(GENERATIONS, content=body).status_code == 400


@pytest.mark.parametrize("prompt", ["<script>alert(1)</script>", "\x00\x01\x1b[2J", "\u202e\u0000 x", "%s{0}" * 50])
def test_a_hostile_prompt_is_a_prompt(client: openai.OpenAI, prompt: str) -> None:
    assert client.images.generate(prompt=prompt).data[0].b64_json


def test_a_prompt_that_is_cut_is_told(client: openai.OpenAI) -> None:
    assert client.images.generate(prompt="a cat " * 100).ldmq["prompt_is_cut"]
    assert not client.images.generate(prompt="a cat").ldmq["prompt_is_cut"]


def test_what_counts_tokens_is_not_the_tokenizer_that_a_lane_draws_with(client: openai.OpenAI, pipe: Any) -> None:
    client.images.generate(prompt="a cat")
    assert pipe.tokenizer.backend_tokenizer.truncation["max_length"] == pipe.tokenizer.model_max_length


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is tiny"):
        client.images.generate(prompt="a cat", model="gpt-image-1")


@pytest.mark.parametrize("ignored", ["user", "moderation", "style", "safety_identifier", "complexity"])
def test_what_is_ignored_by_rule_is_taken(client: openai.OpenAI, ignored: str) -> None:
    assert client.images.generate(prompt="a cat", extra_body={ignored: "auto"}).data[0].b64_json


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_every_format_that_is_offered_is_written(client: openai.OpenAI, kind: str) -> None:
    answer = client.images.generate(prompt="a cat", output_format=kind, output_compression=50)
    data = base64.b64decode(answer.data[0].b64_json)
    assert Image.open(io.BytesIO(data)).format == kind.upper()


@pytest.mark.parametrize("image", [b"", b"no picture", png()[:60]])
def test_an_upload_that_is_no_picture_is_refused(client: openai.OpenAI, image: bytes) -> None:
    with pytest.raises(openai.BadRequestError, match="image is no picture that can be read") as refused:
        client.images.edit(image=("i.png", image), prompt="a cat")
    assert "object at" not in str(refused.value)
