"""The report of the committed weights, without its lines: what lesson 14 shows.

    python tests/bench_evaluate.py [REPORT] [--output data/benchmarks/evaluate.json]

REPORT is a folder that `python -m difftsr.evaluate` wrote; without one, data/eval/test is measured first (into
out/test, which takes minutes, and only seconds where the cache has everything).
"""

import argparse
import json
from pathlib import Path

from difftsr.evaluate import EvaluateConfig, evaluate
from difftsr.report import read_report, summary
from difftsr.text_lines import write_atomically

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("report", type=Path, nargs="?")
    options.add_argument("--output", type=Path, default=ROOT / "data" / "benchmarks" / "evaluate.json")
    chosen = options.parse_args()
    report = read_report(chosen.report) if chosen.report else evaluate(EvaluateConfig())
    report["line_count"] = len({record["file"] for record in report.pop("lines")})
    report["figures"] = [row for row in report["figures"] if row["kind"] in ("all", "strength", "characters")]
    print(summary(report))
    rows = json.dumps(report, ensure_ascii=False, separators=(",", ":")).replace("},{", "},\n{")  # a row on a line
    write_atomically(chosen.output, (rows + "\n").encode())


if __name__ == "__main__":
    main()
