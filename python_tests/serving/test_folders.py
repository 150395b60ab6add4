"""A server of a folder as `save_pretrained` wrote it, with an adapter; the folder is taken away while it serves."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

import ldmq_kernels as ldmq
from ldmq_kernels.serving.app import make_app
from ldmq_kernels.serving.settings import ServedModel
from python_tests.integrations.test_lora import add_adapter
from python_tests.serving.served import GENERATIONS, Server, settings_of
from python_tests.tiny import SHALLOW, tiny_pipeline

peft = pytest.importorskip("peft")
EDITS = "/v1/images/edits"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    pipe = tiny_pipeline(folder / "tokenizer", **SHALLOW)
    layers = peft.get_peft_model_state_dict(add_adapter(pipe.unet), adapter_name="style")
    pipe.save_lora_weights(folder / "lora", unet_lora_layers=layers)
    plain = tiny_pipeline(folder / "tokenizer", **SHALLOW)
    ldmq.quantize(plain, scheme="w8a8-dynamic").save_pretrained(folder / "tiny")
    return folder


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[httpx.Client]:
    settings = replace(settings_of(guidance=4.0), models=[ServedModel(folder / "tiny", "tiny")])
    app = make_app(replace(settings, loras={"style": folder / "lora"}))
    with Server(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def pixels(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))))


def drawn(client: httpx.Client, **more: Any) -> np.ndarray:
    return pixels(client.post(GENERATIONS, json={"prompt": "a cat", "seed": 1} | more))


def edited(client: httpx.Client, **more: str) -> np.ndarray:
    image = io.BytesIO()
    Image.linear_gradient("L").resize((16, 16)).convert("RGB").save(image, "PNG")
    form = {"prompt": "a cat", "seed": "1"} | more
    return pixels(client.post(EDITS, data=form, files={"image": ("i.png", image.getvalue())}))


def test_an_adapter_is_for_the_requests_that_name_it(client: httpx.Client) -> None:
    before = drawn(client)
    with_it, with_less = drawn(client, lora="style"), drawn(client, lora={"style": 0.5})
    assert (with_it != before).any()
    assert (with_it != with_less).any()
    np.testing.assert_array_equal(drawn(client, lora={"style": 1}), with_it)
    np.testing.assert_array_equal(drawn(client), before)
    assert client.get("/v1/models").json()["data"][0]["ldmq"]["loras"] == ["style"]


def test_an_adapter_is_named_in_a_form_too(client: httpx.Client) -> None:
    plain, with_it, with_less = (edited(client, **more) for more in ({}, {"lora": "style"}, {"lora": '{"style": 0.5}'}))
    assert (with_it != plain).any()
    assert (with_less != plain).any()
    assert (with_less != with_it).any()


def test_a_folder_that_is_gone_is_served_until_the_end(client: httpx.Client, folder: Path) -> None:
    before = drawn(client)
    shutil.rmtree(folder / "tiny")
    shutil.rmtree(folder / "lora")
    np.testing.assert_array_equal(drawn(client), before)
    assert (drawn(client, lora="style") != before).any()
    assert edited(client).shape == (16, 16, 3)
    assert client.get("/ready").status_code == 200
