"""Lines in their surroundings: places stay on the ink, ratios keep the rules, the same seed gives the same bytes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from difftsr.surroundings import EFFECTS, RULES, SCREENS, WORLD, Scene, SceneRenderer, Surroundings, draw_scene
from difftsr.text_lines import (
    VARIED,
    Alphabet,
    LineStyle,
    PhraseSampler,
    find_fonts,
    is_reserved,
    latin_words,
    package_font_folders,
)

NONE = Surroundings(**dict.fromkeys(vars(Surroundings()), 0.0))
SCENES = {
    "plain": Scene(),
    "room": Scene(room=(1.2, 0.8, 0.4, 0.6)),
    "cut": Scene(room=(-0.1, -0.12, -0.1, -0.12)),
    "slant": Scene(slant=10),
    "steep": Scene(slant=-28),
    "arc up": Scene(arc=-0.7),
    "arc down": Scene(arc=0.7),
    "wave": Scene(wave=(0.15, 3, 1)),
    "perspective": Scene(perspective=np.array([[0.14, 0.14], [-0.1, 0.1], [0.0, -0.14], [0.1, 0.0]])),
    "uneven": Scene(gaps=(0.0, 0.9, 0.2, 0.0)),
    "lines": Scene(above=(-1, 0.2, 1.0), below=(5, 0.2, 1.0), room=(0.1, 0.7, 0.1, 0.7)),
    "sides": Scene(left=0.5, right=0.6, room=(0.8, 0.1, 0.9, 0.1)),
    **{rule: Scene(rule=rule, room=(0.4, 0.4, 0.4, 0.4)) for rule in RULES},
    **{side: Scene(beyond=(side, 0.1), room=(0.4, 0.4, 0.4, 0.4)) for side in ("left", "right", "above", "below")},
}


@pytest.fixture(scope="module")
def fonts():
    return find_fonts(package_font_folders())


@pytest.fixture(scope="module")
def renderer(fonts):
    return SceneRenderer(fonts, looks=VARIED, surroundings=Surroundings())


def own_ink(renderer, text: str, scene: Scene, style: LineStyle) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns, as shares, where the text itself shows: the picture without its ink is taken away."""
    blank = dataclasses.replace(style, color=style.background)
    scene = dataclasses.replace(scene, other_color=(90.0, 90.0, 90.0))
    images = [renderer.render(text, np.random.default_rng(2), s, scene).image.astype(int) for s in (style, blank)]
    rows, columns = np.nonzero(np.abs(images[0] - images[1]).sum(2) > 300)
    height, width = images[0].shape[:2]
    return (rows + 0.5) / height, (columns + 0.5) / width


@pytest.mark.parametrize("name", SCENES)
def test_centres_boxes_and_band_are_where_the_ink_is(renderer, fonts, name):
    style = LineStyle(fonts[0], color=(10, 10, 10), background=(245, 245, 245))
    line = renderer.render("口田国日", np.random.default_rng(2), style, SCENES[name])
    rows, columns = own_ink(renderer, "口田国日", SCENES[name], style)
    places = (np.arange(len(line.band)) + 0.5) / len(line.band)
    known = line.band[:, 0] > -0.9
    assert known.sum() >= 3 and (line.band[known, 0] < line.band[known, 1]).all()
    top, bottom = (np.interp(columns, places[known], edge[known]) for edge in line.band.T)
    assert np.mean((rows > top - 0.06) & (rows < bottom + 0.06)) > 0.97
    for center, (left, upper, right, lower) in zip(line.centers, line.boxes, strict=True):
        mine = (columns >= left - 0.005) & (columns <= right + 0.005)
        assert mine.any()
        if name != "cut":  # what is cut off cannot be measured
            assert abs((columns[mine].min() + columns[mine].max()) / 2 - center) < 0.02
        inside = (rows[mine] >= upper - 0.03) & (rows[mine] <= lower + 0.03)
        assert inside.mean() > 0.9  # at a steep slant neighbours share columns


@pytest.mark.parametrize("text", ["一", "I", "老街", "电话：15952301928", "MMMMMMMMMMMMMMMMMMMMMMMM", "国" * 24])
def test_every_ratio_keeps_the_rules(renderer, text):
    for seed in range(12):
        line = renderer.render(text, np.random.default_rng([3, seed]))
        height, width = line.image.shape[:2]
        assert height == 128 and 1 <= width / height <= 8 and line.image.dtype == np.uint8
        assert (line.centers >= 0).all() and (line.centers <= 1).all() and len(line.boxes) == len(text)
        assert (np.diff(line.centers) >= 0).all()


def test_the_same_seed_gives_the_same_bytes(fonts):
    first, second = (
        [SceneRenderer(fonts, looks=VARIED).render("老街 Tea", np.random.default_rng(i)) for i in range(25)]
        for _ in range(2)
    )
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one.image, other.image) and np.array_equal(one.band, other.band)
    assert len({line.image.tobytes() for line in first}) == 25


def test_each_share_turns_its_thing_on(fonts):
    style, rng = LineStyle(fonts[0]), np.random.default_rng(0)
    quiet = draw_scene(NONE, style, "老街茶庄", rng)
    assert not any((quiet.slant, quiet.arc, quiet.rule, quiet.above, quiet.below))
    assert not any((quiet.effect, quiet.screen, quiet.gaps, quiet.scenery, quiet.objects))
    shows = {
        "slant": lambda s: s.slant, "arc": lambda s: s.arc, "wave": lambda s: s.wave[0], "rules": lambda s: s.rule,
        "lines": lambda s: s.above or s.below, "sides": lambda s: s.left or s.right, "effect": lambda s: s.effect,
        "screen": lambda s: s.screen, "spots": lambda s: s.spots, "fold": lambda s: s.fold[0],
        "objects": lambda s: s.objects, "shade": lambda s: s.shade[0], "uneven": lambda s: s.gaps,
        "wide": lambda s: s.gaps, "two_colors": lambda s: s.second_color, "cut": lambda s: min(s.room) < 0,
        "beyond": lambda s: s.beyond[0], "perspective": lambda s: s.perspective.any(),
    }  # fmt: skip
    for name, shown in shows.items():
        drawn = [draw_scene(dataclasses.replace(NONE, **{name: 1.0}), style, "老街茶庄", rng) for _ in range(40)]
        assert sum(bool(shown(scene)) for scene in drawn) >= 20, name
    with pytest.raises(ValueError, match="arc is a share"):
        Surroundings(arc=1.2)


def test_a_neighbour_is_never_seen_whole(fonts):
    rng = np.random.default_rng(5)
    for _ in range(300):
        scene = draw_scene(dataclasses.replace(WORLD, lines=1.0, sides=0.5), LineStyle(fonts[0]), "老街茶庄", rng)
        for line, room in ((scene.above, scene.room[1]), (scene.below, scene.room[3])):
            assert line is None or line[1] < room < line[1] + 0.75 * line[2]


@pytest.mark.parametrize("effect", (*EFFECTS, *SCREENS))
def test_effects_change_the_picture_and_leave_the_places(renderer, fonts, effect):
    style = LineStyle(fonts[0])
    scene = Scene(screen=effect) if effect in SCREENS else Scene(effect=effect)
    plain, shown = (renderer.render("老街", np.random.default_rng(1), style, s) for s in (Scene(), scene))
    assert np.abs(plain.image.astype(int) - shown.image.astype(int)).mean() > 0.5
    assert np.array_equal(plain.centers, shown.centers)


def test_alone_is_the_plain_line(fonts):
    lonely = SceneRenderer(fonts, surroundings=dataclasses.replace(NONE, alone=1.0))
    rng, other = np.random.default_rng(4), np.random.default_rng(4)
    assert other.random() < 1  # the draw that decides
    line = lonely.render("老街", rng)
    plain = super(SceneRenderer, lonely).render("老街", other)
    assert np.array_equal(line.image, plain.image) and line.band.shape == (16, 2)


def test_latin_words_are_words_and_never_reserved():
    sampler, rng = PhraseSampler(Alphabet.classroom(), latin_share=1.0, words="builtin"), np.random.default_rng(0)
    texts = [sampler.sample(rng) for _ in range(400)]
    assert all(text.isascii() and 0 < len(text) <= 24 and not is_reserved(text) for text in texts)
    assert sum(any(c.isupper() for c in text) for text in texts) > 200 > sum(text.islower() for text in texts) > 20
    known = set(latin_words()[0])
    single = [text.lower() for text in texts if text.isalpha()]
    assert 0.3 < np.mean([word in known for word in single]) < 0.9  # the others are made up
    with pytest.raises(ValueError, match="shares"):
        PhraseSampler(Alphabet.classroom(), latin_share=2.0)
