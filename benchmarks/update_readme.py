"""Write the README's section "Measured" from the newest results files: python benchmarks/update_readme.py

Each kind of result (`<date>-<what>.json`) has one function here that turns it into Markdown; the
newest file of a kind wins, for each device.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
START, END = "<!-- measured -->", "<!-- /measured -->"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _source(path: Path, data: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {data[k]}" for k in ("torch", "triton", "cuda") if data.get(k))
    commit = (data.get("commit") or "no commit")[:10]
    where = f"{data['device']}, {data.get('threads', '?')} threads, {versions}, {data['date'][:10]}, commit {commit}"
    return f"{where}: [{path.name}]({path.relative_to(ROOT)})."


def _unet_sd15_cpu(data: dict[str, Any]) -> str:
    names = {
        "unet_sd15_cpu/vs_fp32": "W8A8 over float32, times as fast",
        "unet_sd15_cpu/vs_bf16": "W8A8 over bfloat16, times as fast",
        "unet_sd15_cpu/peak_memory_share": "peak memory, share of float32's",
    }
    rows = [[words, f"{data['summary'][key]:.2f}"] for key, words in names.items() if key in data["summary"]]
    return "**A UNet of SD 1.5's size on a CPU** (random weights, 64x64 latents, batch 1)\n\n" + _table(["", ""], rows)


def _demo(data: dict[str, Any]) -> str:
    measured = data["rows"][0]
    scores, layers = measured["scores"], measured["layers"]
    kinds = ("convolutions", "linears")
    rows = [
        ["quantized", ", ".join(f"{layers['quantized_' + kind]} of {layers[kind]} {kind}" for kind in kinds)],
        ["bytes of UNet weights", f"{measured['unet_bytes']['ratio']:.3f}x of fp16"],
        ["SQNR of the UNet output, held-out prompts", f"{measured['sqnr']['held_out_captions_db']:.1f} dB"],
        ["PSNR of the pictures against float", f"{scores['psnr_db']:.1f} dB"],
        *(
            [f"attributes right, {kind}: float, quantized", f"{share:.1%}, {scores['accuracy_after'][kind]:.1%}"]
            for kind, share in scores["accuracy_before"].items()
        ),
        *([f"{t['what']}, speed against float32", f"{t['speedup']:.2f}x"] for t in measured["times"]),
        ["planning", f"{measured['seconds']['plan']:.0f} s"],
    ]
    return f"**The demo model** ({measured['captions']} held-out captions)\n\n" + _table(["", ""], rows)


def _rivals(data: dict[str, Any]) -> str:
    header = ["", "convolutions", "linears", "of fp16", "UNet SQNR", "PSNR", "attributes", "ms a call"]
    rows = []
    for row in data["rows"]:
        name = " ".join(part for part in (row["tool"], row["version"], row["configuration"]) if part)
        found = row["figures"]
        if row["failed"]:
            rows.append([name, "failed", *[""] * 6])
            continue
        layers = [
            f"{found[kind]['stored']} / {found[kind]['computed']}" if kind in found else "0 / 0"
            for kind in ("convolutions", "linears")
        ]
        quality = [f"{found[key]:.1f} dB" if key in found else "" for key in ("sqnr_db", "psnr_db")]
        share, right = f"{found['share_of_fp16']:.3f}x", f"{found['attribute_accuracy']:.1%}"
        rows.append([name, *layers, share, *quality, right, f"{found['ms']:.1f}"])
    words = "Layers: with 8-bit weights / multiplying in 8 bits; the demo model, held-out captions, one run."
    return f"**Beside other tools.** {words}\n\n" + _table(header, rows)


def _op(data: dict[str, Any]) -> str:
    rows = []
    for row in data["rows"]:
        shape = ", ".join(f"{name} {value}" for name, value in row["shape"].items())
        share = row.get("share_of_peak") or row.get("share_of_copy_bandwidth")
        speed = f"{row['tops']:.0f} TOPS" if "tops" in row else f"{row['gbps']:.0f} GB/s"
        rivals = ", ".join(f"{name} {rival['ratio']:.2f}x" for name, rival in row["rivals"].items())
        rows.append([shape, str(row["count"]), f"{row['ms']:.3f}", speed, f"{share:.0%}" if share else "", rivals])
    header = ["shape", "calls", "ms", "speed", "of the peak or a copy", "times as fast as"]
    return f"**{data['rows'][0]['op']}**\n\n" + _table(header, rows)


def _model(data: dict[str, Any]) -> str:
    row = data["rows"][0]
    rows = [[name, f"{value:.2f}"] for name, value in sorted(row["ms"].items(), key=lambda pair: pair[1])]
    words = (
        f"**{row['op']}**, one call, {row['dtype']}, random weights; weights {row['weight_share_of_fp16']:.2f}x of fp16"
    )
    return f"{words}\n\n" + _table(["", "ms"], rows)


def _ceilings(data: dict[str, Any]) -> str:
    rows = [
        [row["name"], ", ".join(f"{name} {value:.0f}" for name, value in row["tops"].items()), "10^12 a second"]
        if "tops" in row
        else [row["name"], f"{row['gbps']:.0f}", "GB/s"]
        for row in data["rows"]
    ]
    return "**What the device can do**\n\n" + _table(["", "", ""], rows)


def _host_time(data: dict[str, Any]) -> str:
    rows = [[op, f"{value:.0f}"] for op, value in data["rows"][0]["us"].items()]
    return "**Host time of a call on small operands**\n\n" + _table(["op", "us"], rows)


def _cold_start(data: dict[str, Any]) -> str:
    seconds = data["rows"][0]["seconds"]
    return "**First call of an SD 1.5 UNet**\n\n" + _table(
        ["Triton cache", "seconds"], [[name, f"{value:.1f}"] for name, value in seconds.items()]
    )


def _compilations(data: dict[str, Any]) -> str:
    rows = [
        [row["op"], row["scheme"], str(row["launches"]), str(row["kernels"]), f"{row['compile_seconds']:.0f}"]
        for row in data["rows"]
    ]
    words = "**What a cold Triton cache costs**: one UNet call for sm_90, compiled on one core without a GPU"
    return f"{words}\n\n" + _table(["", "scheme", "launches", "distinct kernels", "seconds to compile"], rows)


def _method(data: dict[str, Any]) -> str:
    estimates = [
        [
            row["scheme"],
            f"{row['spearman']:.3f}",
            f"{row['spearman_of_own_noise']:.2f}",
            f"{row['sum_exact_db']:.1f} / {row['sum_estimated_db']:.1f} dB",
        ]
        for row in data["rows"]
        if row["op"] == "estimate"
    ]
    plans = [
        [
            ", ".join(row["formats"]),
            f"{row['target_db']:.1f}",
            f"{row['predicted_db']:.1f}",
            f"{row['measured_db']:.1f}",
            f"{row['share_of_fp16']:.3f}x",
            f"{row['seconds']:.0f}",
        ]
        for row in data["rows"]
        if row["op"] == "plan"
    ]
    steps = next(row for row in data["rows"] if row["op"] == "single_step")
    return "\n\n".join(
        [
            "**What the planner knows** (the demo model): noise of each layer at the UNet's output, estimated by "
            "backward probes and run one by one",
            _table(
                ["scheme", "rank correlation", "of layers' own noise", "sum over layers, run / estimated"], estimates
            ),
            _table(["formats", "asked, dB", "predicted", "held out", "of fp16", "seconds"], plans),
            f"Calibration on one step takes {steps['seconds_first_step']:.1f} s, on all "
            f"{steps['seconds_all_steps']:.1f} s; {steps['time_sensitive']} of {steps['layers']} layers lose more than "
            f"1 dB by it, and {steps['missed']} of these after the search, which knows the ranges of later steps.",
        ]
    )


def _plan_large(data: dict[str, Any]) -> str:
    row = data["rows"][0]
    name = {"plan_sd15": "Stable Diffusion 1.5's", "plan_sdxl": "SDXL's"}[row["op"]]
    words = (
        f"**The method at {name} size** ({row['parameters'] / 1e6:.0f} million random weights in {row['dtype']}, "
        f"{row['prompts']} prompts, {row['steps']} steps, {row['pixels']} pixels, {data['threads']} threads)"
    )
    stages = [f"{row[f'{stage}_seconds'] / 60:.1f}" for stage in ("calibration", "analysis", "plan")]
    cells = [*stages, f"{row['seconds'] / 60:.1f}", f"{row['peak_bytes'] / 2**30:.1f}"]
    cells += [str(row["candidates"]), f"{row['predicted_db']:.1f} / {row['measured_db']:.1f} dB"]
    head = ["calibration, min", "analysis", "plan", "all", "peak GiB", "choices", "predicted / held out"]
    return f"{words}\n\n" + _table(head, [cells])


def _study(data: dict[str, Any]) -> str:
    rows = [
        [
            row["name"],
            f"{row['figures']['share_of_fp16']:.3f}x",
            f"{row['figures']['sqnr_db']['value']:.1f} dB",
            f"{row['figures']['psnr_db']['value']:.1f} dB",
        ]
        for row in data["rows"]
        if row["failed"] is None and row["section"] in ("formats", "planner")
    ]
    words = "**The study** of the demo model; intervals, other measures and what did not help: [docs/study.md]"
    return f"{words}(docs/study.md)\n\n" + _table(["", "of fp16", "UNet SQNR", "PSNR"], rows)


KINDS: dict[str, Callable[[dict[str, Any]], str]] = {
    "ceilings": _ceilings,
    "cold_start": _cold_start,
    "compilations": _compilations,
    "demo": _demo,
    "host_time": _host_time,
    "method": _method,
    "plan_sd15": _plan_large,
    "plan_sdxl": _plan_large,
    "rivals": _rivals,
    "study": _study,
    "unet_sd15_cpu": _unet_sd15_cpu,
    **{f"model_{name}": _model for name in ("sd15", "sdxl", "vae_decoder")},
    **{path.stem.removeprefix("bench_"): _op for path in Path(__file__).parent.glob("bench_*.py")},
}
LEFT_OUT = ("host_time",)  # of the README: for those who work on the kernels


def kind_of(path: Path) -> str:
    """What a results file holds, by its name."""
    return re.sub(r"^\d{4}-\d{2}-\d{2}-", "", path.stem)


def main() -> None:
    """Replace what stands between the two marks."""
    newest: dict[tuple[str, str], Path] = {}
    for path in sorted((ROOT / "benchmarks" / "results").glob("*/*.json")):
        newest[kind_of(path), path.parent.name] = path
    parts = []
    for (what, _), path in sorted(newest.items()):
        if what in KINDS and what not in LEFT_OUT:
            data = json.loads(path.read_text())
            parts.append(f"{KINDS[what](data)}\n\n{_source(path, data)}")
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(START)
    readme.write_text(f"{before}{START}\n" + "\n\n".join(parts) + f"\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
