"""Settings of nbval, so that `pytest --nbval notebooks/` needs no other option, and a guard it lacks.

The limits are there to end what hangs, not what is slow: a lesson takes a minute, a machine with much else to do ten.
"""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
CELL_SECONDS = 3600
KERNEL_SECONDS = 600
OUTPUT_SECONDS = 600  # from the end of a cell to the last line that it printed; nbval's own limit is 5


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "nbval", False):
        if config.option.nbval_sanitize_with is None:
            config.option.nbval_sanitize_with = str(ROOT / "tests" / "nbval_sanitize.cfg")
        config.option.nbval_cell_timeout = CELL_SECONDS
        config.option.nbval_kernel_startup_timeout = max(config.option.nbval_kernel_startup_timeout, KERNEL_SECONDS)


def pytest_runtest_call(item: pytest.Item) -> None:
    """Fail a lesson's cell that was never run: nbval would compare nothing and call it passed."""
    cell = getattr(item, "cell", None)  # only nbval's items have one
    if cell is None:
        return
    item.output_timeout = OUTPUT_SECONDS
    if cell.source.strip() and cell.get("execution_count") is None:
        pytest.fail(f"{item.parent.name}: a cell has no stored run to compare with (make run)", pytrace=False)
