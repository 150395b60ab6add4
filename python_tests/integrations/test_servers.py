"""What other servers call of this package, as far as it runs without them; `make test-servers` runs the rest."""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from ldmq_kernels.integrations import sglang, vllm_omni


def stage() -> Any:
    return SimpleNamespace(_get_generator_device=lambda _request: "cpu")


def noise(generators: list[torch.Generator]) -> torch.Tensor:
    return torch.cat([torch.randn(1, 4, 8, 8, generator=generator) for generator in generators])


def test_merged_requests_keep_their_seeds_and_negative_prompts() -> None:
    request = SimpleNamespace(extra={"dynamic_batch_seeds": [3, 9]}, num_outputs_per_prompt=1)
    found = sglang.own_seeds({"prompt": ["a", "b"], "negative_prompt": "c", "generator": None}, stage(), request)
    alone = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (3, 9)]
    assert torch.equal(noise(found["generator"]), torch.cat(alone))
    assert found["negative_prompt"] == ["c", "c"]


def test_several_pictures_of_a_merged_request_are_those_of_the_request_alone() -> None:
    request = SimpleNamespace(extra={"dynamic_batch_seeds": [3, 9]}, num_outputs_per_prompt=2)
    found = sglang.own_seeds({}, stage(), request)
    alone = [torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (3, 9)]
    assert torch.equal(noise(found["generator"]), torch.cat(alone))


def test_a_request_alone_is_left_as_it_is() -> None:
    arguments = {"generator": "its own", "negative_prompt": "c"}
    assert sglang.own_seeds(dict(arguments), stage(), SimpleNamespace(extra={}, num_outputs_per_prompt=1)) == arguments


def test_a_request_costs_its_latents_where_sglang_cannot_tell() -> None:
    request = SimpleNamespace(width=64, height=128, num_outputs_per_prompt=2)

    def lacks_a_vae(_config: Any, _request: Any) -> float:
        raise AttributeError("no block_out_channels")

    assert sglang.cost_of_request(lacks_a_vae, None, request) == 8 * 16 * 2
    assert sglang.cost_of_request(lambda _config, _request: 5.0, None, request) == 5.0


def test_hooks_are_registered_with_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    registered = []
    plugins = ModuleType("plugins")
    plugins.HookType = SimpleNamespace(AROUND="around", AFTER="after")
    plugins.HookRegistry = SimpleNamespace(register=lambda *arguments: registered.append(arguments))
    name = "sglang.multimodal_gen.runtime.platforms.plugins"
    for place in range(1, len(name.split("."))):
        monkeypatch.setitem(sys.modules, name.rsplit(".", place)[0], ModuleType("package"))
    monkeypatch.setitem(sys.modules, name, plugins)
    sglang.register()
    assert {(target.rpartition(".")[2], kind) for target, _, kind in registered} == {
        ("estimate_request_cost", "around"),
        ("_build_pipeline_kwargs", "after"),
        ("forward", "around"),
    }


@pytest.mark.parametrize("module", [sglang, vllm_omni])
def test_a_server_that_is_not_there_or_has_changed_is_told_of(
    module: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("sglang", "vllm_omni"):
        monkeypatch.setitem(sys.modules, name, None)
    with caplog.at_level(logging.WARNING):
        module.register()
    assert "this SGLang has no hooks" in caplog.text or "one request at a time" in caplog.text


def test_a_changed_registry_of_vllm_omni_gets_neither_pipeline_nor_method(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    entered = []
    registry, quantization = ModuleType("registry"), ModuleType("quantization")
    registry.register_diffusion_model = lambda model_arch, place: entered.append(place)
    quantization.register_quantization_override = lambda *method: entered.append(method)
    method = ModuleType("method")
    method.LdmqMethod = object
    for name, fake in {
        "vllm_omni": ModuleType("vllm_omni"),
        "vllm_omni.diffusion": ModuleType("diffusion"),
        "vllm_omni.diffusion.registry": registry,
        "vllm_omni.quantization": quantization,
        "ldmq_kernels.integrations.vllm_omni.method": method,
    }.items():
        monkeypatch.setitem(sys.modules, name, fake)
    vllm_omni.register()
    assert not entered
    assert "takes no class_name, module_name, post_process_func_name" in caplog.text
    registry.register_diffusion_model = lambda model_arch, module_name, class_name, post_process_func_name: (
        entered.append(model_arch)
    )
    vllm_omni.register()
    assert entered[:2] == ["StableDiffusionPipeline", "StableDiffusionXLPipeline"]
    assert entered[2][0] == "ldmq"
