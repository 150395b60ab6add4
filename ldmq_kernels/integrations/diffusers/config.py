"""The `quantization_config` of a diffusers model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from ldmq_kernels.conversion.pipeline import as_plan
from ldmq_kernels.integrations.diffusers.integrity import SAVE_AGAIN, CheckpointError, check_form, plan_checksum
from ldmq_kernels.plans.plan import Plan, PlanError, check_uniform, uniform_plan


class LdmqMethod(str, Enum):  # noqa: UP042  diffusers looks its members up as plain strings, and prints `.value`
    """How diffusers names this package."""

    LDMQ = "ldmq"


class LdmqConfig(QuantizationConfigMixin):
    """How to quantize a model while it is loaded, or how it was quantized when it was saved.

        UNet2DConditionModel.from_pretrained(folder, quantization_config=LdmqConfig("w8a8-dynamic"))

    Args:
        scheme: one scheme for all layers that have it; it needs no calibration, so it cannot be static.
        plan: a plan, the path of its file, or its JSON object; instead of `scheme`.
        modules_to_not_convert: names of what stays in float beside a scheme, see `plans.plan.uniform_plan`.
        checksums: of the tensors beside a config.json, see `integrity.checksums`.

    Raises:
        PlanError: neither or both are given, the scheme is unknown or static, the plan is damaged, or what stays in
            float is named beside a plan.
    """

    def __init__(
        self,
        scheme: str | None = None,
        plan: Plan | str | Path | Mapping[str, Any] | None = None,
        checksums: Mapping[str, Any] | None = None,
        quant_method: str = LdmqMethod.LDMQ,
        modules_to_not_convert: Sequence[str] | None = None,
    ) -> None:
        self.quant_method = LdmqMethod(quant_method)
        if (scheme is None) == (plan is None):
            raise PlanError("LdmqConfig takes either a scheme, such as 'w8a8-dynamic', or a plan")
        if scheme is not None:
            check_uniform(scheme)
        if plan is not None and modules_to_not_convert:
            raise PlanError("modules_to_not_convert goes with a scheme: a plan says itself what stays in float")
        self.modules_to_not_convert = list(modules_to_not_convert or ())
        self.scheme = scheme
        self.plan = None if plan is None else as_plan(plan, "the plan in quantization_config")
        self.checksums = checksums

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """What a config.json says, which holds the plan itself and names no file.

        Raises:
            PlanError: an entry is unknown, or the plan is no object.
            CheckpointError: the plan is not the one that was saved.
        """
        unknown = sorted(config_dict.keys() - {"quant_method", "scheme", "plan", "checksums", "modules_to_not_convert"})
        if unknown:
            raise PlanError(
                f"quantization_config has an unknown entry {unknown[0]!r}: remove it, or upgrade ldmq_kernels"
            )
        plan, checksums = config_dict.get("plan"), config_dict.get("checksums")
        if not isinstance(plan, Mapping | None):
            raise PlanError(
                f"the plan in quantization_config is {repr(plan)[:80]}, an object is needed: a config.json holds the "
                "plan itself and names no file"
            )
        if checksums is not None:
            check_form(checksums)
        config = super().from_dict(config_dict, *args, **kwargs)
        if checksums is not None and (plan is None or checksums.get("plan") != plan_checksum(plan)):
            raise CheckpointError(
                f"the plan in quantization_config is not the one that the checkpoint was saved with: {SAVE_AGAIN}"
            )
        return config

    def plan_for(self, model: nn.Module) -> Plan:
        """The plan itself, or the one that the scheme makes for this model."""
        if self.plan is not None:
            return self.plan
        assert self.scheme is not None
        return uniform_plan(model, self.scheme, self.modules_to_not_convert)

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds; vectors are among the checkpoint's tensors."""
        method = self.quant_method.value
        if self.plan is None:
            left = {"modules_to_not_convert": self.modules_to_not_convert} if self.modules_to_not_convert else {}
            return {"quant_method": method, "scheme": self.scheme, **left}
        said = {} if self.checksums is None else {"checksums": self.checksums}
        return {"quant_method": method, "plan": self.plan.without_vectors().to_dict(), **said}

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: there are no defaults to leave out."""
        return self.to_dict()

    def __repr__(self) -> str:
        if self.plan is None:
            return f"LdmqConfig(scheme={self.scheme!r})"
        return f"LdmqConfig(plan for {self.plan.model['class']}, {self.plan.model['layers']} layers)"


def refuse_disk(device_map: Any) -> None:
    """Refuse to leave quantized layers on disk.

    Args:
        device_map: of a loader, module -> device, "" being the whole model; a loader has no map as well.

    Raises:
        ValueError: it says "disk" somewhere.
    """
    if isinstance(device_map, dict) and "disk" in device_map.values():
        where = ", ".join(name or "the whole model" for name, device in device_map.items() if device == "disk")
        raise ValueError(
            f"device_map puts {where} on disk, quantized layers stay in memory: use cpu there, or a larger max_memory"
        )
