"""Settings of nbval, so that `pytest --nbval notebooks/` needs no other option, and a guard it lacks."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
CELL_SECONDS = 300
KERNEL_SECONDS = 180  # a busy machine starts a kernel slowly


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "nbval", False):
        if config.option.nbval_sanitize_with is None:
            config.option.nbval_sanitize_with = str(ROOT / "tests" / "nbval_sanitize.cfg")
        config.option.nbval_cell_timeout = min(config.option.nbval_cell_timeout, CELL_SECONDS)
        config.option.nbval_kernel_startup_timeout = max(config.option.nbval_kernel_startup_timeout, KERNEL_SECONDS)


def pytest_runtest_call(item: pytest.Item) -> None:
    """Fail a lesson's cell that was never run: nbval would compare nothing and call it passed."""
    cell = getattr(item, "cell", None)  # only nbval's items have one
    if cell is not None and cell.source.strip() and cell.get("execution_count") is None:
        pytest.fail(f"{item.parent.name}: a cell has no stored run to compare with (make run)", pytrace=False)
