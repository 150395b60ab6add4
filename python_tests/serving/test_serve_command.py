"""`ldmq serve`: what it refuses to start with, and how it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

import ldmq_kernels as ldmq
from ldmq_kernels.cli import main
from python_tests.serving.served import GENERATIONS
from python_tests.tiny import SHALLOW, tiny_pipeline

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    pipe = tiny_pipeline(folder / "tokenizer", **SHALLOW)
    pipe.save_pretrained(folder / "float")
    ldmq.quantize(pipe, scheme="w8a8-dynamic").save_pretrained(folder / "quantized")
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["serve", *map(str, arguments), "--port", "0"])
    assert ended.value.code == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("ldmq: ")
    return last


def test_a_model_with_no_quantized_layer_is_refused(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "none of its layers is quantized" in refused(capsys, saved / "float")


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is no pipeline" in refused(capsys, tmp_path / "gone")


def test_a_half_written_model_is_refused(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(saved / "quantized", tmp_path / "half")
    weights = next((tmp_path / "half/unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    assert "does not load" in refused(capsys, tmp_path / "half")


@pytest.mark.parametrize("change", [{"_class_name": ["mine", "Pipeline"]}, {"unet": ["mine", "UNet"]}])
def test_a_model_that_asks_for_code_is_refused(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any]
) -> None:
    shutil.copytree(saved / "quantized", tmp_path / "coded")
    (tmp_path / "coded/mine.py").write_text("raise SystemExit('ran')")
    index = tmp_path / "coded/model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | change))
    told = refused(capsys, tmp_path / "coded")
    assert "mine" in told
    assert "ran" not in told.split()


def test_two_models_of_one_name_are_refused(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twice = [saved / "quantized"] * 2
    assert "two models are called 'quantized'" in refused(capsys, *twice)


def test_a_variant_that_no_model_has_is_refused(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = (saved / "quantized", "--compare", saved / "float", "--variant", "fp16")
    assert "unet (plain); vae (plain): give a variant that is there" in refused(capsys, *both)


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


@pytest.mark.slow
def test_a_port_is_one_servers_and_sigterm_lets_what_runs_finish(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    command = [sys.executable, "-m", "ldmq_kernels", "serve", str(saved / "quantized"), "--port", str(port)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(command, cwd=ROOT, stderr=log, stdout=log, env=environment)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            for _ in range(600):
                try:
                    if client.get("/ready", timeout=1).status_code == 200:
                        break
                except httpx.HTTPError:
                    assert server.poll() is None, (tmp_path / "log").read_text()
                    time.sleep(0.1)
            with pytest.raises(SystemExit):
                main(["serve", str(saved / "quantized"), "--port", str(port)])
            assert "cannot be served" in capsys.readouterr().err
            answers: list[int] = []
            body = {"prompt": "a cat", "num_inference_steps": 30}
            thread = threading.Thread(target=lambda: answers.append(client.post(GENERATIONS, json=body).status_code))
            thread.start()
            while "ldmq_requests_running 1.0" not in httpx.get(f"http://127.0.0.1:{port}/metrics").text:
                time.sleep(0.02)
            server.send_signal(signal.SIGTERM)
            thread.join(60)
            assert answers == [200]
            assert server.wait(30) == 128 + signal.SIGTERM
    finally:
        if server.poll() is None:
            server.kill()
