"""The study's picture: three measures against bytes, one mark a case, peers by numbers that are told below."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.study.cases import CALIBRATION, FORMATS, PEERS, PLANNER, SEARCH
from benchmarks.study.peers import OURS

PANELS = (
    ("sqnr_db", "SQNR of the model's output, dB", 1.0, False),
    ("evaluator_frechet", "Frechet distance in the evaluator's features", 1.0, True),
    ("attribute_accuracy", "attributes right, %", 100.0, False),
)
# colours of Okabe and Ito, which colour-blind readers can tell apart
KINDS = {
    FORMATS: ("one scheme everywhere", "o", "#0072B2"),
    CALIBRATION: ("other calibrations", "v", "#56B4E9"),
    SEARCH: ("parts of the search", "s", "#009E73"),
    PLANNER: ("published lists and plans", "D", "#E69F00"),
    PEERS: ("this package beside peers", "^", "#CC79A7"),
}
PEER = ("peers", "X", "#000000")
SMALLEST_FRECHET = 1e-4  # zero has no place on a logarithmic axis


def draw(data: dict[str, Any], path: Path) -> None:
    """Write the picture as SVG; the same data give the same bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = [row for row in data["rows"] if row["failed"] is None]
    with plt.rc_context({"svg.hashsalt": "study", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = plt.subplots(len(PANELS), 1, figsize=(9, 14), sharex=True, layout="constrained")
        for axis, (measure, label, factor, logarithmic) in zip(axes, PANELS, strict=True):
            axis.set_yscale("log" if logarithmic else "linear")
            for (name, marker, colour), members in _kinds(found):
                _marks(axis, members, measure, factor, {"marker": marker, "color": colour, "label": name})
            _number_peers(axis, found, measure, factor)
            if logarithmic:
                _cut_below(axis, found, measure)
            axis.set_ylabel(label)
            axis.grid(visible=True, linewidth=0.3)
        if "attribute_accuracy" in data["float"]:
            axes[-1].axhline(100 * data["float"]["attribute_accuracy"], color="#888888", linewidth=0.8)
        axes[-1].set_xlabel("bytes of the model's checkpoint, share of fp16")
        axes[0].legend(loc="upper left", fontsize=8)
        figure.supxlabel(_peer_names(found), x=0.08, ha="left", fontsize=8)
        figure.savefig(path, format="svg", metadata={"Date": None})
        plt.close(figure)


def _is_peer(row: dict[str, Any]) -> bool:
    return bool(row["tool"] != OURS)


def _kinds(found: list[dict[str, Any]]) -> list[tuple[tuple[str, str, str], list[dict[str, Any]]]]:
    kinds = [
        (kind, [row for row in found if row["section"] == section and not _is_peer(row)])
        for section, kind in KINDS.items()
    ]
    return [(kind, members) for kind, members in [*kinds, (PEER, list(filter(_is_peer, found)))] if members]


def _height(value: float, factor: float, measure: str) -> float:
    return max(value, SMALLEST_FRECHET) if measure == "evaluator_frechet" else value * factor


def _cut_below(axis: Any, found: list[dict[str, Any]], measure: str) -> None:
    """End a logarithmic axis a little below the smallest mark: the intervals of some reach to zero."""
    axis.set_ylim(bottom=0.5 * min(_height(row["figures"][measure]["value"], 1.0, measure) for row in found))


def _marks(axis: Any, members: list[dict[str, Any]], measure: str, factor: float, style: dict[str, str]) -> None:
    xs = [row["figures"]["share_of_fp16"] for row in members]
    intervals = [row["figures"][measure] for row in members]
    ys = [_height(each["value"], factor, measure) for each in intervals]
    ends = [[_height(each[end], factor, measure) for each in intervals] for end in ("low", "high")]
    below = [max(0.0, y - low) for y, low in zip(ys, ends[0], strict=True)]
    above = [max(0.0, high - y) for y, high in zip(ys, ends[1], strict=True)]
    axis.errorbar(xs, ys, [below, above], linestyle="none", markersize=5, elinewidth=0.7, alpha=0.8, **style)


def _number_peers(axis: Any, found: list[dict[str, Any]], measure: str, factor: float) -> None:
    """Numbers beside their marks, left and right in turn, since many marks have the same bytes."""
    peers = list(filter(_is_peer, found))
    order = sorted(range(len(peers)), key=lambda place: peers[place]["figures"][measure]["value"])
    for turn, place in enumerate(order):
        row = peers[place]
        point = (row["figures"]["share_of_fp16"], _height(row["figures"][measure]["value"], factor, measure))
        offset, side = ((-6, "right"), (6, "left"))[turn % 2]
        axis.annotate(
            str(place + 1), point, xytext=(offset, -3), textcoords="offset points", ha=side, fontsize=7, weight="bold"
        )


def _peer_names(found: list[dict[str, Any]]) -> str:
    peers = enumerate(filter(_is_peer, found), 1)
    return "\n".join(f"{place}  {row['tool']}, {row['configuration']}" for place, row in peers)
