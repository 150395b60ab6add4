"""What `ldmq demo` measures, on 500 held-out captions, kept as a results file: python benchmarks/demo_model.py"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import common
from ldmq_kernels.demo.run import RESULTS, run_demo


def main() -> None:
    """Run the demo in a scratch folder and write its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=int, default=500)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "demo"
        run_demo(out, arguments.captions)
        measured = json.loads((out / RESULTS).read_text())
    scores = measured["scores"]
    summary = {
        "weights/w8_share_of_fp16": measured["unet_bytes"]["ratio"],
        "unet_demo/sqnr_db": measured["sqnr"]["held_out_captions_db"],
        "unet_demo/psnr_db": scores["psnr_db"],
        "unet_demo/accuracy_float": scores["accuracy_before"]["all"],
        "unet_demo/accuracy_quantized": scores["accuracy_after"]["all"],
        "planning/seconds": measured["seconds"]["plan"],
    }
    print(f"written: {common.write_results('demo', [measured], summary)}")


if __name__ == "__main__":
    main()
