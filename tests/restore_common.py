"""What the tests of restoring share: weights in seconds, a line, and pictures as bytes."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from difftsr.model import DiffTSR, preset


def save_tiny_weights(folder: Path) -> Path:
    """A folder of weights of the tiny preset, with random numbers in layers that begin as zeros."""
    torch.manual_seed(0)
    model = DiffTSR(preset("tiny"))
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    model.untrained.clear()
    return model.save(folder)


def coloured_line() -> Image.Image:
    """A picture 90 x 30: red, green and blue thirds with a dark stroke."""
    pixels = np.zeros((30, 90, 3), np.uint8)
    pixels[:, :30, 0], pixels[:, 30:60, 1], pixels[:, 60:, 2] = 200, 150, 250
    pixels[10:20, 5:85] //= 3
    return Image.fromarray(pixels)


def picture(image: Image.Image, kind: str = "PNG", **settings) -> bytes:
    """An image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **settings)
    return buffer.getvalue()
