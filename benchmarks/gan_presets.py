"""All presets of the adversarial family for the same training time: Fréchet distances over three seeds.

    python -m benchmarks.gan_presets [DATA] [seconds] [preset,preset,...]     digits, 20 s and all presets by default

This is `trilemma compare`; what is recorded are Fréchet distances in its features, fitted on the training split, of the
last (averaged) weights, with their standard error over samples, held-out data and training seeds. Set OMP_NUM_THREADS
to leave other work in peace. A comparison that stands in FOLDER already is read, or gone on with.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.common import record
from trilemma.adversarial.presets import PRESETS
from trilemma.comparison import compare
from trilemma.data import load_data

SEEDS = 3


def main(data: str = "digits", seconds: str = "20", names: str = "", folder: str = "") -> None:
    models = names.split(",") if names else [p.name for p in PRESETS]
    stem = Path(data).stem
    report = compare(load_data(data), models, budget=f"{seconds}s", seeds=SEEDS, out=folder or f"compare-gans-{stem}")
    rows = {}
    for row in report.rows:
        found = row.metrics.get("frechet")
        rows[row.model] = {"status": row.status, "seeds": len(row.seeds), "alarms": row.alarms}
        if found is not None:
            rows[row.model] |= {"frechet": found.value, "se": found.se, "overall": row.metrics["overall"].value}
    record(f"gan_presets_{stem}", {"seconds": float(seconds), "data": report.data, "models": rows})


if __name__ == "__main__":
    main(*sys.argv[1:])
