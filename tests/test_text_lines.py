"""Alphabet, fonts, phrases and rendering: what the lesson shows on examples, here on many and on the awkward ones."""

import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from difftsr import text_lines
from difftsr.text_lines import (
    HEIGHT,
    MAX_LENGTH,
    PAD,
    UNK,
    UNKNOWN,
    Alphabet,
    Font,
    LineRenderer,
    LineStyle,
    Looks,
    PhraseSampler,
    contact_sheet,
    draw_mask,
    draw_style,
    find_fonts,
    glyph_bitmaps,
    is_reserved,
    is_reserved_face,
    luminance,
    package_font_folders,
    read_phrases,
    read_table,
    reserved_texts,
)


@pytest.fixture(scope="module")
def alphabet() -> Alphabet:
    return Alphabet.classroom()


@pytest.fixture(scope="module")
def fonts() -> list[Font]:
    return find_fonts(package_font_folders())


# Alphabet


def test_text_comes_back_from_its_classes(alphabet):
    rng = np.random.default_rng(0)
    for length in range(MAX_LENGTH + 1):
        text = "".join(rng.choice(list(alphabet.characters), length))
        tokens = alphabet.encode(text)
        assert tokens.dtype == torch.long and tokens.shape == (MAX_LENGTH,)
        assert alphabet.decode(tokens) == text
        assert (tokens[length:] == PAD).all() and (tokens[:length] > UNK).all()


def test_space_unknown_and_padding_differ(alphabet):
    tokens = alphabet.encode(" 濮 ")
    assert tokens[0] == tokens[2] and len({int(tokens[0]), UNK, PAD}) == 3
    assert tokens[1] == UNK and tokens[3] == PAD
    assert alphabet.decode(tokens) == f" {UNKNOWN} "
    assert alphabet.encode(UNKNOWN)[0] == UNK  # what was read once can be encoded again


def test_padding_is_dropped_wherever_it_stands(alphabet):
    a, b = alphabet.encode("ab")[:2].tolist()
    assert alphabet.decode([PAD, a, PAD, PAD, b]) == "ab"


def test_batches_agree_with_single_texts(alphabet):
    texts = ["", "a b", "老街"]
    assert alphabet.decode_batch(alphabet.encode_batch(texts, length=5)) == texts
    assert alphabet.encode_batch(texts, length=5).shape == (3, 5)


def test_sizes_and_order(alphabet):
    assert len(Alphabet.tiny()) == 38
    assert alphabet.encode("0")[0] == 2 + alphabet.characters.index("0")
    assert sum(0x4E00 <= ord(c) < 0xA000 for c in alphabet.characters) == 3755
    assert all(c in alphabet for c in "啊座A~ ，￥·") and "濮" not in alphabet


def test_case_width_and_script_are_kept(alphabet):
    assert len(set(alphabet.encode("aA，,")[:4].tolist())) == 4
    assert alphabet.encode("價")[0] == UNK  # not silently the simplified form


def test_wrong_alphabets_and_texts_are_refused(alphabet, tmp_path):
    with pytest.raises(ValueError, match="25 characters"):
        alphabet.encode("x" * 25)
    with pytest.raises(ValueError, match="twice"):
        Alphabet("aba")
    with pytest.raises(ValueError, match="U\\+FFFD"):
        Alphabet("ab" + UNKNOWN)
    file = tmp_path / "letters.txt"
    file.write_text("ab c\n中b文\r\n", encoding="utf-8")
    assert Alphabet.from_file(file).characters == "ab c中文"


# Fonts


def test_pinned_fonts_hold_the_alphabet(alphabet, fonts):
    assert {"Noto Sans SC", "Noto Serif SC", "WenQuanYi Micro Hei"} <= {font.family for font in fonts}
    assert any(font.covers(alphabet.characters) for font in fonts)


def test_a_held_glyph_leaves_ink_and_a_missing_one_is_not_held(fonts):
    font = fonts[0]
    held = sorted(font.characters)
    for character in np.random.default_rng(0).choice(held, 200):
        assert character.isspace() or any(font.pillow(24).getmask(str(character)))
    assert not font.covers("\ue000") and not font.covers("老\ue000") and not font.covers("\U0001f600")


@pytest.mark.parametrize("family, file", [
    ("LXGW WenKai", "x.ttf"), ("霞鹜文楷", "x.ttf"), ("x", "LXGWWenKai-Bold.ttf"), ("Smiley Sans Oblique", "x.ttf"),
    ("x", "gbsn00lp.ttf"), ("AR PL SungtiL GB", "x.ttf"), ("ZCOOL QingKe HuangYou", "x.woff2"),
    ("x", "zcool-qingke-huangyou-chinese-simplified-400-normal.woff2"),
])  # fmt: skip
def test_reserved_faces_are_recognised_by_either_name(family, file):
    assert is_reserved_face(family, file)


def test_training_never_gets_a_reserved_face(fonts, tmp_path, monkeypatch):
    """Also where a packager renamed the file, or the family."""
    assert not any(is_reserved_face(font.family, font.path) for font in find_fonts())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    os.symlink(fonts[0].path, tmp_path / "SmileySans-Oblique.otf")
    assert find_fonts([tmp_path]) == []
    assert len(find_fonts([tmp_path], training=False)) == 1
    os.rename(tmp_path / "SmileySans-Oblique.otf", tmp_path / "innocent.otf")
    assert len(find_fonts([tmp_path])) == 1
    monkeypatch.setattr(text_lines, "RESERVED_FACES", (("notosanssc",),))
    assert find_fonts([tmp_path]) == []


def test_font_cache_is_used_and_follows_the_file(fonts, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    os.symlink(fonts[-1].path, tmp_path / "face.ttc")
    first = find_fonts([tmp_path])
    monkeypatch.setattr(text_lines, "_held_glyphs", lambda *_: pytest.fail("looked at the glyphs again"))
    assert find_fonts([tmp_path])[0].characters == first[0].characters
    (tmp_path / "cache/difftsr/fonts.json").write_text("{broken")
    monkeypatch.setattr(text_lines, "_held_glyphs", lambda *_: [[32, 126]])
    assert find_fonts([tmp_path])[0].characters == set(map(chr, range(32, 127)))


# Phrases


def test_phrases_are_writable_short_and_not_reserved(alphabet):
    sampler, rng = PhraseSampler(alphabet), np.random.default_rng(5)
    phrases = [sampler.sample(rng) for _ in range(3000)]
    assert all(1 <= len(p) <= MAX_LENGTH and p == p.strip() and all(c in alphabet for c in p) for p in phrases)
    assert not any(is_reserved(p) for p in phrases)
    assert len(set(phrases)) > 2500
    ascii_only = sum(p.isascii() for p in phrases) / len(phrases)
    assert 0.15 < ascii_only < 0.5 and sum(any(c.isdigit() for c in p) for p in phrases) > 300


def test_phrases_depend_on_the_generator_alone(alphabet):
    draws = [[PhraseSampler(alphabet, words="builtin").sample(rng) for _ in range(5)]
             for rng in (np.random.default_rng(3), np.random.default_rng(3), np.random.default_rng(4))]  # fmt: skip
    assert draws[0] == draws[1] != draws[2]


def test_sampler_skips_reserved_texts(alphabet, monkeypatch):
    """With every phrase but one reserved, that one is what comes out."""
    monkeypatch.setattr(text_lines, "is_reserved", lambda text: text != "停车")
    sampler = PhraseSampler(Alphabet("停车"), random_share=1.0)
    assert {sampler.sample(np.random.default_rng(seed)) for seed in range(20)} == {"停车"}
    monkeypatch.setattr(text_lines, "is_reserved", lambda text: True)
    with pytest.raises(ValueError, match="1000 phrases"):
        sampler.sample(np.random.default_rng(0))


def test_reserved_texts_in_all_disguises():
    assert len(reserved_texts()) == len(set(reserved_texts())) == 132
    for text in reserved_texts():
        assert is_reserved(text) and is_reserved(text.upper()) and is_reserved(" ".join(text))
        if len(text.replace(" ", "")) >= 4:
            assert is_reserved("甲" + text + "乙")
    assert is_reserved("SeafoodMarket") and is_reserved("望海楼")
    assert not is_reserved("望海") and not is_reserved("新望海楼")  # under four characters: only when equal


def test_reserved_texts_can_be_written(alphabet):
    for text in reserved_texts():
        assert 1 <= len(text) <= MAX_LENGTH and all(c in alphabet for c in text), text


def test_tiny_alphabet_has_phrases():
    tiny, rng = Alphabet.tiny(), np.random.default_rng(0)
    sampler = PhraseSampler(tiny)
    phrases = [sampler.sample(rng) for _ in range(50)]
    assert all(set(p) <= set(tiny.characters) for p in phrases) and len(set(phrases)) > 30


def test_rare_characters_are_met(alphabet):
    sampler, rng = PhraseSampler(alphabet), np.random.default_rng(1)
    seen = Counter(c for _ in range(12000) for c in sampler.sample(rng))
    hanzi = [c for c in alphabet.characters if 0x4E00 <= ord(c) < 0xA000]
    assert np.mean([seen[c] > 0 for c in hanzi]) > 0.85


def test_templates_name_only_lists_that_exist():
    lists, shares = read_phrases()
    for kind in shares:
        for template in lists[kind]:
            for name, _ in text_lines.PLACEHOLDER.findall(template):
                assert not name or "-" in name or name == "word" or name in lists, f"{kind}: {template}"
    assert sum(shares.values()) == 100


# Rendering


def test_lines_obey_the_rules(alphabet, fonts):
    renderer, sampler, rng = LineRenderer(fonts), PhraseSampler(alphabet, words="builtin"), np.random.default_rng(2)
    texts = [sampler.sample(rng) for _ in range(60)] + ["一", "i", "W" * 24, "国" * 24, "—", "1 1"]
    for text in texts:
        line = renderer.render(text, rng)
        height, width = line.image.shape[:2]
        assert line.image.dtype == np.uint8 and height == HEIGHT and 1 <= width / height <= 8
        assert line.centers.shape == (len(text),) and line.boxes.shape == (len(text), 4)
        assert (np.diff(line.centers) > 0).all(), text
        assert (line.boxes[:, :2] <= line.boxes[:, 2:]).all()
        assert line.boxes.min() >= 0 and line.boxes.max() <= 1


def test_same_seed_same_bytes(fonts):
    images = [LineRenderer(fonts).render("老街 Tea", np.random.default_rng(seed)).image for seed in (7, 7, 8)]
    assert np.array_equal(images[0], images[1])
    assert images[0].shape != images[2].shape or not np.array_equal(images[0], images[2])


@pytest.mark.parametrize("angle, skew", [(0, 0), (4, 0), (0, 0.05)])
def test_ink_lies_in_its_box(fonts, angle, skew):
    """Every dark pixel is inside some character's box, and every box but that of the space holds ink."""
    shift = np.array([[0, skew], [0, -skew], [skew, 0], [0, skew]])
    style = LineStyle(fonts[0], (0, 0, 0), (255, 255, 255), spacing=0.2, angle=angle, perspective=shift)
    line = LineRenderer(fonts).render("中A 国一", np.random.default_rng(0), style)
    ink = line.image[..., 0] < 128
    covered = np.zeros_like(ink)
    for i, box in enumerate(np.rint(line.boxes * np.tile(ink.shape[::-1], 2)).astype(int)):
        left, top, right, bottom = box + [-2, -2, 2, 2]
        covered[max(0, top) : bottom, max(0, left) : right] = True
        assert ink[max(0, top) : bottom, max(0, left) : right].any() == (i != 2)
    assert not (ink & ~covered).any()


def test_colours_are_what_the_style_says(fonts):
    style = LineStyle(fonts[0], (200, 0, 0), (0, 0, 250))
    image = LineRenderer(fonts).render("国", np.random.default_rng(0), style).image.reshape(-1, 3)
    assert (image[0] == (0, 0, 250)).all() and (image == (200, 0, 0)).all(1).any()  # RGB, not BGR


def test_styles_can_be_read(fonts):
    rng = np.random.default_rng(0)
    for _ in range(300):
        style = draw_style(fonts[0], rng)
        assert abs(luminance(style.color) - luminance(style.background)) >= text_lines.MIN_CONTRAST


def test_fonts_are_chosen_by_what_they_hold(fonts):
    latin = Font("x", family="Latin", held=np.isin(np.arange(65536), np.arange(32, 127)))
    renderer, rng = LineRenderer([*fonts, latin]), np.random.default_rng(0)
    assert {renderer.choose_font("老街", rng).family for _ in range(60)} == {font.family for font in fonts}
    picked = Counter(renderer.choose_font("Tea", rng).family for _ in range(600))
    assert 0.5 < picked["Latin"] / 600 < 0.7 and len(picked) == 4
    with pytest.raises(ValueError, match="no font holds"):
        renderer.choose_font("\ue000", rng)


def test_wrong_requests_are_refused(fonts):
    renderer, rng = LineRenderer(fonts), np.random.default_rng(0)
    for text in ("", "x" * 25):
        with pytest.raises(ValueError, match="1 to 24 characters"):
            renderer.render(text, rng)
    with pytest.raises(ValueError, match="does not hold"):
        renderer.render("\ue000", rng, LineStyle(fonts[0]))
    with pytest.raises(ValueError, match="no fonts"):
        LineRenderer([])


def test_a_flat_character_is_not_blown_up(fonts):
    _, boxes, (top, bottom) = draw_mask("一", fonts[0])
    assert bottom - top > 5 * (boxes[0, 3] - boxes[0, 1])


def test_glyphs_tell_classes_apart(fonts):
    alphabet = Alphabet("日目田由甲AB ")
    bitmaps = glyph_bitmaps(alphabet, 24, fonts[0])
    assert bitmaps.shape == (len(alphabet), 24, 24) and bitmaps.dtype == np.uint8
    assert not bitmaps[PAD].any() and bitmaps[UNK].any()
    assert len({bitmap.tobytes() for bitmap in bitmaps[UNK:-1]}) == len(alphabet) - 2
    unknown = glyph_bitmaps(Alphabet("\ue000"), 24, fonts[0])
    assert np.array_equal(unknown[2], unknown[UNK])


def test_contact_sheet_holds_every_picture():
    images = [np.full((10, 20 + 10 * i, 3), 40 * i, dtype=np.uint8) for i in range(5)]
    sheet = contact_sheet(images, columns=2, height=10, gap=2)
    assert sheet.shape == (36, 60 + 50 + 4, 3)
    assert all((sheet == 40 * i).all(-1).sum() == 10 * (20 + 10 * i) for i in range(5))


def test_command_line(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "DIFFTSR_FONTS": ""}
    command = [sys.executable, "-m", "difftsr.text_lines", "--show", "3", "--seed", "1"]
    runs = [subprocess.run(command, capture_output=True, text=True, env=environment, check=True) for _ in range(2)]
    assert len(runs[0].stdout.splitlines()) == 3 and runs[0].stdout == runs[1].stdout


# Looks


def test_looks_are_shares(fonts):
    rng = np.random.default_rng(0)
    none = Looks(**dict.fromkeys(vars(Looks()), 0.0))
    plain = draw_style(fonts[0], rng, looks=none)
    assert not (plain.texture or plain.grain or plain.shading or plain.bold or plain.outline or plain.angle)
    styles = [draw_style(fonts[0], rng, looks=Looks(curve=0.5, grain=1.0)) for _ in range(200)]
    assert all(style.grain for style in styles) and 0.35 < np.mean([style.curve != 0 for style in styles]) < 0.65
    with pytest.raises(ValueError, match="outline is a share"):
        Looks(outline=1.5)


def test_effects_that_are_off_change_no_draw(fonts):
    first, second = (draw_style(fonts[0], np.random.default_rng(3), looks=looks) for looks in (None, Looks(curve=1.0)))
    assert second.curve and first.margins == second.margins and first.color == second.color


@pytest.mark.parametrize("curve", [-0.3, 0.3])
def test_boxes_follow_the_curve(fonts, curve):
    style = LineStyle(fonts[0], color=(0, 0, 0), background=(255, 255, 255), curve=curve)
    line = LineRenderer(fonts).render("口口口口口口口", np.random.default_rng(0), style)
    height, width = line.image.shape[:2]
    middle, ends = line.boxes[3, [1, 3]].mean(), line.boxes[[0, -1]][:, [1, 3]].mean()
    assert np.sign(middle - ends) == np.sign(curve) and abs(middle - ends) > 0.1
    ink = line.image[..., 0] < 128
    covered = np.zeros_like(ink)
    for left, top, right, bottom in line.boxes * np.tile([width, height], 2):
        covered[int(top) - 1 : int(bottom) + 2, int(left) - 1 : int(right) + 2] = True
    assert ink.any() and not (ink & ~covered).any()


def test_photographs_lie_behind_the_text_and_leave_it_readable(fonts):
    if not text_lines.photographs():
        pytest.skip("needs the package scikit-image for its photographs")
    assert len(text_lines.photographs()) >= 6
    for seed, name in enumerate(text_lines.photographs()):
        rng = np.random.default_rng(seed)
        piece = text_lines.cut_photograph(name, (128, 1024), 20, rng)
        assert piece.shape == (128, 1024, 3) and piece.std() <= 20.01 and np.abs(piece.mean((0, 1))).max() < 1
        style = LineStyle(fonts[0], color=(0, 0, 0), background=(200, 200, 200), photograph=name)
        line = LineRenderer(fonts).render("照片", np.random.default_rng(seed), style)
        again = LineRenderer(fonts).render("照片", np.random.default_rng(seed), style)
        assert np.array_equal(line.image, again.image) and line.image.std() > 5


def test_rare_characters_come_in_words(alphabet):
    sampler, rng = PhraseSampler(alphabet, random_share=0.0, rare_share=1.0), np.random.default_rng(0)
    seen = Counter("".join(sampler.sample(rng) for _ in range(8000)))
    plain = PhraseSampler(alphabet, random_share=0.0)
    usual = Counter("".join(plain.sample(rng) for _ in range(8000)))
    hanzi = [c for c in alphabet.characters if "\u4e00" <= c <= "\u9fff"]
    assert sum(seen[c] < 2 for c in hanzi) < sum(usual[c] < 2 for c in hanzi) / 4
    assert all(sampler._word_with("国", rng).count("国") for _ in range(20))
    with pytest.raises(ValueError, match="shares"):
        PhraseSampler(alphabet, rare_share=2)


def test_missing_fonts_are_named_with_what_brings_them(monkeypatch, capsys):
    everything = find_fonts(package_font_folders(), training=False)
    monkeypatch.setattr(text_lines, "find_fonts", lambda training: everything)
    text_lines.print_fonts()
    said = capsys.readouterr().out
    assert "fonts-smiley-sans" in said and "DIFFTSR_FONTS" in said and "0 for evaluation" in said
    assert "Noto Sans SC                                 not found" not in said


# Tables as people's editors and spreadsheets write them

ROWS = [{"file": "0.png", "text": "停车"}, {"file": "1.png", "text": 'a "b", c'}]
TAB = 'file\ttext\n0.png\t停车\n1.png\ta "b", c\n'
GOOD_TABLES = {
    "plain": TAB.encode(),
    "byte order mark": TAB.encode("utf-8-sig"),
    "Windows line ends": TAB.replace("\n", "\r\n").encode(),
    "old Mac line ends": TAB.replace("\n", "\r").encode(),
    "UTF-16 with its mark": TAB.encode("utf-16"),
    "other capitals": TAB.replace("file\ttext", "File\tTEXT").encode(),
    "blank rows": TAB.replace("\n", "\n  \n\t\n\n").encode(),
    "a blank row first": b"\n" + TAB.encode(),
    "spaces around": TAB.replace("\t", " \t ").encode(),
    "an empty cell more": TAB.replace("停车\n", "停车\t\n").encode(),
    "no last line end": TAB.rstrip("\n").encode(),
    "commas": 'file,text\n0.png,停车\n1.png,"a ""b"", c"\n'.encode(),
    "semicolons": 'file;text\n0.png;停车\n1.png;"a ""b"", c"\n'.encode(),
}


@pytest.mark.parametrize("how", GOOD_TABLES)
def test_a_table_says_the_same_however_it_was_saved(how, tmp_path):
    (tmp_path / "labels.tsv").write_bytes(GOOD_TABLES[how])
    assert read_table(tmp_path / "labels.tsv", "file", "text") == ROWS


def test_a_row_may_end_before_the_columns_that_nobody_needs(tmp_path):
    (tmp_path / "t.tsv").write_text("file\ttext\tnote\n0.png\tA\n1.png\tB\tsoft\n", encoding="utf-8")
    assert [row["note"] for row in read_table(tmp_path / "t.tsv", "file", "text")] == ["", "soft"]
    with pytest.raises(ValueError, match="t.tsv, row 2: 2 cells under 3 columns"):
        read_table(tmp_path / "t.tsv")


def test_line_ends_of_other_scripts_are_no_row_ends(tmp_path):
    (tmp_path / "t.tsv").write_text("text\na\u2028b\x0bc\x85d\n", encoding="utf-8")
    assert read_table(tmp_path / "t.tsv") == [{"text": "a\u2028b\x0bc\x85d"}]


BAD_TABLES = {
    "GBK": (TAB.encode("gbk"), "row 2: its bytes are no UTF-8"),
    "UTF-16 without its mark": (TAB.encode("utf-16-le"), "UTF-"),
    "a cell too many": (TAB.replace("停车", "停\t车").encode(), r"row 2: 3 cells under 2 columns \(file, text\)"),
    "a cell too few": (b"file\ttext\n0.png\tA\n\n1.png\n2.png\n", r"row 4: 1 cells .* \(and 1 more rows like it\)"),
    "no names": ("0.png\t停车\n1.png\t北\n".encode(), "row 1: no column file, text, only 0.png, 停车"),
    "another name": (b"file\tlabel\n0.png\tA\n", "row 1: no column text, only file, label"),
    "a name twice": (b"file\ttext\tText\n0.png\tA\tB\n", "row 1: the column text stands there twice"),
    "empty": (b"", "row 1: no column file, text, only an empty file"),
}


@pytest.mark.parametrize("how", BAD_TABLES)
def test_what_is_no_table_is_refused_with_its_name_the_row_and_what_is_allowed(how, tmp_path):
    content, reason = BAD_TABLES[how]
    (tmp_path / "labels.tsv").write_bytes(content)
    with pytest.raises(ValueError, match=reason) as error:
        read_table(tmp_path / "labels.tsv", "file", "text")
    said = str(error.value)
    assert said.startswith(f"{tmp_path / 'labels.tsv'}, row ") and "\n" not in said and "allowed: UTF-8" in said


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.tsv: no such file"):
        read_table(tmp_path / "nowhere.tsv")


# The console


@pytest.mark.parametrize("encoding", ["cp1252", "gbk", "ascii"])
def test_phrases_are_printed_on_any_console(encoding):
    command = [sys.executable, "-m", "difftsr.text_lines", "--show", "5", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding})
    assert done.returncode == 0 and len(done.stdout.decode(encoding).splitlines()) == 5, done.stderr


def test_a_command_with_nothing_to_do_says_so(capsys):
    assert text_lines.main([]) == 2
    assert "--fonts" in capsys.readouterr().err
