"""DiffTSR: text image super-resolution by two diffusions that teach each other, from notebooks.

The modules of this package are exported from the lessons in `notebooks/`; edit the lessons, never the modules.
"""

__version__ = "0.1.0"
