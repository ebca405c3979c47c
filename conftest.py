"""Settings of nbval, so that `pytest --nbval notebooks/` needs no other option, and a guard it lacks.

The limits are there to end what hangs, not what is slow: a lesson takes a minute, a machine with much else to do ten.
"""

import time
from pathlib import Path
from queue import Empty

import pytest

ROOT = Path(__file__).resolve().parent
CELL_SECONDS = 3600
KERNEL_SECONDS = 600
OUTPUT_SECONDS = 600  # from the end of a cell to the last line that it printed; nbval's own limit is 5
LOOK_SECONDS = 5  # so often it is asked whether the kernel still lives


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "nbval", False):
        if config.option.nbval_sanitize_with is None:
            config.option.nbval_sanitize_with = str(ROOT / "tests" / "nbval_sanitize.cfg")
        config.option.nbval_cell_timeout = CELL_SECONDS
        config.option.nbval_kernel_startup_timeout = max(config.option.nbval_kernel_startup_timeout, KERNEL_SECONDS)


def watch(kernel) -> None:
    """Let a kernel that died end the wait for its messages: nbval would wait as long as for a slow one."""
    plain = kernel.get_message

    def get_message(stream: str, timeout: float | None = None):
        end = time.monotonic() + (CELL_SECONDS if timeout is None else timeout)
        while True:
            left = end - time.monotonic()
            try:
                return plain(stream, timeout=max(0.0, min(LOOK_SECONDS, left)))
            except Empty:
                if left <= LOOK_SECONDS or not kernel.is_alive():
                    raise

    kernel.get_message, kernel.is_watched = get_message, True


def pytest_runtest_call(item: pytest.Item) -> None:
    """Fail a lesson's cell that was never run: nbval would compare nothing and call it passed."""
    cell = getattr(item, "cell", None)  # only nbval's items have one
    if cell is None:
        return
    item.output_timeout = OUTPUT_SECONDS
    if item.parent.kernel is not None and not hasattr(item.parent.kernel, "is_watched"):
        watch(item.parent.kernel)
    if cell.source.strip() and cell.get("execution_count") is None:
        pytest.fail(f"{item.parent.name}: a cell has no stored run to compare with (make run)", pytrace=False)
