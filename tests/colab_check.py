"""Lessons with Colab's package versions: what a reader finds who follows the badge.

    python tests/colab_check.py FOLDER [NAME ...] [--python python3.13]

Makes a virtual environment in FOLDER (once; 7 GB, since PyPI's torch brings CUDA) with the packages that Colab has and
this project uses, as near as they install, and a stand-in for the module google.colab. Then each lesson runs in it from
its set-up cell on, which clones the *committed* state of this project and installs what Colab lacks. The clone comes
from this folder instead of the network, and lies in FOLDER/content instead of /content; nothing else is changed.

Prints the versions and a table; exit status 1 when a lesson fails. Delete FOLDER afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import maintain

ROOT = Path(__file__).resolve().parents[1]
# Colab's image as of 2026: https://github.com/googlecolab/backend-info lists it.
COLAB = [
    "torch==2.11.*", "ipywidgets==7.7.*", "IPython==7.34.*", "ipykernel==6.17.*", "numpy==2.*", "accelerate", "einops",
    "huggingface_hub", "matplotlib==3.10.*", "ml_dtypes", "opencv-python-headless", "pandas", "pillow", "psutil",
    "pyyaml", "safetensors", "scikit-image", "scipy", "setuptools", "shapely", "tensorboard", "tqdm",
]  # fmt: skip
LESSONS = ["00", "02", "05", "07", "08", "12", "12c", "13", "16"]
SHOWN = ["torch", "numpy", "ipywidgets", "IPython", "ipykernel", "matplotlib", "pillow"]
CELL_SECONDS = 900


def make_environment(folder: Path, python: str) -> Path:
    """The interpreter of the environment in `folder`, made where it is missing, with kernel and stand-in."""
    interpreter = folder / "env" / "bin" / "python"
    if not (folder / "ready").exists():
        if not interpreter.exists():
            subprocess.run([python, "-m", "venv", folder / "env"], check=True)
        subprocess.run([interpreter, "-m", "pip", "install", "--quiet", "--no-cache-dir", *COLAB], check=True)
        (folder / "ready").touch()
    kernel = folder / "share" / "kernels" / "colab"
    kernel.mkdir(parents=True, exist_ok=True)
    command = [str(interpreter), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "Colab", "language": "python"}))
    stand_in = folder / "stand_in" / "google" / "colab"
    stand_in.mkdir(parents=True, exist_ok=True)
    (stand_in / "__init__.py").write_text('"""Stands in for the module that Colab has imported in each notebook."""\n')
    startup = folder / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True, exist_ok=True)
    (startup / "colab.py").write_text("import google.colab\n")
    return interpreter


def run(name: str, folder: Path) -> tuple[int, str]:
    """Execute a lesson as Colab would; its code cells, and what went wrong (empty: nothing)."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    notebook = maintain.read_notebook(maintain.LESSONS / f"{name}.ipynb")
    for cell in notebook.cells:
        if "setup" in maintain.tags(cell):
            cell.source = cell.source.replace('"/content', f'"{folder}/content')
    start = folder / "content"
    start.mkdir(exist_ok=True)
    resources = {"metadata": {"path": start}}
    client = NotebookClient(notebook, timeout=CELL_SECONDS, kernel_name="colab", resources=resources)
    cells = sum(cell.cell_type == "code" for cell in notebook.cells)
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return cells, str(error)
    lesson = [cell for cell in notebook.cells if "setup" not in maintain.tags(cell)]  # pip may warn as it likes
    outputs = [output for cell in lesson for output in cell.get("outputs", [])]
    return cells, "".join(output.text for output in outputs if output.get("name") == "stderr")


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("names", nargs="*", metavar="NAME")
    options.add_argument("--python", default="python3.13")
    chosen = options.parse_args()
    folder = chosen.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    interpreter = make_environment(folder, chosen.python)
    shutil.rmtree(folder / "content", ignore_errors=True)  # a fresh clone each time
    address = maintain.settings()["project"]["urls"]["Repository"]
    os.environ |= {
        "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.file://{ROOT}.insteadOf", "GIT_CONFIG_VALUE_0": address,
        "IPYTHONDIR": str(folder / "ipython"), "JUPYTER_PATH": str(folder / "share"),
        "PYTHONPATH": str(folder / "stand_in"),
    }  # fmt: skip
    code = "import sys; from importlib.metadata import version as v; print('Python ' + sys.version.split()[0], "
    subprocess.run([interpreter, "-c", code + "*(f'{p} {v(p)}' for p in sys.argv[1:]), sep=', ')", *SHOWN], check=True)
    failed = False
    for name in maintain.lessons(chosen.names or LESSONS):
        started = time.perf_counter()
        cells, problem = run(name, folder)
        seconds = time.perf_counter() - started
        print(f"{name:22} {cells:4} cells {seconds:6.0f} s  {'FAILED' if problem else 'ok'}", flush=True)
        if problem:
            print(problem[-1500:])
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
