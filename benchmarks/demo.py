"""The demo with three seeds: what BCO adds to the fine-tuned model, and how long it takes.

python benchmarks/demo.py            about two minutes on two cores; writes results/demo.json
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path

from common import save, table

from bco_fast import demo


def main() -> None:
    rows = []
    for seed in range(3):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            summary = demo.run(Path(folder), seed=seed)
        del summary["output_dir"]
        rows.append({"benchmark": "demo", "case": f"seed {seed}", **summary})
    print(f"\n{save('demo', rows)}")
    print(
        table(
            rows, ["case", "good_before", "good_after", "held_out_margin", "held_out_auc", "seconds", "peak_memory_mb"]
        )
    )


if __name__ == "__main__":
    main()
