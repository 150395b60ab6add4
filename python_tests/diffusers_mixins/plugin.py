"""For pytest: each model that a test makes is quantized, and each family is tested as diffusers' quantizers are."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch

import ldmq_kernels as ldmq
from ldmq_kernels.integrations.diffusers import LdmqConfig
from ldmq_kernels.kernels.cpu.self_check import is_exact
from ldmq_kernels.nn import QuantizedLayer
from ldmq_kernels.plans.plan import PlanError
from python_tests.diffusers_mixins.applicable import OTHERS, why_not

SCHEME = "w8a8-dynamic"
_floats: list[bool] = []  # not empty: models stay as they are made


@contextlib.contextmanager
def in_float() -> Iterator[None]:
    """Models that are made in this block stay in float."""
    _floats.append(True)
    try:
        yield
    finally:
        _floats.pop()


def quantize_when_made(model: type) -> None:
    """Have a class of diffusers make quantized models, but for a loader that makes them empty."""
    make = model.__init__
    if "quantizing" in vars(make):
        return

    @functools.wraps(make)
    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        if type(self) is model and not _floats and not any(p.is_meta for p in self.parameters()):
            with contextlib.suppress(PlanError):  # there is nothing to quantize
                ldmq.quantize(self, scheme=SCHEME)

    vars(made)["quantizing"] = True
    model.__init__ = made  # type: ignore[misc]


def _skip_where_weights_are_wide() -> None:
    if not is_exact():
        pytest.skip("this processor has no int8 products, and holds the integers in float32")


class LdmqTester:
    """What diffusers tests of its quantizers; `shared` is its QuantizationTesterMixin."""

    shared: Any
    config: ClassVar[dict[str, Any]] = {"scheme": SCHEME}

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Any) -> None:
        self._float_folder = str(tmp_path / "float")

    def __getattr__(self, name: str) -> Any:
        return functools.partial(getattr(type(self).shared, name), self)

    def _load_unquantized_model(self) -> Any:
        with in_float():
            torch.manual_seed(0)
            return self.model_class(**self.get_init_dict()).eval()

    def _create_quantized_model(self, config_kwargs: dict[str, Any], **extra: Any) -> Any:
        self._load_unquantized_model().save_pretrained(self._float_folder)
        return self.model_class.from_pretrained(
            self._float_folder, quantization_config=LdmqConfig(**config_kwargs), **extra
        )

    def _verify_if_layer_quantized(self, name: str, module: Any, _config: Any) -> None:
        assert isinstance(module, QuantizedLayer), f"{name} is a {type(module).__name__}"
        assert module.scheme.quantizes, f"{name} is in float"

    def test_quantization_num_parameters(self) -> None:
        """Weights are counted as in float."""
        self._test_quantization_num_parameters(self.config)

    def test_quantization_memory_footprint(self) -> None:
        """Integers take less memory."""
        _skip_where_weights_are_wide()
        self._test_quantization_memory_footprint(self.config, 1.2)

    def test_quantization_inference(self) -> None:
        """A call gives numbers."""
        self._test_quantization_inference(self.config)

    def test_quantization_lora_inference(self) -> None:
        """A call with a LoRA gives numbers."""
        self._test_quantization_lora_inference(self.config)

    def test_quantization_serialization(self, tmp_path: Any) -> None:
        """What is saved loads to the same output."""
        self._test_quantization_serialization(self.config, tmp_path / "quantized")

    def test_quantization_config_serialization(self) -> None:
        """The config is JSON."""
        self._test_quantization_config_serialization(self.config)

    def test_quantized_layers(self) -> None:
        """Every linear is quantized."""
        self._test_quantized_layers(self.config)

    def test_quantization_modules_to_not_convert(self) -> None:
        """What is named stays in float, and takes more memory."""
        _skip_where_weights_are_wide()
        linears = [n for n, m in self._load_unquantized_model().named_modules() if isinstance(m, torch.nn.Linear)]
        if len(linears) < 2:
            pytest.skip("has no two linears")
        self._test_quantization_modules_to_not_convert(self.config, [linears[-1]])

    def test_quantization_device_map(self) -> None:
        """A device map places it."""
        self._test_quantization_cpu_device_map(self.config)

    def test_quantization_dequantize(self) -> None:
        """It becomes a float model again."""
        self._test_dequantize(self.config)

    def test_quantization_training(self) -> None:
        """Adapters upon its layers have gradients."""
        self._test_quantization_training(self.config)


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector: Any, name: str, obj: Any) -> Any:
    """A class of `LdmqTester` beside each configuration of a family's tests."""
    bases = [base.__name__ for base in inspect.getmro(obj)] if inspect.isclass(obj) else []
    if (
        name.endswith("TesterConfig")
        and "BaseModelTesterConfig" in bases[1:]
        and obj.__module__ == collector.obj.__name__
    ):
        from importlib import import_module

        package = collector.obj.__name__.split(".models.")[0]
        shared = import_module(f"{package}.models.testing_utils.quantization").QuantizationTesterMixin
        made = type(f"Test{name.removesuffix('TesterConfig')}Ldmq", (LdmqTester, obj), {"shared": shared})
        setattr(collector.obj, made.__name__, made)
        return [pytest.Class.from_parent(collector, name=made.__name__)]
    return None


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leave out what is about other quantizers, skip what does not apply, and have models quantized."""
    logging.getLogger("ldmq_kernels").setLevel(logging.ERROR)
    kept = [item for item in items if item.cls is not None and not any(word in item.cls.__name__ for word in OTHERS)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
    for item in items:
        reason = why_not(item.name, item.cls.__name__)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=f"does not apply: {reason}"))
        if isinstance(getattr(item.cls, "model_class", None), property):
            quantize_when_made(item.cls.model_class.fget(object.__new__(item.cls)))
