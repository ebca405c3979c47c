"""What training costs on this machine.

    python tests/bench_train.py stages [--preset classroom]   lines a second, waiting and peak memory of every stage
    python tests/bench_train.py overhead [--stage idm]        the loop against a plain one, step by step in turns
    python tests/bench_train.py profile                       where the time of one IDM step goes

Adds what it found to data/benchmarks/train.json. Random weights serve as well as trained ones here. Steps of the
paper's networks, one line each, are measured by tests/bench_official.py.
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from itertools import cycle
from pathlib import Path

import torch
from torch import nn

from difftsr.evaluate import machine
from difftsr.model import DiffTSR, preset
from difftsr.text_lines import write_json
from difftsr.train import STAGES, TrainConfig, Trainer

ROOT = Path(__file__).resolve().parents[1]


def in_a_process(call) -> dict:
    """What `call` returns, from a process of its own, whose peak memory is its own."""
    with tempfile.NamedTemporaryFile("r") as answer:
        child = os.fork()
        if child == 0:
            try:
                found = call()
                found["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)
                Path(answer.name).write_text(json.dumps(found))
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        return json.loads(answer.read() or "{}")


def trainer(stage: str, name: str, folder: str, **options) -> Trainer:
    """A trainer of random networks that count as trained."""
    torch.manual_seed(0)
    model = DiffTSR(preset(name))
    model.untrained = [] if stage != "mom" else ["mom"]
    config = TrainConfig(stage, name, Path(folder), bar=False, steps=1000, warmup=1, **options)
    return Trainer(config, stage, model)


def seconds_of(steps: int, step) -> list[float]:
    """Durations of so many calls."""
    found = []
    for _ in range(steps):
        started = time.perf_counter()
        step()
        found.append(time.perf_counter() - started)
    return found


def cost(stage: str, name: str, steps: int, cache: int = 0) -> dict:
    """Lines a second of a stage with everything around it, data included, in one process."""
    with tempfile.TemporaryDirectory() as folder:
        walked = trainer(stage, name, folder, cache=cache)
        size = walked.settings.batch_size
        walked.take_step()
        walked.waited = 0.0
        seconds = seconds_of(steps, walked.take_step)
        return {
            "batch_size": size, "seconds_a_step": round(statistics.median(seconds), 3),
            "lines_per_second": round(size / statistics.median(seconds), 2),
            "waiting": round(walked.waited / sum(seconds), 3), "steps": steps,
        }  # fmt: skip


def overhead(stage: str, steps: int) -> dict:
    """Median seconds of a step of the loop and of a plain one, the same batches, in turns; data is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        walked, plain = (trainer(stage, "classroom", f"{folder}/{name}") for name in ("a", "b"))
        batches = [next(walked.batches) for _ in range(2)]
        walked.batches = cycle(batches)
        same, generator = cycle(batches), torch.Generator()
        (optimizer,) = plain.optimizers.values()
        parameters = plain.parameters[stage]

        def plain_step() -> None:
            ((loss, _, _),) = plain.stage.losses(plain.model, next(same), generator)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        seconds = {"loop": [], "plain": []}
        calls = {"loop": walked.take_step, "plain": plain_step}
        for call in calls.values():
            call()
        for turn in range(steps):
            for name in ("loop", "plain") if turn % 2 else ("plain", "loop"):
                seconds[name] += seconds_of(1, calls[name])
        average = seconds_of(5, lambda: walked.ema.update(walked.trained, 100))
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        return {
            "batch_size": walked.settings.batch_size, "steps": steps,
            **{f"seconds_{name}": round(value, 4) for name, value in medians.items()},
            "seconds_ema": round(statistics.median(average), 4),
            "ratio": round(statistics.median(a / b for a, b in zip(seconds["loop"], seconds["plain"])), 3),
        }  # fmt: skip


def profile(trace: Path | None) -> dict:
    """The operators that take most of one IDM step (after one that does not count), in percent of its time."""
    with tempfile.TemporaryDirectory() as folder:
        walked = trainer("idm", "classroom", folder)
        walked.batches = cycle([next(walked.batches)])
        walked.take_step()
        with torch.profiler.profile(record_shapes=bool(trace)) as found:
            walked.take_step()
        if trace:
            found.export_chrome_trace(str(trace))
        rows = found.key_averages()
        total = sum(row.self_cpu_time_total for row in rows)
        rows = sorted(rows, key=lambda row: -row.self_cpu_time_total)[:14]
        return {row.key: round(100 * row.self_cpu_time_total / total, 1) for row in rows} | {
            "seconds": round(total / 1e6, 3)
        }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("what", choices=("stages", "overhead", "profile"))
    options.add_argument("--preset", default="classroom")
    options.add_argument("--stage", choices=list(STAGES), nargs="*", default=None)
    options.add_argument("--steps", type=int, default=5)
    options.add_argument("--trace", type=Path, help="profile: write a trace for chrome://tracing")
    options.add_argument("--output", type=Path, default=ROOT / "data" / "benchmarks" / "train.json")
    chosen = options.parse_args()
    found = json.loads(chosen.output.read_text(encoding="utf-8")) if chosen.output.exists() else {}
    found |= {"machine": machine(), "torch": torch.__version__}
    if chosen.what == "stages":
        of_preset = found.setdefault("stages", {}).setdefault(chosen.preset, {})
        for stage in chosen.stage or STAGES:
            for cache in (0, 64) if stage == "idm" else (0,):  # latents, readings and pictures computed before
                row = f"{stage}, cached" if cache else stage
                of_preset[row] = in_a_process(lambda s=stage, c=cache: cost(s, chosen.preset, chosen.steps, c))
                print(f"{row:12s} {of_preset[row]}", flush=True)
                write_json(chosen.output, found)
    elif chosen.what == "overhead":
        for stage in chosen.stage or ("idm",):
            found.setdefault("overhead", {})[stage] = overhead(stage, chosen.steps)
            print(stage, found["overhead"][stage])
    else:
        found["profile"] = profile(chosen.trace)
        print(json.dumps(found["profile"], indent=1))
    write_json(chosen.output, found)


if __name__ == "__main__":
    main()
