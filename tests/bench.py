"""What a restoration costs on this machine, beside the machine's measured convolution rate.

    python tests/bench.py [speed] [memory] [--weights classroom] [--repeats 5] [--output data/benchmarks/restore.json]

Prints medians, and writes them with the name of the machine; what is not measured this time stays as it was. Random
weights serve as well as trained ones for speed, and are used where the named weights are missing. Memory is the peak
of a fresh process of the command, for inputs from tiny to the largest that is allowed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from difftsr.dataset import MAX_PIXELS
from difftsr.evaluate import machine
from difftsr.faster import median_seconds
from difftsr.model import DiffTSR, preset
from difftsr.restore import load_image, restore
from difftsr.text_lines import write_json

ROOT = Path(__file__).resolve().parents[1]


def convolution_rate(repeats: int) -> float:
    """GFLOP/s of a 3 x 3 convolution of 96 channels on a 64 x 256 map, channels last, float32."""
    conv = nn.Conv2d(96, 96, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(4, 96, 64, 256).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        seconds = median_seconds(lambda: conv(x), repeats)
    return 2 * 96 * 96 * 9 * x.shape[0] * 64 * 256 / seconds / 1e9


def peak_megabytes(command: list[str]) -> float:
    """The largest resident memory of a process, in MB; an error where it fails."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"failed: {' '.join(command)}")
    return usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)  # macOS counts bytes, Linux kilobytes


def memory(weights: str) -> dict:
    """Peak memory of `difftsr-restore` for a line of 40 x 160, the largest line and a page of 16 million pixels."""
    wide = 8 * int((MAX_PIXELS / 8) ** 0.5)
    inputs = {
        "line_160x40": (Image.new("RGB", (160, 40), "white"), []),
        f"line_{wide}x{wide // 8}_alpha": (Image.new("RGBA", (wide, wide // 8), (0, 0, 0, 90)), []),
        "page_4000x4000_x2": (Image.new("RGB", (4000, 4000), "white"), ["--page", "--scale", "2"]),
    }
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (image, extra) in inputs.items():
            image.save(f"{folder}/{name}.png", compress_level=1)
            words = [f"{folder}/{name}.png", "--output", f"{folder}/out", "--weights", weights, *extra]
            found[f"peak_mb_{name}"] = round(peak_megabytes([sys.executable, "-m", "difftsr.restore", *words]))
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("what", nargs="*", default=["speed", "memory"], metavar="speed|memory")
    options.add_argument("--weights", default="classroom")
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--output", type=Path, default=ROOT / "data" / "benchmarks" / "restore.json")
    chosen = options.parse_args()
    if unknown := set(chosen.what) - {"speed", "memory"}:
        options.error(f"unknown: {', '.join(sorted(unknown))}; speed or memory")
    found = json.loads(chosen.output.read_text(encoding="utf-8")) if chosen.output.exists() else {}
    if "speed" in chosen.what:
        found = speed(chosen) | {name: value for name, value in found.items() if name.startswith("peak_mb")}
    if "memory" in chosen.what:
        found |= memory(chosen.weights)
    for name, value in found.items():
        print(f"{name:36s} {value}")
    write_json(chosen.output, found)


def speed(chosen: argparse.Namespace) -> dict:
    """Seconds a line in each mode, and what the machine can do."""
    try:
        model = DiffTSR.from_pretrained(chosen.weights)
    except ValueError:
        model = DiffTSR(preset("classroom")).eval()
    sample = ROOT / "data" / "samples" / "lr" / "05.png"
    image = load_image(sample) if sample.exists() else np.full((32, 128, 3), 128, np.uint8)
    found = {"machine": machine(), "torch": torch.__version__, "repeats": chosen.repeats}
    found["convolution_gflops"] = round(convolution_rate(chosen.repeats), 1)
    for mode in ("full", "baseline", "no-text"):
        for steps in sorted({model.config.steps, 4, 20}):
            seconds = median_seconds(lambda m=mode, s=steps: restore(model, image, mode=m, steps=s), chosen.repeats)
            found[f"seconds_a_line_{mode}_{steps}_steps"] = round(seconds, 3)
    return found


if __name__ == "__main__":
    main()
