"""What Python does at its start under `other_machines.py`: it stands for a machine that differs from this one.

The tool puts this folder on PYTHONPATH and names what differs in DIFFTSR_OTHER_MACHINE; without that name nothing
happens. Kernels, tests and the processes that they start are all reached, and nothing of the package is touched.
"""

import os
import sys
import zlib
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from types import ModuleType

DIFFERS = frozenset(filter(None, os.environ.get("DIFFTSR_OTHER_MACHINE", "").split(",")))
NOISE = 1e-6  # relative: some eight steps of a float32, what sums in another order make of a layer
SYSTEM_FONTS = tuple(
    os.path.expanduser(folder)
    for folder in ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts")
)


def without_mkldnn(torch: ModuleType) -> None:
    torch.backends.mkldnn.set_flags(False)


def without_fast_opencv(cv2: ModuleType) -> None:
    cv2.setUseOptimized(False)  # neither IPP nor instructions beyond the oldest


def with_noise(safetensors: ModuleType) -> None:
    """Files of weights in the clone are read with noise, the same at each reading; other files as they are."""
    load_file = safetensors.load_file

    def noisy(path: str | os.PathLike, *arguments, **options) -> dict:
        tensors = load_file(path, *arguments, **options)
        if "data/weights/" not in os.path.abspath(path).replace(os.sep, "/"):
            return tensors
        import torch

        for name, value in tensors.items():
            if value.is_floating_point():
                seeded = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                tensors[name] = value.float() * (1 + NOISE * torch.randn(value.shape, generator=seeded))
        return tensors

    safetensors.load_file = noisy


def without_system_fonts() -> None:
    """Paths in the system's folders of fonts are not there."""

    def hidden(function: Callable) -> Callable:
        def asked(path=".", *arguments, **options):
            text = path if isinstance(path, int) else os.fspath(path)
            if isinstance(text, str) and text.startswith(SYSTEM_FONTS):
                raise FileNotFoundError(2, "No such file or directory", text)
            return function(path, *arguments, **options)

        return asked

    for name in ("stat", "lstat", "scandir", "listdir"):
        setattr(os, name, hidden(getattr(os, name)))


class After(MetaPathFinder):
    """Calls a function on a module when it has been imported."""

    def __init__(self, actions: dict[str, Callable[[ModuleType], None]]) -> None:
        self.actions = actions

    def find_spec(self, name, path=None, target=None):
        action = self.actions.get(name)
        spec = PathFinder.find_spec(name, path, target) if action else None
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                action(module)

            spec.loader.exec_module = exec_module
        return spec


def start() -> None:
    actions = {}
    if "mkldnn-off" in DIFFERS:
        actions["torch"] = without_mkldnn
    if "weight-noise" in DIFFERS:
        actions["safetensors.torch"] = with_noise
    if "opencv-plain" in DIFFERS:
        actions["cv2"] = without_fast_opencv
    if actions:
        sys.meta_path.insert(0, After(actions))
    if "fonts-hidden" in DIFFERS:
        without_system_fonts()


start()
