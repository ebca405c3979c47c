"""Kills a training run at random moments, resumes it each time, and compares its end with that of a run left alone.

    python tests/kill_and_resume.py [--kills 20] [--seed 0] [--output data/benchmarks/resume.json]

The tiny text diffusion with the variational bound: its importance sampler has a state of its own. It draws by what it
has seen once every noise level came more than ten times; there are 100 levels here instead of 1,000, so that this is
halfway through the run. The signals are SIGKILL, SIGTERM and SIGINT in turn, a random time after the start or after one
of the next few checkpoints; every fifth run moreover meets a full disk (a limit on the size of files), so that none of
its checkpoints can be written. Networks, averages, optimizers and sampler must be equal to the last bit in the end.
Adds a series to the output.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import signal
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from difftsr import train as training
from difftsr.evaluate import machine
from difftsr.model import DiffTSR, ModelConfig, preset
from difftsr.runs import checkpoints
from difftsr.text_lines import write_json

ROOT = Path(__file__).resolve().parents[1]
LEVELS = 100
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def start(arguments: list[str], log: Path, full_disk: bool = False) -> int:
    """A training run in a process of its own; returns its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        if full_disk:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        with open(log, "a", encoding="utf-8") as said:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                status = training.main(arguments)
    except SystemExit as leaving:
        status = leaving.code
    except KeyboardInterrupt:
        status = 130
    finally:
        os._exit(status)


def few_levels(name: str) -> ModelConfig:
    """The preset with so few noise levels of the text that a short run sees each often enough."""
    config = preset(name)
    return replace(config, tdm=replace(config.tdm, timesteps=LEVELS))


def had_begun(state: dict) -> bool:
    """Whether importance sampling has begun in this checkpoint."""
    return bool((state["auxiliary"]["importance"]["count"] > 10).all())


def equal(a, b) -> bool:
    """Whether two parts of a checkpoint are the same, tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--steps", type=int, default=300)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--output", type=Path, default=ROOT / "data" / "benchmarks" / "resume.json")
    chosen = options.parse_args()
    draw = random.Random(chosen.seed)
    training.preset = few_levels  # in the processes that are forked from here
    import torch._dynamo  # noqa: F401  an optimizer wants it; once here saves it in every process
    with tempfile.TemporaryDirectory() as folder:
        weights, log = Path(folder) / "weights", Path(folder) / "log"
        model = DiffTSR(few_levels("tiny"))
        model.untrained = ["tdm", "mom"]  # what the others say means nothing, and is the same in every run
        model.save(weights)
        common = ["--stage", "tdm", "--preset", "tiny", "--no-bar", "--init", str(weights)]
        common += ["--steps", str(chosen.steps), "--batch-size", "16", "--cache", "32", "--overrides", "loss", "bound"]
        common += ["--checkpoint-every", "5", "--validate-every", "0"]
        whole, cut = Path(folder) / "whole", Path(folder) / "cut"
        began = time.monotonic()
        assert os.waitpid(start([*common, "--output", str(whole)], log), 0)[1] == 0, log.read_text()
        alone = time.monotonic() - began
        print(f"left alone: {alone:.1f} s", flush=True)
        kills, saved = [], cut / "checkpoints" / "tdm"
        while len(kills) < chosen.kills:
            number, full = SIGNALS[len(kills) % 3], len(kills) % 5 == 4
            before = [file.name for file in checkpoints(saved)]
            child = start([*common, "--output", str(cut), "--resume"], log, full)
            more = 0 if full else draw.randrange(4)  # checkpoints that are awaited; without, a moment of the start
            while more and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:  # it runs
                if len([file for file in checkpoints(saved) if file.name not in before]) >= min(more, 2):
                    break  # two are kept
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.3 if more else alone / 4))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            after = checkpoints(saved)
            assert not before or after, "the checkpoints before are gone"
            half = len(list(saved.glob(".*.tmp")))
            kills.append({
                "signal": number.name, "full_disk": full, "status": status, "half_written_left": half,
                "newest": int(after[-1].stem[5:]) if after else None,
                "importance_sampling": bool(after) and had_begun(torch.load(after[-1], weights_only=True)),
            })  # fmt: skip
            print(kills[-1], flush=True)
            if status == 0:
                print("the run ended before it was killed", flush=True)
                kills.pop()
                break
        assert os.waitpid(start([*common, "--output", str(cut), "--resume"], log), 0)[1] == 0, log.read_text()
        a, b = (torch.load(checkpoints(run / "checkpoints" / "tdm")[-1], weights_only=True) for run in (whole, cut))
        parts = {kind: equal(a[kind], b[kind]) for kind in ("networks", "ema", "optimizers", "auxiliary", "step")}
        found = {
            "machine": machine(), "torch": torch.__version__, "steps": a["step"], "kills": kills, "equal": parts,
            "noise_levels": LEVELS,
            "kills_after_importance_sampling_began": sum(kill["importance_sampling"] for kill in kills),
            "lines_about_a_full_disk": log.read_text(encoding="utf-8").count("could not be written"),
        }  # fmt: skip
    print(json.dumps({key: value for key, value in found.items() if key != "kills"}, indent=1))
    if not all(parts.values()):
        raise SystemExit("the ends differ")
    known = json.loads(chosen.output.read_text(encoding="utf-8")) if chosen.output.exists() else []
    write_json(chosen.output, [*known, found | {"seed": chosen.seed}])


if __name__ == "__main__":
    main()
