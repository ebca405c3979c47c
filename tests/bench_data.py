"""What lines cost: rendering, degrading, loading, in one run on one machine.

    python tests/bench_data.py [--part core | loaders] [--lines 96] [--output data/benchmarks/data.json]

Every rate is the median of several rounds; rates of one table are measured in turns, so that a busy moment of the
machine meets all of them alike. Rates a core are lines per second of *processor time* of one thread: others on the
machine hardly change them. Rates of loaders with workers go by the clock and want a quiet machine. A part renews its
own tables in the output file and leaves the others, each with the load that it met.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from difftsr import degradation as deg
from difftsr.dataset import SIZES, LinePool, SyntheticLines, make_loader
from difftsr.degradation import DegradationConfig, canvas_batch, degrade, degrade_batch, draw_recipe, to_canvas
from difftsr.evaluate import machine
from difftsr.idm import IDMStage, IDMTraining
from difftsr.model import DiffTSR
from difftsr.text_lines import VARIED, Alphabet, write_json

SIZE = SIZES["classroom"]
GOAL, CORES = 3000, 16  # lines a second, cores of the machine that is planned for
GROUP = 64  # lines that a GPU degrades together
LAUNCH, BANDWIDTH = 5e-6, 2e12  # assumed of that GPU: seconds to start a call, bytes a second of its memory


def rates(tasks: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Lines that each task makes in a second of its processor time: the median over rounds taken in turns."""
    measured: dict[str, list[float]] = {name: [] for name in tasks}
    for task in tasks.values():
        task()  # warm: fonts, tables, caches
    for _ in range(rounds):
        for name, task in tasks.items():
            start = time.process_time()
            count = task()
            measured[name].append(count / (time.process_time() - start))
    return {name: round(statistics.median(values), 1) for name, values in measured.items()}


def one_core(folder: Path, lines: int) -> dict[str, Callable[[], int]]:
    """Rendering and degrading; the two forms of degradation have the same canvases to do."""
    plain, varied = (SyntheticLines(Alphabet.classroom(), SIZE, looks=looks) for looks in (None, VARIED))
    canvases = np.stack([to_canvas(plain.line(index).hr, SIZE) for index in range(lines)])
    config, batch = DegradationConfig(strength="mixed"), 16
    tensor = torch.from_numpy(canvases).permute(0, 3, 1, 2).float() / 255
    pool = make_loader(LinePool.build(folder / "small", plain, 16, degradations=2, progress=False), 16)
    drawn = iter(range(10**9))  # new seeds in every round

    def render(source: SyntheticLines) -> int:
        for index in range(lines):
            source.line(index)
        return lines

    def each() -> int:
        for image in canvases:
            to_canvas(degrade(image, np.random.default_rng(next(drawn)), config).lr, SIZE)
        return lines

    def together() -> int:
        for start in range(0, lines, batch):
            part = tensor[start : start + batch]
            canvas_batch(degrade_batch(part, [next(drawn) for _ in part], config)[0], SIZE)
        return lines

    def prepare() -> int:
        for _ in range(lines):
            prepared(draw_recipe(SIZE, np.random.default_rng(next(drawn)), config))
        return lines

    def read() -> int:
        return len(next(pool)["hr"])

    return {
        "read_pool": read,
        "recipe_prepare": prepare,
        "render": lambda: render(plain),
        "render_varied": lambda: render(varied),
        "degrade_each": each,
        "degrade_batch_16": together,
    }


def loader_rate(dataset, workers: int, rounds: int, batches: int = 6) -> float:
    """Lines a second of whole batches of 16, once what the workers had made ahead is used up; median."""
    measured, stream = [], make_loader(dataset, 16, workers=workers)
    for _ in range(rounds):
        for _ in range(1 + 2 * workers):
            next(stream)
        start = time.perf_counter()
        for _ in range(batches):
            next(stream)
        measured.append(16 * batches / (time.perf_counter() - start))
    return round(statistics.median(measured), 1)


def loaders(folder: Path, lines: int, rounds: int) -> dict[str, float]:
    """Batches ready for a network: from a pool and rendered on the fly."""
    source = SyntheticLines(Alphabet.classroom(), SIZE)
    pool = LinePool.build(folder / "pool", source, lines, degradations=2, workers=2)
    return {
        "loader_pool": loader_rate(pool, 0, rounds),
        "loader_pool_2_workers": loader_rate(pool, 2, rounds),
        "loader_synthetic_2_workers": loader_rate(source, 2, rounds),
    }


def idm_step_seconds(folder: Path, rounds: int) -> float:
    """A training step of the classroom IDM at batch 16: latents, losses, gradients; median."""
    model = DiffTSR.from_pretrained("classroom")
    stage = IDMStage(IDMTraining(), model)
    batch = next(make_loader(LinePool(folder / "pool"), 16))
    generator, seconds = torch.Generator().manual_seed(0), []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        for loss, *_ in stage.losses(model, batch, generator):
            loss.backward()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def latent_rate(batch: int = 16) -> tuple[Callable[[], int], float]:
    """Encodes a batch with the classroom VAE; and the GFLOP that a line takes."""
    vae = DiffTSR.from_pretrained("classroom").vae.eval()
    x = torch.rand(batch, 3, *SIZE) * 2 - 1

    def encode() -> int:
        with torch.inference_mode():
            vae.encode(x)
        return batch

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.encode(x)
    return encode, counter.get_total_flops() / batch / 1e9


def prepared(recipe: deg.Recipe) -> int:
    """What the host computes for a GPU that follows a recipe, kernels and matrices; how many bytes it sends."""
    size, sent = SIZE, 0
    for step in recipe.steps:
        if step["op"] == "blur":
            sent += 4 * deg.recipe_kernel(**step["kernel"]).size
        elif step["op"] == "resize":
            if step["mode"] not in deg.TORCH_MODES:
                pairs = zip(size, step["size"], strict=True)
                sent += sum(4 * deg.resize_weights.__wrapped__(*pair, step["mode"]).numel() for pair in pairs)
            size = step["size"]
        elif step["op"] == "decimate":
            size = tuple(-(-side // step["every"]) for side in size)
    return sent


class Traffic(TorchDispatchMode):
    """Counts the calls of torch that compute, and the bytes of the tensors that they read and write."""

    def __init__(self):
        super().__init__()
        self.calls = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.calls += 1
            # the table of photon counts, int16, is read in a few places only
            tensors = (x for x in (*args, out) if isinstance(x, torch.Tensor) and x.dtype != torch.int16)
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return out


def device_work() -> dict[str, float]:
    """What a GPU is asked to do for one line in a group: counted, not timed, on the very calls that it would make."""
    source, config = SyntheticLines(Alphabet.classroom(), SIZE), DegradationConfig(strength="mixed")
    canvases = np.stack([to_canvas(source.line(index).hr, SIZE) for index in range(GROUP)])
    images = torch.from_numpy(canvases).permute(0, 3, 1, 2).float() / 255
    recipes = [draw_recipe(SIZE, np.random.default_rng(seed), config) for seed in range(GROUP)]

    def blur(lines, steps):
        return deg.correlate_batch(lines, [deg.recipe_kernel(**step["kernel"]) for step in steps])

    on_cpu = deg.OPERATIONS["blur"], deg.resized
    deg.OPERATIONS["blur"], deg.resized = blur, deg.torch_resized  # as on any other device
    try:
        with Traffic() as traffic:
            canvas_batch(deg.follow(images, recipes, together=GROUP), SIZE)
    finally:
        deg.OPERATIONS["blur"], deg.resized = on_cpu
    return {
        "lines_in_a_group": GROUP,
        "calls_a_line": round(traffic.calls / GROUP, 1),
        "megabytes_touched_a_line": round(traffic.bytes / GROUP / 1e6, 1),
        "kilobytes_sent_a_line": round((SIZE[0] * SIZE[1] * 3 + sum(map(prepared, recipes)) / GROUP) / 1e3, 1),
    }


def plan(core: dict[str, float], pool: float, device: dict[str, float], gigaflop: float) -> dict[str, float | str]:
    """Feeding GOAL lines a second from CORES cores and a GPU: what each way of doing it takes."""
    return {
        "lines_a_second": GOAL,
        "cores_to_render_and_degrade_each_line": round(GOAL / core["render"] + GOAL / core["degrade_each"], 1),
        "cores_to_degrade_a_cached_pool_on_cpu": round(GOAL / core["degrade_each"], 1),
        "cores_to_read_a_cached_pool": round(GOAL / pool, 2),
        "cores_to_prepare_recipes_for_the_device": round(GOAL / core["recipe_prepare"], 2),
        "hours_to_render_a_million_lines_on_16_cores": round(1e6 / core["render_varied"] / CORES / 3600, 2),
        "gigabytes_of_a_million_canvases": round(1e6 * SIZE[0] * SIZE[1] * 3 / 1e9, 1),
        "megabytes_a_second_to_the_device": round(GOAL * device["kilobytes_sent_a_line"] / 1e3, 1),
        "device_seconds_a_second_of_memory_traffic": round(
            GOAL * device["megabytes_touched_a_line"] * 1e6 / BANDWIDTH, 2
        ),
        "device_seconds_a_second_of_starting_calls": round(GOAL * device["calls_a_line"] * LAUNCH, 2),
        "teraflop_a_second_to_encode": round(GOAL * gigaflop / 1e3, 1),
        "not_measured": f"No GPU was at hand. The two device_seconds are counts, over {BANDWIDTH / 1e12:.0f} TB/s of "
        f"memory and {LAUNCH * 1e6:.0f} microseconds a call, both assumed.",
    }


def load() -> float:
    """How many tasks wanted a core in the last minute."""
    return round(os.getloadavg()[0], 1)


def core_part(folder: Path, options: argparse.Namespace) -> dict:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    before = load()
    encode, gigaflop = latent_rate()
    core = rates(one_core(folder, options.lines) | {"vae_encode_16": encode}, options.rounds)
    device = device_work()
    return {
        "load_average_of_cores": before,
        "lines_a_second_and_core": core,
        "device_work": device,
        "plan": plan(core, core["read_pool"], device, gigaflop),
    }


def loaders_part(folder: Path, options: argparse.Namespace) -> dict:
    before = load()
    loading = loaders(folder, options.lines, options.rounds)
    step = idm_step_seconds(folder, 1)
    return {
        "load_average_of_loaders": before,
        "lines_a_second": loading,
        "idm_step_seconds_batch_16": round(step, 2),
        "pool_loader_share_of_an_idm_step": round(16 / loading["loader_pool"] / step, 4),
    }


PARTS = {"loaders": loaders_part, "core": core_part}  # the loaders first: they want all threads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help="this one only; without it, all")
    parser.add_argument("--lines", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    kept = json.loads(options.output.read_text(encoding="utf-8")) if options.output and options.output.exists() else {}
    described = kept | {"machine": machine(), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        for name, part in PARTS.items():
            if options.part in (None, name):
                described |= part(Path(folder), options)
    print(json.dumps(described, indent=1))
    if options.output:
        write_json(options.output, described)


if __name__ == "__main__":
    main()
