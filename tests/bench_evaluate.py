"""The report of the committed weights, without its lines, and what a run costs: what lessons 14e and 14f show.

    python tests/bench_evaluate.py [REPORT] [--output data/benchmarks/evaluate.json]
    python tests/bench_evaluate.py --time quick|full [--cache FOLDER] [--seconds N]

REPORT is a folder that `python -m difftsr.evaluate` wrote; without one, data/eval/test is measured first (into
out/test, which takes minutes, and only seconds where the cache has everything). The report of an ablation goes to
data/benchmarks/ablation.json.

--time runs data/eval/test with one judge and records wall and processor seconds in data/benchmarks/evaluate_time.json.
A run of --seconds N is stopped after that time; the same command takes it up where it stopped (--cache says where the
results lie; a new and empty folder starts a new run), and its parts add up.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from difftsr.evaluate import EvaluateConfig, evaluate, machine
from difftsr.report import read_report, summary
from difftsr.text_lines import write_atomically, write_json

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "data" / "benchmarks"
TIMES = BENCHMARKS / "evaluate_time.json"


def store(report: dict, output: Path | None) -> None:
    """Write a report without its lines, a row on a line."""
    ablation = bool(report["effects"])
    kinds = ("all",) if ablation else ("all", "strength", "characters")
    report["line_count"] = len({record["file"] for record in report.pop("lines")})
    report["figures"] = [row for row in report["figures"] if row["kind"] in kinds]
    print(summary(report))
    rows = json.dumps(report, ensure_ascii=False, separators=(",", ":")).replace("},{", "},\n{")
    write_atomically(output or BENCHMARKS / ("ablation.json" if ablation else "evaluate.json"), (rows + "\n").encode())


def measure_time(kind: str, cache: Path, seconds: float | None) -> None:
    """Run the command on data/eval/test, at most so many seconds, and add what it took to the parts of its run."""
    command = [sys.executable, "-m", "difftsr.evaluate", "--cache", str(cache), "--output", str(cache / "report")]
    command += ["--judges", "v6", *(["--quick"] if kind == "quick" else [])]
    fresh, started = not cache.exists(), time.perf_counter()
    try:
        done = subprocess.run(command, timeout=seconds).returncode == 0
    except subprocess.TimeoutExpired:
        done = False
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    part = {
        "wall_seconds": round(time.perf_counter() - started), "cpu_seconds": round(used.ru_utime + used.ru_stime),
        "load_at_end": round(os.getloadavg()[0], 1), "finished": done,
    }  # fmt: skip
    times = json.loads(TIMES.read_text(encoding="utf-8")) if TIMES.exists() else {}
    parts = ([] if fresh else times.get(kind, {}).get("parts", [])) + [part]
    totals = {name: sum(p[name] for p in parts) for name in ("wall_seconds", "cpu_seconds")}
    write_json(TIMES, times | {kind: {"machine": machine(), "finished": done, **totals, "parts": parts}})
    print(f"{kind}: {totals['wall_seconds']} s, {totals['cpu_seconds']} of a processor, "
          f"{'finished' if done else 'not finished: run it again'}")  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("report", type=Path, nargs="?")
    options.add_argument("--output", type=Path)
    options.add_argument("--time", choices=["quick", "full"])
    options.add_argument("--cache", type=Path, default=ROOT / ".cache" / "evaluate-time")
    options.add_argument("--seconds", type=float)
    chosen = options.parse_args()
    if chosen.time:
        measure_time(chosen.time, chosen.cache, chosen.seconds)
    else:
        store(read_report(chosen.report) if chosen.report else evaluate(EvaluateConfig()), chosen.output)


if __name__ == "__main__":
    main()
