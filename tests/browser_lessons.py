"""The lessons as a reader meets them: in JupyterLab, in a browser, with a hand on the sliders.

    python tests/browser_lessons.py [NAME ...] [--output out/browser] [--seconds 900] [--record]

Opens each lesson (or those named: 04_vae, 04, a path) in headless Chromium, clears its outputs, runs all cells, moves
the first slider of every widget and presses play where there is one. A lesson passes when every cell ran, none printed
an error, every slider changed its picture or text, no formula and no picture is broken, and the page reported no error.
Pictures of the whole lesson and of each widget go to --output. Nothing is saved: the notebooks stay as they are.

--record writes how fast each widget answers to data/benchmarks/widgets.json.

Needs the extra "browser" and a Chromium: the system's (Debian: apt install chromium), or `playwright install chromium`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
BENCHMARK = ROOT / "data" / "benchmarks" / "widgets.json"
START_SECONDS = 120  # a busy machine starts JupyterLab, or a kernel, slowly
ANSWER_SECONDS = 10  # a widget that has not answered by then does not answer
KEYS = ("End", "Home", "End", "Home", "End")  # a small step may rightly change nothing
HEIGHT, TALLEST = 1000, 14_000  # pixels of a window, and of a picture of a lesson: Chromium draws no higher ones

SETTINGS = {
    "docmanager-extension/plugin": {"autosave": False},
    "notebook-extension/tracker": {"windowingMode": "none"},  # otherwise cells out of sight are not in the page
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True},
}
CHROMIUM = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync"]  # fmt: skip
# Faults that are not of the lessons: JupyterLab asks for files that need not exist, and for the network.
NOISE = re.compile(r"favicon|status of 404|ERR_INTERNET_DISCONNECTED|ERR_NAME_NOT_RESOLVED|pypi\.org|ResizeObserver")

WIDGET = ".jp-OutputArea-output:has(> .jupyter-widgets)"
# The state of the notebook, from its model: a folded cell has no number in the page.
STATE = """() => {
  const panel = window.jupyterapp.shell.currentWidget;
  const cells = [...panel.content.model.cells].filter(c => c.type === 'code' && c.sharedModel.getSource().trim());
  return {
    kernel: panel.sessionContext.session?.kernel?.status,
    left: cells.filter(c => c.executionCount === null || c.executionState === 'running').length,
    cells: cells.length,
    outputs: cells.flatMap((c, number) => c.outputs.toJSON().map(o => ({
      number, type: o.output_type, stream: o.name,
      text: [o.text ?? '', o.ename ?? '', o.evalue ?? ''].flat().join(' ').slice(0, 200)}))),
  };
}"""
# What a widget shows: its pictures, or its texts where it has none. A picture drawn anew has a new address.
SHOWN = """(root) => {
  const pictures = [...root.querySelectorAll('img')].map(i => i.src);
  const texts = [...root.querySelectorAll('.widget-label, .widget-html-content, .jp-OutputArea-output')]
    .filter(e => !e.closest('.widget-slider, .widget-dropdown')).map(e => e.textContent);
  return JSON.stringify(pictures.length ? pictures : texts);
}"""
# The same, for comparing pixels: two addresses may hold one picture.
LOOKS = """async (root) => {
  const pictures = [...root.querySelectorAll('img')];
  await Promise.all(pictures.map(i => i.decode().catch(() => null)));
  const pixels = pictures.map(i => {
    const canvas = document.createElement('canvas');
    canvas.width = i.naturalWidth; canvas.height = i.naturalHeight;
    canvas.getContext('2d').drawImage(i, 0, 0);
    return canvas.toDataURL();
  });
  const texts = [...root.querySelectorAll('.widget-label, .widget-html-content')].map(e => e.textContent);
  return JSON.stringify([pixels, texts]);
}"""
BROKEN = """() => [
  ...[...document.querySelectorAll('.jp-Notebook mjx-merror, .jp-Notebook .MathJax_Error')]
    .map(e => 'formula: ' + (e.getAttribute('data-mjx-error') || e.textContent)),
  ...[...document.querySelectorAll('.jp-Notebook img')].filter(i => i.src.startsWith(location.origin))
    .filter(i => i.complete && !i.naturalWidth).map(i => 'picture: ' + i.src.slice(0, 100)),
  ...[...document.querySelectorAll('.jp-OutputArea-output')].map(e => e.textContent)
    .filter(t => /Error displaying widget|Loading widget|Javascript error/i.test(t)).map(t => 'widget: ' + t),
]"""


@dataclass
class Visit:
    """What was seen in one lesson: its cells, the seconds they took, answers in seconds a widget, and all faults."""

    name: str
    cells: int = 0
    seconds: float = 0.0
    answers: list[float] = field(default_factory=list)  # median of a widget's first slider, in seconds
    slowest: float = 0.0
    players: int = 0
    faults: list[str] = field(default_factory=list)


@contextmanager
def jupyterlab(root: Path, log: Path) -> Iterator[str]:
    """A JupyterLab of its own over `root`, with no settings but ours, as the address of its page with `{}` for a file.

    It listens on this machine alone, behind a token. Raises `RuntimeError`, with the place of its log, when it does not
    come up.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, base = secrets.token_hex(16), f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="lab") as config, log.open("w") as output:
        for name, values in SETTINGS.items():
            path = Path(config, "user-settings", "@jupyterlab", f"{name}.jupyterlab-settings")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values))
        environment = os.environ | {
            "JUPYTER_CONFIG_DIR": config,
            "JUPYTERLAB_SETTINGS_DIR": f"{config}/user-settings",
            "JUPYTERLAB_WORKSPACES_DIR": f"{config}/workspaces",
        }
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--expose-app-in-browser", "--allow-root"]
        command += ["--ip=127.0.0.1", f"--port={port}", f"--IdentityProvider.token={token}"]
        command += [f"--ServerApp.root_dir={root}"]
        lab = subprocess.Popen(
            command, cwd=root, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            deadline = time.monotonic() + START_SECONDS
            while True:
                try:
                    urllib.request.urlopen(f"{base}/api?token={token}", timeout=2).close()
                    break
                except OSError as error:
                    if lab.poll() is not None or time.monotonic() > deadline:
                        raise RuntimeError(f"JupyterLab did not start: see {log}") from error
                    time.sleep(0.3)
            yield f"{base}/lab/tree/{{}}?token={token}&reset"
        finally:
            os.killpg(lab.pid, signal.SIGTERM)  # its kernels with it
            try:
                lab.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(lab.pid, signal.SIGKILL)


@contextmanager
def chromium():
    """A headless Chromium of its own, with a profile that is thrown away: the system's, or the one of playwright."""
    from playwright.sync_api import sync_playwright

    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found[0] if found else None, args=CHROMIUM)
        try:
            yield browser
        finally:
            browser.close()


def run_all(page, visit: Visit, seconds: float) -> None:
    """Clear all outputs, run all cells from the menu, and wait until the kernel has nothing left to do."""
    page.wait_for_function(f"({STATE})().kernel === 'idle'", timeout=START_SECONDS * 1000)
    for menu, item in (("Edit", "Clear Outputs of All Cells"), ("Run", "Run All Cells")):
        page.click(f'.lm-MenuBar-itemLabel:text-is("{menu}")')
        page.click(f'.lm-Menu-itemLabel:text-is("{item}")')
    start = time.monotonic()
    while True:
        state = page.evaluate(STATE)
        failed = [output for output in state["outputs"] if output["type"] == "error"]
        if failed or (state["left"] == 0 and state["kernel"] == "idle"):
            break
        if time.monotonic() - start > seconds:
            visit.faults.append(f"{state['left']} cells have not run after {seconds:.0f} s")
            break
        time.sleep(0.2)
    visit.cells, visit.seconds = state["cells"], time.monotonic() - start
    visit.faults += [f"code cell {output['number'] + 1}: {output['text']}" for output in failed]
    errors = [output for output in state["outputs"] if output["stream"] == "stderr"]
    visit.faults += [f"code cell {output['number'] + 1} wrote to stderr: {output['text']}" for output in errors]


def answer(page, root, act) -> float | None:
    """Seconds from an action to another picture (or text) in the widget `root`; None when nothing comes."""
    from playwright.sync_api import TimeoutError as NothingCame

    before, start = root.evaluate(SHOWN), time.perf_counter()
    act()
    try:
        changed = f"([root, before]) => ({SHOWN})(root) !== before"
        page.wait_for_function(changed, arg=[root, before], timeout=ANSWER_SECONDS * 1000, polling=10)
    except NothingCame:
        return None
    return time.perf_counter() - start


def try_widget(page, root, name: str, visit: Visit) -> None:
    """Move the first slider of a widget by its keys, and press play; note what does not answer."""
    root.scroll_into_view_if_needed()
    looks, answers = {root.evaluate(LOOKS)}, []
    for key in KEYS:
        handle = root.query_selector(".noUi-handle")  # anew each time: a widget may draw its sliders again
        if handle is None:
            break
        handle.focus()
        answers.append(answer(page, root, lambda key=key: page.keyboard.press(key)))
        looks.add(root.evaluate(LOOKS))
    if answers:
        came = [seconds for seconds in answers if seconds is not None]
        if came:
            visit.answers.append(median(came))
            visit.slowest = max(visit.slowest, *came)
        if len(came) < len(answers):
            visit.faults.append(f"{name}: {len(answers) - len(came)} of {len(answers)} moves changed nothing")
        if len(looks) < 2:
            visit.faults.append(f"{name}: the picture is the same at every place of its slider")
    if play := root.query_selector(".widget-play button"):
        visit.players += 1
        if answer(page, root, play.click) is None or answer(page, root, lambda: None) is None:
            visit.faults.append(f"{name}: play does not turn the picture")


def photograph(page, path: Path) -> None:
    """The lesson from top to bottom (as far as Chromium draws) in one picture."""
    height = page.evaluate("document.querySelector('.jp-Notebook .jp-WindowedPanel-outer').scrollHeight")
    page.evaluate("document.querySelector('.jp-Notebook .jp-WindowedPanel-outer').scrollTop = 0")
    page.set_viewport_size({"width": 1300, "height": min(height + 100, TALLEST)})
    page.wait_for_timeout(500)
    page.screenshot(path=path)
    page.set_viewport_size({"width": 1300, "height": HEIGHT})


def visit_lesson(browser, address: str, notebook: str, output: Path, seconds: float = 900) -> Visit:
    """Open one notebook (a path from the root of JupyterLab), run it, try its widgets, and take its pictures."""
    visit = Visit(Path(notebook).stem)
    page = browser.new_page(viewport={"width": 1300, "height": HEIGHT})
    page.on("pageerror", lambda error: visit.faults.append(f"page: {str(error)[:200]}"))
    page.on("console", lambda line: line.type == "error" and visit.faults.append(f"console: {line.text[:200]}"))
    try:
        page.goto(address.format(notebook), timeout=START_SECONDS * 1000)
        page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=START_SECONDS * 1000)
        run_all(page, visit, seconds)
        page.wait_for_timeout(1000)  # the last formulas and pictures
        visit.faults += page.evaluate(BROKEN)
        photograph(page, output / f"{visit.name}.png")
        for number, root in enumerate(page.query_selector_all(WIDGET), 1):
            try_widget(page, root, f"widget {number}", visit)
            page.screenshot(path=output / f"{visit.name}_widget_{number}.png")
        page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    finally:
        page.close()
    visit.faults = [fault for fault in dict.fromkeys(visit.faults) if not NOISE.search(fault)]
    return visit


def row(visit: Visit) -> str:
    answers = f"{max(visit.answers):.2f} s" if visit.answers else ""
    verdict = len(visit.faults) or "ok"
    return f"{visit.name:22} {visit.cells:5} {visit.seconds:8.0f} {len(visit.answers):8} {answers:>8}  {verdict}"


def record(visits: list[Visit]) -> None:
    """Keep how fast the widgets answer; lessons that were not visited keep their numbers."""
    from difftsr.evaluate import machine
    from difftsr.text_lines import write_json

    kept = json.loads(BENCHMARK.read_text(encoding="utf-8"))["seconds"] if BENCHMARK.exists() else {}
    new = {visit.name: [round(answer, 3) for answer in visit.answers] for visit in visits if visit.answers}
    write_json(BENCHMARK, {"machine": machine(), "seconds": dict(sorted((kept | new).items()))})


def main() -> int:
    import maintain

    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("names", nargs="*", metavar="NAME")
    options.add_argument("--output", type=Path, default=ROOT / "out" / "browser")
    options.add_argument("--seconds", type=float, default=900, help="how long a lesson may run")
    options.add_argument("--record", action="store_true", help="write data/benchmarks/widgets.json")
    chosen = options.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that JupyterLab ends with us
    names = maintain.lessons(chosen.names)
    chosen.output.mkdir(parents=True, exist_ok=True)
    visits = []
    print(f"{'lesson':22} {'cells':>5} {'seconds':>8} {'widgets':>8} {'answer':>8}  faults", flush=True)
    with jupyterlab(ROOT, chosen.output / "jupyterlab.log") as address, chromium() as browser:
        for name in names:
            visits.append(visit_lesson(browser, address, f"notebooks/{name}.ipynb", chosen.output, chosen.seconds))
            print(row(visits[-1]), *visits[-1].faults, sep="\n    ", flush=True)
    if chosen.record:
        record(visits)
    return 1 if any(visit.faults for visit in visits) else 0


if __name__ == "__main__":
    sys.exit(main())
