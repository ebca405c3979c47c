"""From any image file to a restored one: reading, shape and the call."""

import re
from collections.abc import Sequence

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageDraw, ImageFile

from difftsr.dataset import read_picture, to_rgb
from difftsr.model import DiffTSR
from difftsr.recognizer import Reading
from difftsr.restore import (
    as_array,
    canvas_to_line,
    legibility,
    line_to_canvas,
    load_image,
    ppocr_reading,
    restore,
    restore_batch,
    spread_places,
)
from difftsr.sampling import sample
from difftsr.text_lines import PAD, UNK, UNKNOWN, Alphabet, find_fonts, package_font_folders
from restore_common import coloured_line, picture, save_tiny_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_tiny_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def model(weights):
    return DiffTSR.from_pretrained(weights)


@pytest.fixture(scope="module")
def line():
    return coloured_line()


# ---------------------------------------------------------------- files


def stored(line, how):
    """(bytes, expected pixels, tolerance) of the line in one of the ways in which files hold pictures."""
    grey = line.convert("L")
    as_rgb = np.asarray(grey.convert("RGB"))
    if how == "rgb":
        return picture(line), np.asarray(line), 0
    if how == "grey":
        return picture(grey), as_rgb, 0
    if how == "grey 16 bits":
        return picture(Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)), as_rgb, 0
    if how == "one bit":
        return picture(grey.convert("1")), np.asarray(grey.convert("1").convert("RGB")), 0
    if how == "palette":
        return picture(line.convert("P", palette=Image.Palette.ADAPTIVE)), np.asarray(line), 2
    if how == "palette with transparency":
        image = line.convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
        index = image.getpixel((0, 0))
        expected = np.asarray(image.convert("RGB")).copy()
        expected[np.asarray(image) == index] = 255
        return picture(image, transparency=index), expected, 0
    if how == "transparent":
        alpha = np.zeros((30, 90), np.uint8)
        alpha[:, 45:] = 255
        expected = np.asarray(line).copy()
        expected[:, :45] = 255
        return picture(Image.fromarray(np.dstack([np.asarray(line), alpha]))), expected, 0
    if how == "half transparent grey":
        image = grey.convert("LA")
        image.putalpha(128)
        return picture(image), np.rint(255 + (as_rgb - 255.0) * 128 / 255), 1
    if how == "CMYK":
        return picture(line.convert("CMYK"), "TIFF"), np.asarray(line), 2
    if how == "float":
        return picture(Image.fromarray(np.asarray(grey, np.float32) / 255), "TIFF"), as_rgb, 1
    if how == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        return picture(line.transpose(Image.Transpose.ROTATE_90), exif=exif), np.asarray(line), 0
    raise AssertionError(how)


@pytest.mark.parametrize(
    "how",
    [
        "rgb", "grey", "grey 16 bits", "one bit", "palette", "palette with transparency", "transparent",
        "half transparent grey", "CMYK", "float", "turned",
    ],
)
def test_every_kind_of_file_becomes_rgb(line, how, tmp_path):
    content, expected, tolerance = stored(line, how)
    path = tmp_path / "file"  # the content says what it is, not the name
    path.write_bytes(content)
    pixels = load_image(path)
    assert pixels.dtype == np.uint8 and pixels.shape == (30, 90, 3)
    assert np.abs(pixels.astype(float) - expected).max() <= tolerance


BAD_FILES = {
    "empty.png": (b"", "empty"),
    "words.png": (b"these are words", "not an image"),
    "tall.png": (picture(Image.new("RGB", (20, 60))), "too tall: 20 x 60 .*--page"),
    "long.png": (picture(Image.new("RGB", (900, 100))), "too long: 900 x 100"),
    "speck.png": (picture(Image.new("RGB", (6, 3))), "too small: 6 x 3"),
    "half.png": (picture(Image.effect_noise((300, 100), 50))[:3000], "cannot be decoded"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_with_their_name_and_a_reason(tmp_path, name):
    content, reason = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason) as error:
        load_image(tmp_path / name)
    message = str(error.value)
    assert message.startswith(str(tmp_path / name)) and "\n" not in message


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    """The header is enough: decoding would fill the memory, so here it fails the test."""
    for side, name in ((9000, "large.png"), (30000, "bomb.png")):
        Image.new("1", (side, side)).save(tmp_path / name)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("the image was unpacked"))
    for name in ("large.png", "bomb.png"):
        with pytest.raises(ValueError, match="too large.*67 million"):
            load_image(tmp_path / name)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP"])
def test_a_damaged_file_is_read_or_refused_and_nothing_else(line, tmp_path, kind):
    """Cut off anywhere, or with wrong bytes anywhere: pixels or a ValueError of one line, never another error."""
    rng, content, path = np.random.default_rng(0), bytearray(picture(line, kind)), tmp_path / "file"
    refused = 0
    for trial in range(60):
        damaged = content[: rng.integers(1, len(content))] if trial % 2 else bytearray(content)
        for place in rng.integers(0, len(damaged), trial % 7):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            assert load_image(path).dtype == np.uint8
        except ValueError as error:
            refused += 1
            assert str(error).startswith(str(path)) and "\n" not in str(error)
    assert refused >= 10


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_large_lines_are_reduced_on_the_way_in_and_their_size_is_known(kind, tmp_path):
    large = Image.linear_gradient("L").rotate(90).resize((6000, 2400)).convert("RGB")
    (tmp_path / "line").write_bytes(picture(large, kind))
    reduced, whole = read_picture(tmp_path / "line", tall=512), read_picture(tmp_path / "line")
    assert reduced.size == whole.size == (6000, 2400) and whole.pixels.shape == (2400, 6000, 3)
    assert reduced.pixels.shape[0] in range(512, 1024) and reduced.format == kind
    expected = large.resize(reduced.pixels.shape[1::-1], Image.Resampling.BOX)
    assert np.abs(reduced.pixels.astype(int) - np.asarray(expected)).max() <= 3


def test_a_turned_file_has_the_size_that_is_seen(line, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "line").write_bytes(picture(line.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif))
    found = read_picture(tmp_path / "line")
    assert found.size == (90, 30) and found.pixels.shape == (30, 90, 3)


def test_a_colour_profile_is_kept_where_it_holds_and_used_where_it_does_not(line, tmp_path):
    """RGB keeps its profile; grey is converted by its own, and has none any more."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    (tmp_path / "rgb").write_bytes(picture(line, icc_profile=profile))
    assert read_picture(tmp_path / "rgb").profile == profile
    (tmp_path / "plain").write_bytes(picture(line))
    assert read_picture(tmp_path / "plain").profile is None
    for broken in (b"no profile", profile):  # neither describes one grey channel: the greys stay as they are
        (tmp_path / "grey").write_bytes(picture(line.convert("L"), icc_profile=broken))
        found = read_picture(tmp_path / "grey")
        assert found.profile is None and (found.pixels == np.asarray(line.convert("L"))[..., None]).all()


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "nowhere.png", tmp_path):
        with pytest.raises(ValueError, match="no such file"):
            load_image(path)


@pytest.mark.parametrize("size", [(32, 32), (256, 32), (90, 30)])
def test_the_allowed_ratios_are_one_to_eight(size):
    assert as_array(Image.new("RGB", size)).shape == (size[1], size[0], 3)


def test_arrays_of_another_kind_are_refused():
    for array in (np.zeros((30, 90)), np.zeros((30, 90, 3)), np.zeros((30, 90, 4), np.uint8), [[0]]):
        with pytest.raises(ValueError, match="uint8 array"):
            as_array(array)


# ---------------------------------------------------------------- shape and colour


@pytest.mark.parametrize("ratio", [1.0, 2.37, 4.0, 8.0])
def test_the_way_to_the_canvas_and_back_keeps_shape_and_colour(ratio):
    width = round(40 * ratio)
    red = np.zeros((40, width, 3), np.uint8)
    red[..., 0], red[..., 2] = 201, 30
    canvas = line_to_canvas(red, (128, 512))
    assert canvas.shape == (3, 128, 512) and canvas.dtype == torch.float32
    pixels = np.asarray(canvas_to_line(canvas, width / 40))
    assert pixels.shape == (128, round(128 * width / 40), 3) and (pixels == [201, 0, 30]).all()


def test_a_canvas_is_rounded_not_truncated():
    canvas = torch.full((3, 128, 512), 100.7 / 127.5 - 1)
    assert (np.asarray(canvas_to_line(canvas, 4.0)) == 101).all()
    assert (np.asarray(canvas_to_line(torch.full((3, 128, 512), 1.5), 4.0)) == 255).all()


def test_left_stays_left_and_red_stays_red(line):
    pixels = np.asarray(canvas_to_line(line_to_canvas(np.asarray(line), (128, 512)), 3.0)).astype(int)
    left, middle, right = (pixels[10:30, x : x + 40].mean((0, 1)).argmax() for x in (20, 170, 320))
    assert (left, middle, right) == (0, 1, 2)


# ---------------------------------------------------------------- the call


@pytest.mark.parametrize("size", [(64, 64), (91, 30), (240, 30), (300, 150)])
def test_a_restoration_has_the_ratio_of_its_input_and_is_128_high_or_as_high_as_that(model, size):
    result, height = restore(model, Image.new("RGB", size, "white"), steps=1), max(128, size[1])
    assert result.image.size == (round(height * size[0] / size[1]), height) and result.image.mode == "RGB"
    low = restore(model, Image.new("RGB", size, "white"), steps=1, height=32)
    assert low.image.size == (round(32 * size[0] / size[1]), 32)
    assert len(result.confidence) == len(result.text) and all(0 <= p <= 1 for p in result.confidence)
    assert result.trace == [] and isinstance(result.read_from_input, str)


@pytest.mark.parametrize("mode", ["full", "baseline", "no-text"])
def test_the_same_seed_gives_the_same_bytes(model, line, mode):
    first, second, other = (
        restore(model, line, mode=mode, seed=seed, do_no_harm=False) for seed in (3, 3, 4)
    )
    assert picture(first.image) == picture(second.image) and first.text == second.text
    assert picture(first.image) != picture(other.image)


def test_path_picture_and_array_are_the_same_line(model, line, tmp_path):
    line.save(tmp_path / "line.png")
    results = [restore(model, image, steps=2) for image in (tmp_path / "line.png", line, np.asarray(line))]
    assert len({result.image.tobytes() for result in results}) == 1


def test_a_loaded_model_restores_identically(model, line, tmp_path):
    again = DiffTSR.from_pretrained(model.save(tmp_path))
    assert restore(again, line, steps=2).image.tobytes() == restore(model, line, steps=2).image.tobytes()


def test_a_batch_gives_each_line_what_it_gets_alone(model, line):
    others = [line, line.rotate(180), Image.new("RGB", (70, 50), "white")]
    together = restore_batch(model, others, steps=2, seed=5)
    for image, result in zip(others, together):
        alone = restore(model, image, steps=2, seed=5)
        assert result.image.size == alone.image.size and result.text == alone.text
        assert np.abs(np.asarray(result.image, int) - np.asarray(alone.image, int)).max() <= 1
    assert restore_batch(model, []) == []


def test_a_known_text_is_kept_with_characters_the_alphabet_lacks(model, line):
    result = restore(model, line, steps=2, text="AB字9")
    assert result.text == "AB字9" and result.confidence == [1.0] * 4
    with pytest.raises(ValueError, match="24"):
        restore(model, line, text="A" * 25)


def test_candidates_try_again_and_the_most_legible_is_kept(model, line):
    best = restore(model, line, steps=2, seed=10, candidates=3, text="A1")
    tries = [restore(model, line, steps=2, seed=seed, text="A1") for seed in (10, 11, 12)]
    alone = np.asarray(tries[best.seed - 10].image).astype(int)
    assert np.abs(np.asarray(best.image).astype(int) - alone).max() <= 1  # as alone, up to the rounding of a batch
    tokens = model.alphabet.encode("A1")[None]
    lr = line_to_canvas(np.asarray(line), (32, 128))[None]
    images = [sample(model, lr, steps=2, seed=seed, text=tokens).image for seed in (10, 11, 12)]
    scores = [float(legibility(model, image, tokens)) for image in images]
    assert best.seed - 10 == int(np.argmax(scores))
    with pytest.raises(ValueError, match="candidates"):
        restore(model, line, candidates=0)


def test_a_trace_holds_every_step(model, line):
    result = restore(model, line, steps=3, trace=True)
    assert [step.t for step in result.trace] == [999, 665, 332] and result.trace[-1].s == -1
    assert result.trace[0].c_t.shape == (1, 24) and result.trace[0].z_t.shape == (1, 4, 8, 32)


def test_the_gate_has_the_last_word_unless_it_is_off_or_the_text_is_known(model, line):
    free = restore(model, line, steps=1, do_no_harm=False)
    gated = restore(model, line, steps=1)
    told = restore(model, line, steps=1, text="ABC")
    assert free.gate is None and told.gate is None
    assert gated.gate.action in ("kept", "blended", "input")


def test_what_is_put_back_whole_is_the_input_itself_and_has_not_been_through_the_canvas(model, line, monkeypatch):
    monkeypatch.setattr(model.config, "mismatch_limit", -1.0)  # nothing can match so well
    large = line.resize((900, 300))
    stopped, same = restore(model, line, steps=1), restore(model, large, steps=1)
    assert stopped.gate.action == same.gate.action == "input" and stopped.gate.reasons
    enlarged = cv2.resize(np.asarray(line), (384, 128), interpolation=cv2.INTER_LINEAR)
    assert stopped.image.tobytes() == enlarged.tobytes() and same.image.tobytes() == large.tobytes()
    small = restore(model, large, steps=1, height=30).image
    assert small.tobytes() == cv2.resize(np.asarray(large), (90, 30), interpolation=cv2.INTER_AREA).tobytes()


def test_places_of_what_another_reader_saw():
    assert spread_places("AB", [0.25, 0.75]) == [0.25, 0.75]
    assert spread_places("A B", [0.2, 0.8]) == pytest.approx([0.2, 0.5, 0.8])
    assert spread_places(" AB ", [0.3, 0.6]) == pytest.approx([0.3, 0.3, 0.6, 0.6])
    assert spread_places("  ", []) == [0.5, 0.5]


TRADITIONAL = "東車長門風馬魚鳥龍雲電話書畫國語學習開關時間飛機頭髮聽說讀寫買賣愛樂貓雞豬飯麵茶湯銀錢紅綠藍黃雙腦龜"


def traditional_lines() -> list[tuple[str, np.ndarray]]:
    """Fifty traditional characters, ten a line, 48 pixels each."""
    font, lines = find_fonts(package_font_folders())[0].pillow(48), []
    for text in re.findall(".{10}", TRADITIONAL):
        page = Image.new("RGB", (512, 64), "white")
        ImageDraw.Draw(page).text((16, 4), text, fill="black", font=font)
        lines.append((text, np.asarray(page)))
    return lines


def test_another_reader_never_replaces_what_the_alphabet_lacks():
    """As PP-OCR reads them, all of them become UNK, none a simplified twin."""
    pytest.importorskip("rapidocr")
    alphabet = Alphabet.classroom()
    assert len(TRADITIONAL) == 50 and sum(c not in alphabet for c in TRADITIONAL) >= 45
    for text, page in traditional_lines():
        reading = ppocr_reading([page], alphabet)
        written = reading.best[0][reading.best[0] != PAD]
        assert len(written) == len(text)
        for token, character in zip(written.tolist(), text):
            assert token == UNK if character not in alphabet else token in (UNK, int(alphabet.encode(character)[0]))
        centers = reading.centers[0, : len(text)]
        expected = ((torch.arange(len(text)) + 0.5) * 48 + 16) / 512
        torch.testing.assert_close(centers, expected, atol=0.03, rtol=0)


def test_the_text_diffusion_never_replaces_what_the_alphabet_lacks(monkeypatch):
    """Through both diffusions of the committed weights: what was read as unknown is unknown in the end."""
    model, lines = DiffTSR.from_pretrained("classroom"), traditional_lines()

    def told(images: Sequence[np.ndarray], alphabet: Alphabet) -> Reading:
        tokens = alphabet.encode_batch([text for text, _ in lines])
        centers = torch.where(tokens == PAD, -1.0, ((torch.arange(24) + 0.5) * 48 + 16) / 512)
        return Reading.of(tokens, centers=centers, prob=0.8)

    monkeypatch.setattr("difftsr.restore.ppocr_reading", told)
    results = restore_batch(model, [page for _, page in lines], reader="ppocr", do_no_harm=False)
    for (text, _), result in zip(lines, results):
        expected = "".join(c if c in model.alphabet else UNKNOWN for c in text)
        assert result.text == result.read_from_input == expected


def test_two_readers_begin_with_what_they_agree_on(monkeypatch):
    """What the second reader is sure of reaches the text diffusion, and our own features stay."""
    model, (_, page) = DiffTSR.from_pretrained("classroom"), traditional_lines()[0]
    told = Reading.of(model.alphabet.encode_batch(["老街茶庄"]), prob=0.999)
    monkeypatch.setattr("difftsr.restore.second_reading", lambda images, alphabet: told)
    result = restore_batch(model, [page], reader="both", do_no_harm=False)[0]
    assert result.read_from_input == "老街茶庄"


def test_an_unknown_reader_is_refused(model, line):
    with pytest.raises(ValueError, match="reader must be one of own, ppocr, both"):
        restore(model, line, reader="tesseract")


def test_transparency_in_memory_is_put_on_white():
    clear = Image.new("RGBA", (60, 20), (0, 0, 0, 0))
    assert (np.asarray(to_rgb(clear)) == 255).all()
