"""Do the lessons show on other machines what is stored in them? Runs them as other machines would, and compares.

    python tests/tools/other_machines.py PERTURBATION ... [--lessons NAME ...]   e.g. capability-default threads-1
    python tests/tools/other_machines.py capability-default+isa-sse41+threads-1  several at once, in one run
    python tests/tools/other_machines.py --list                                  what there is

Cells are compared by nbval, with the sanitising file and the marks of `make test`; cells are counted as nbval counts
them, code cells from 0. What differs is printed, and the numbers of the cells go into data/benchmarks/machines.json.
Lessons that are not named stay there as they were. With `--tests` the tests are run in place of the lessons, and
nothing is stored.

`--python PATH` names the interpreter of another environment, with another torch for example; its runs are stored
under the version of its torch.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from difftsr.text_lines import write_atomically

ROOT = Path(__file__).resolve().parents[2]
HOOK = Path(__file__).resolve().parent / "other_machine"  # its sitecustomize.py runs in every process
STORED = ROOT / "data" / "benchmarks" / "machines.json"
THREADS = "2"  # as in the Makefile
ISAS = {"sse41": "SSE41", "avx2": "AVX2", "avx512": "AVX512_CORE"}  # of oneDNN
Found = dict[str, dict[int | str, str]]  # {lesson or test module: {cell or test: what differed}}
BUSY = "while True: pass"
COLOURS = re.compile(r"\x1b\[[\d;]*m|#x1B\[[\d;]*m")
VERSIONS = """\
import importlib.metadata as m, json, platform
import torch
from pathlib import Path
rows = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
names = [row.split(":", 1)[1].strip() for row in rows if row.startswith("model name")]
found = {"machine": (names or [platform.processor() or "unknown"])[0], "python": platform.python_version()}
found["capability"] = torch.backends.cpu.get_cpu_capability()
print(json.dumps(found | {name: m.version(name) for name in ("torch", "numpy", "opencv-python", "Pillow")}))"""


@dataclass(frozen=True)
class Perturbation:
    """One way in which another machine may differ."""

    environment: dict[str, str] = field(default_factory=dict)
    hook: bool = False  # what its name says is done by sitecustomize.py
    empty_home: bool = False
    busy: bool = False
    other_folder: bool = False


PERTURBATIONS = {
    "native": Perturbation(),
    **{f"threads-{n}": Perturbation({"OMP_NUM_THREADS": str(n)}) for n in (1, 2, 4)},
    **{f"capability-{c}": Perturbation({"ATEN_CPU_CAPABILITY": c}) for c in ("default", "avx2", "avx512")},
    **{f"isa-{name}": Perturbation({"ONEDNN_MAX_CPU_ISA": isa}) for name, isa in ISAS.items()},
    "mkldnn-off": Perturbation(hook=True),
    "mkl-compatible": Perturbation({"MKL_CBWR": "COMPATIBLE"}),  # matrix products as on any processor
    "blas-nehalem": Perturbation({"OPENBLAS_CORETYPE": "Nehalem"}),  # numpy's and scipy's
    "numpy-plain": Perturbation({"NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR"}),
    "opencv-plain": Perturbation(hook=True),
    "weight-noise": Perturbation(hook=True),
    "hash-seed": Perturbation({"PYTHONHASHSEED": "12345"}),
    "locale-c": Perturbation({"LC_ALL": "C", "LANG": "C", "LANGUAGE": ""}),
    "locale-ascii": Perturbation({"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    "time-zone": Perturbation({"TZ": "Pacific/Kiritimati"}),
    "fonts-hidden": Perturbation(hook=True, empty_home=True),
    "busy": Perturbation(busy=True),
    "other-folder": Perturbation(other_folder=True),
}


def parts(name: str) -> list[str]:
    """The perturbations of a name such as `threads-1+busy`; stops the program for an unknown one."""
    found = name.split("+")
    for part in found:
        if part not in PERTURBATIONS:
            raise SystemExit(f"{part}: no such perturbation; there are {', '.join(PERTURBATIONS)}")
    return found


def environment(names: list[str], home: Path) -> dict[str, str]:
    """The variables of a process that runs under the named perturbations; `home` is for those that ask for an empty
    home folder."""
    chosen = {name: PERTURBATIONS[name] for name in names}
    result = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", THREADS)}
    result["OMP_WAIT_POLICY"] = "PASSIVE"  # more threads than cores shall not wait for each other in a busy loop
    result["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HOOK), os.environ.get("PYTHONPATH")]))
    result["DIFFTSR_OTHER_MACHINE"] = ",".join(name for name, one in chosen.items() if one.hook)
    for one in chosen.values():
        result.update(one.environment)
        if one.empty_home:
            result.update(HOME=str(home), XDG_CACHE_HOME=str(home / "cache"))
    return result


@contextmanager
def busy_process(wanted: bool) -> Iterator[subprocess.Popen | None]:
    """A process that burns a core, ended with the block."""
    process = subprocess.Popen([sys.executable, "-c", BUSY]) if wanted else None
    try:
        yield process
    finally:
        if process is not None:
            process.kill()
            process.wait()


def copied_clone(root: Path, folder: Path) -> Path:
    """The files of the project, tracked or not yet, in a folder with another name."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    copy = folder / "another name"
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, copy / name)
    return copy


def failures(report: Path) -> Found:
    """What a JUnit report calls failed; those modules that passed have no entries."""
    found: Found = {}
    for case in xml.parse(report).getroot().iter("testcase"):
        module = (case.get("classname") or case.get("name", "")).removesuffix(".ipynb").rsplit(".", 1)[-1]
        found.setdefault(module, {})
        for problem in [*case.findall("failure"), *case.findall("error")]:
            number = re.search(r"Cell (\d+)$", case.get("name", ""))
            key = int(number[1]) if number else case.get("name", "")
            found[module][key] = COLOURS.sub("", problem.text or problem.get("message", ""))
    return found


def run(name: str, targets: list[str], python: str = sys.executable, root: Path = ROOT) -> Found:
    """Run pytest on the targets (relative to `root`) under one perturbation, or several joined by `+`."""
    names = parts(name)
    chosen = [PERTURBATIONS[part] for part in names]
    with tempfile.TemporaryDirectory() as temporary:
        folder, home = Path(temporary), Path(temporary) / "home"
        home.mkdir()
        place = copied_clone(root, folder) if any(one.other_folder for one in chosen) else root
        report = folder / "report.xml"
        options = ["--nbval"] if any(target.endswith(".ipynb") for target in targets) else []
        command = [python, "-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider", f"--junitxml={report}"]
        with busy_process(any(one.busy for one in chosen)):
            subprocess.run([*command, *options, *targets], cwd=place, env=environment(names, home), check=False)
        if not report.exists():
            raise SystemExit(f"{name}: pytest wrote no report")
        return failures(report)


def lesson_files(names: list[str] | None, root: Path = ROOT) -> list[str]:
    """The notebooks of the named lessons (07_idm, or 07), of all without names."""
    found = sorted(path.relative_to(root).as_posix() for path in (root / "notebooks").glob("[0-9]*.ipynb"))
    if not names:
        return found
    chosen = [file for file in found if {Path(file).stem, Path(file).stem.split("_")[0]} & set(names)]
    known = {word for file in chosen for word in (Path(file).stem, Path(file).stem.split("_")[0])}
    if missing := set(names) - known:
        raise SystemExit(f"{', '.join(sorted(missing))}: no such lesson")
    return chosen


def versions(python: str) -> dict[str, str]:
    result = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def store(path: Path, name: str, machine: dict[str, str], found: Found) -> None:
    """Put the cells that differed under a perturbation into the file, in the place of older runs of these lessons."""
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"machines": [], "runs": {}}
    if machine not in stored["machines"]:
        stored["machines"].append(machine)
    key = f"{name} (machine {stored['machines'].index(machine) + 1})"
    lessons = stored["runs"].setdefault(key, {})
    lessons.update({lesson: sorted(cells) for lesson, cells in found.items()})
    stored["runs"] = dict(sorted(stored["runs"].items()))
    stored["runs"][key] = dict(sorted(lessons.items()))
    text = json.dumps(stored, ensure_ascii=False, indent=1)
    in_one_line = re.sub(r"\[\s+([\d,\s]+?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text)
    write_atomically(path, (in_one_line + "\n").encode())


def table(found: dict[str, Found]) -> str:
    """One row for each lesson in which something differed under any of the perturbations."""
    rows = [f"{'':<22}" + "  ".join(found)]
    for lesson in sorted({lesson for one in found.values() for lesson in one}):
        cells = [" ".join(map(str, sorted(one.get(lesson, {}), key=str))) or "-" for one in found.values()]
        if any(cell != "-" for cell in cells):
            rows.append(f"{lesson:<22}" + "  ".join(f"{cell:<{len(name)}}" for cell, name in zip(cells, found)))
    return "\n".join(rows if len(rows) > 1 else ["nothing differs"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("perturbations", nargs="*", metavar="PERTURBATION")
    parser.add_argument("--lessons", nargs="*", metavar="NAME", help="such as 07_idm, or just its number")
    parser.add_argument("--tests", nargs="*", metavar="PATH", help="run these tests (all of tests/ without a path)")
    parser.add_argument("--python", default=sys.executable, metavar="PATH", help="the interpreter of an environment")
    parser.add_argument("--output", type=Path, default=STORED)
    parser.add_argument("--list", action="store_true", help="print the names of the perturbations")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(PERTURBATIONS))
        return 0
    for name in arguments.perturbations:
        parts(name)
    tests = arguments.tests is not None
    targets = (arguments.tests or ["tests/"]) if tests else lesson_files(arguments.lessons)
    found = {}
    for name in arguments.perturbations:
        found[name] = run(name, targets, arguments.python)
        if not tests:
            store(arguments.output, name, versions(arguments.python), found[name])
    for name, one in found.items():
        for lesson, cells in one.items():
            for number, text in cells.items():
                print(f"{'=' * 20} {name}: {lesson} {number}\n{text}")
    print(table(found))
    return 1 if any(cells for one in found.values() for cells in one.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
