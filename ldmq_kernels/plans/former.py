"""Plans of versions 1 and 2, which had other words for a key and some schemes."""

from __future__ import annotations

from typing import Any

from ldmq_kernels.numerics.formats import FORMER_NAMES


def in_current_words(data: dict[str, Any]) -> dict[str, Any]:
    """A plan of version 1 or 2 with the key and the scheme names of version 3; what is no plan stays as it is."""
    if data["ldmq_plan"] not in (1, 2):
        return data
    data = {"timestep_groups" if key == "step_groups" else key: value for key, value in data.items()}

    def renamed(entry: Any) -> Any:
        if not isinstance(entry, dict) or not isinstance(entry.get("scheme"), str):
            return entry
        return {**entry, "scheme": FORMER_NAMES.get(entry["scheme"], entry["scheme"])}

    if isinstance(data.get("rules"), list):
        data["rules"] = [renamed(rule) for rule in data["rules"]]
    if isinstance(data.get("exceptions"), dict):
        data["exceptions"] = {name: renamed(entry) for name, entry in data["exceptions"].items()}
    return data
