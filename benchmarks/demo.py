"""The demo with three seeds: what BCO adds to the fine-tuned model, and how long it takes.

python benchmarks/demo.py            about two minutes on two cores; writes results/demo.json
python benchmarks/demo.py --online   offline BCO and online UNA, about three minutes; writes results/demo_online.json
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
from pathlib import Path

from common import save, table

from bco_fast.cli import demo

COLUMNS = {
    "demo": ["case", "good_before", "good_after", "held_out_margin", "held_out_auc", "seconds", "peak_memory_mb"],
    "demo_online": ["case", "good_before", "good_offline", "good_online", "online_kl", "seconds"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--online", action="store_true", help="then online UNA from the same fine-tuned model")
    online = parser.parse_args().online
    name, run = ("demo_online", demo.run_online) if online else ("demo", demo.run)
    rows = []
    for seed in range(3):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            summary = run(Path(folder), seed=seed)
        summary.pop("output_dir", None)
        if not online:
            summary["auc_low"], summary["auc_high"] = summary.pop("held_out_auc_95")
        rows.append({"benchmark": name, "case": f"seed {seed}", **summary})
    print(f"\n{save(name, rows)}")
    print(table(rows, COLUMNS[name]))


if __name__ == "__main__":
    main()
