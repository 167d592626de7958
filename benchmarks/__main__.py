"""Run all benchmarks, or those named on the command line."""

import importlib
import sys

NAMES = (
    "import_time",
    "engine_overhead",
    "picture_folder",
    "threads",
    "metrics",
    "unet",
    "diffusion_samplers",
    "flows",
    "gans",
    "gan_presets",
    "flow_tables",
)

for name in sys.argv[1:] or NAMES:
    importlib.import_module(f"benchmarks.{name}").main()
