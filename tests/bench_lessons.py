"""What the lessons take: seconds, memory, cells, lines and words, each lesson run in a fresh kernel, one after another.

    python tests/bench_lessons.py [NAME ...]
    python tests/maintain.py needs               write the figures into the lessons and the README

Writes data/benchmarks/lessons.json; lessons that are not named stay as they were. Nothing is stored in the notebooks.
Run it on a quiet machine with two cores. Seconds are those from the start of the kernel to its last cell; peak_mb is
the largest resident set of the kernel itself, without processes that it starts.
"""

import argparse
import json
import statistics
import time

import nbformat
from tqdm import tqdm

from difftsr.evaluate import machine
from difftsr.text_lines import write_json
from maintain import BENCHMARK, LESSONS, client_for, lessons, read_notebook, tags

PEAK = """\
import resource as _resource, sys as _sys
print(_resource.getrusage(_resource.RUSAGE_SELF).ru_maxrss / (2**20 if _sys.platform == "darwin" else 2**10))"""


def texture(notebook: nbformat.NotebookNode) -> dict[str, float]:
    """How a lesson reads: its cells, the median of their code lines, and words of prose for each line of code.

    The set-up cell, the badge and empty lines do not count.
    """
    cells = [cell for cell in notebook.cells if not {"setup", "badge"} & set(tags(cell))]
    code = [sum(bool(line.strip()) for line in c.source.splitlines()) for c in cells if c.cell_type == "code"]
    words = sum(len(cell.source.split()) for cell in cells if cell.cell_type == "markdown")
    return {
        "cells": len(cells),
        "median_code_lines": statistics.median(code),
        "words_per_code_line": round(words / sum(code), 1),
    }


def measure(name: str) -> dict[str, float]:
    """Run a copy of a lesson; a failing cell raises."""
    notebook = read_notebook(LESSONS / f"{name}.ipynb")
    found = texture(notebook)
    notebook.cells.append(nbformat.v4.new_code_cell(PEAK))
    start = time.perf_counter()
    client_for(notebook).execute()
    seconds = time.perf_counter() - start
    return {"seconds": round(seconds, 1), "peak_mb": round(float(notebook.cells[-1].outputs[0].text)), **found}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("names", nargs="*", metavar="NAME")
    names = lessons(options.parse_args().names)
    found = json.loads(BENCHMARK.read_text(encoding="utf-8"))["lessons"] if BENCHMARK.exists() else {}
    for name in tqdm(names, unit="lesson"):
        found[name] = measure(name)
        tqdm.write(f"{name:20s} {found[name]}")
        write_json(BENCHMARK, {"machine": machine(), "lessons": dict(sorted(found.items()))})


if __name__ == "__main__":
    main()
