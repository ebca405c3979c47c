"""The command of restoring: what it writes, what it refuses, and how it goes on."""

import errno
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageCms

from difftsr import command, restore
from difftsr.command import find_sources, main, printable
from difftsr.dataset import MAX_PIXELS
from difftsr.pages import frame
from restore_common import coloured_line, picture, save_tiny_weights

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_tiny_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def line():
    return coloured_line()


@pytest.fixture
def call(weights, tmp_path):
    """The command in this process, with tiny weights, one step and the results in `out`; returns its exit status."""

    def run(*arguments, output=tmp_path / "out"):
        fixed = ["--output", output, "--weights", weights, "--steps", 1]
        return main([str(word) for word in [*fixed, *arguments]])

    return run


@pytest.fixture
def inputs(line, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    line.save(folder / "one.png")
    line.resize((120, 30)).save(folder / "two.jpg")
    return folder


BAD_FILES = {  # content, and a word of the reason
    "empty.png": (b"", "empty"),
    "words.png": (b"these are words", "not an image"),
    "tall.png": (picture(Image.new("RGB", (20, 60))), "--page"),
    "pixel.png": (picture(Image.new("RGB", (1, 1))), "too small: 1 x 1"),
    "half.png": (picture(Image.effect_noise((300, 100), 50))[:3000], "cannot be decoded"),
    "bomb.png": (picture(Image.new("1", (30000, 30000))), "too large"),
}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_command_in_a_fresh_process(inputs, weights, tmp_path):
    """A folder and single files, good and bad: the good ones are restored, the bad ones named, the status is 2."""
    for name, (content, _) in BAD_FILES.items():
        (inputs / name).write_bytes(content)
    output = tmp_path / "results" / "here"
    words = [inputs, tmp_path / "nowhere.png", "--output", output, "--weights", weights, "--steps", 2]
    result = subprocess.run(
        [sys.executable, "-m", "difftsr.restore", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    errors = result.stderr.splitlines()
    assert len(errors) == len(BAD_FILES) + 1 and all(row.startswith("error: ") for row in errors)
    for name, (_, reason) in {**BAD_FILES, "nowhere.png": (b"", "no such file")}.items():
        assert any(name in row and reason in row for row in errors), name
    assert names(output) == ["one.json", "one.png", "two.jpg", "two.json"]
    report = json.loads((output / "two.json").read_text(encoding="utf-8"))
    assert report["size"] == [512, 128] and report["mode"] == "full" and report["steps"] == 2 and report["seed"] == 0
    assert len(report["confidence"]) == len(report["text"]) and report["result"] == "two.jpg"
    with Image.open(output / "one.png") as image:
        assert image.size == (384, 128)
    assert "2 restored, 7 failed" in result.stdout


def test_the_console_script_is_the_command():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"]["difftsr-restore"] == "difftsr.restore:main"
    with pytest.raises(SystemExit) as stopped:
        restore.main(["--help"])
    assert stopped.value.code == 0


def test_the_help_says_what_a_newcomer_asks(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for word in ("difftsr-restore line.png --output restored", "standard input", "--overwrite", "Exit status"):
        assert word in said
    assert "\b" not in said


def test_the_command_repeats_itself_to_the_byte_and_says_0(inputs, call, tmp_path, capsys):
    contents = []
    for name in ("a", "b"):
        assert call(inputs, "--seed", 9, output=tmp_path / name) == 0
        reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((tmp_path / name).glob("*.json"))]
        assert all(report.pop("seconds") > 0 for report in reports)
        contents.append((reports, [(tmp_path / name / report["result"]).read_bytes() for report in reports]))
    assert contents[0] == contents[1] and len(contents[0][1]) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (["--steps", "0"], "steps must lie in 1..1000"),
        (["--steps", "1001"], "steps must lie in 1..1000"),
        (["--weights", "nobody"], "nobody: no weights here"),
        (["--candidates", "0"], "candidates"),
        (["--page", "--text", "A"], "--text"),
        (["--text", "A"], "--text is what one line says, and these are 2 images: name one, or leave --text out"),
        (["--mode", "no-text", "--text", "A"], "no-text"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_what_is_wrong_for_all_is_said_once(inputs, weights, tmp_path, capsys, extra, reason):
    arguments = [str(inputs), "--output", str(tmp_path / "out"), *extra]
    if "--weights" not in extra:
        arguments += ["--weights", str(weights)]
    assert main(arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("error: ") and reason in said[0]
    assert not (tmp_path / "out").exists()


def test_a_folder_without_images_and_an_impossible_output_are_errors(inputs, call, tmp_path, capsys):
    (tmp_path / "in2").mkdir()
    assert call(tmp_path / "in2") == 2
    assert "no image in" in capsys.readouterr().err
    assert call(inputs, output=inputs / "one.png" / "here") == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "one.png" in said[0]


# ---------------------------------------------------------------- which images


def test_folders_files_patterns_and_standard_input(inputs, tmp_path):
    (inputs / "note.txt").write_text("x")
    (inputs / ".hidden.png").write_bytes(b"")
    found = [source.path and source.path.name for source in find_sources([inputs, "-", tmp_path / "other.tif"])]
    assert found == ["one.png", "two.jpg", None, "other.tif"]
    assert [s.path.name for s in find_sources([str(inputs / "*.jpg"), inputs])] == ["two.jpg", "one.png"]  # each once
    shutil.copy(inputs / "one.png", inputs / "a[1].png")
    assert [s.path.name for s in find_sources([inputs / "a[1].png"])] == ["a[1].png"]  # a file before a pattern
    assert [s.name for s in find_sources(["no/where/*.png"])] == ["no/where/*.png"]  # gets its line in its turn


def test_standard_input(line, call, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(picture(line, "JPEG"))))
    assert call("-") == 0 and names(tmp_path / "out") == ["stdin.jpg", "stdin.json"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert call("-", output=tmp_path / "b") == 2
    assert "standard input: the file is empty" in capsys.readouterr().err


def test_names_in_any_script_and_names_that_are_no_text(line, call, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    good = ["招牌.png", "شارع.png", "रेखा.png", "two\nlines.png", os.fsdecode(b"broken\xff.png")]
    for name in good:
        line.save(folder / name)
    (folder / "an\nerror.png").write_bytes(b"")
    assert call(folder, "--json") == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1 and "an\\nerror.png" in said.err
    records = [json.loads(row) for row in said.out.splitlines()]
    assert sorted(record["status"] for record in records) == ["failed"] + 5 * ["restored"]
    assert {Path(name).stem + ".png" for name in good} <= set(names(tmp_path / "out"))
    assert printable("招牌\n\udcff") == "招牌\\n\\udcff"


def test_a_file_that_may_not_be_read(inputs, call, monkeypatch, capsys):
    def open_file(path, *arguments, **named):
        if path.name == "one.png":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", open_file)
    assert call(inputs) == 2
    said = capsys.readouterr()
    assert said.err.splitlines() == [f"error: {inputs / 'one.png'}: Permission denied"] and "1 restored" in said.out


# ---------------------------------------------------------------- what is written


def test_nothing_is_overwritten_unless_asked(inputs, call, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "one.png").write_bytes(b"somebody's picture")
    (out / "two.json").write_text('{"somebody": "else"}')
    assert call(inputs) == 2
    assert (out / "one.png").read_bytes() == b"somebody's picture" and names(out) == ["one.png", "two.json"]
    assert all("--overwrite" in row for row in capsys.readouterr().err.splitlines())
    assert call(inputs, "--overwrite") == 0
    assert names(out) == ["one.json", "one.png", "two.jpg", "two.json"]


def test_results_never_replace_inputs_or_each_other(inputs, call, tmp_path, capsys):
    before = (inputs / "one.png").read_bytes()
    assert call(inputs / "one.png", "--overwrite", output=inputs) == 2
    assert "would replace an input" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    shutil.copy(inputs / "two.jpg", tmp_path / "other" / "one.png")  # a JPEG, whatever its name says
    both = [tmp_path / "other" / "one.png", inputs / "one.png"]
    assert call(*both, "--overwrite", "--format", "png", output=inputs) == 2
    assert capsys.readouterr().err.count("\n") == 2 and (inputs / "one.png").read_bytes() == before
    shutil.copy(inputs / "two.jpg", inputs / "one.jpg")
    assert call(inputs) == 2
    assert "the same name" in capsys.readouterr().err and len(names(tmp_path / "out")) == 4


def test_a_batch_goes_on_where_it_stopped(inputs, call, tmp_path, capsys, monkeypatch):
    real, seen = command.write_atomically, []

    def stop_at_the_second_picture(path, content):
        seen.append(path.name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        real(path, content)

    monkeypatch.setattr(command, "write_atomically", stop_at_the_second_picture)
    assert call(inputs) == 130
    assert "goes on from here" in capsys.readouterr().err
    assert names(tmp_path / "out") == ["one.json", "one.png", "two.json"]  # the report is there, its picture is not
    monkeypatch.setattr(command, "write_atomically", real)
    first = (tmp_path / "out" / "one.png").stat().st_mtime_ns
    assert call(inputs) == 0
    assert "1 restored, 1 skipped" in capsys.readouterr().out
    assert (tmp_path / "out" / "one.png").stat().st_mtime_ns == first
    assert call(inputs) == 0 and "2 skipped" in capsys.readouterr().out


def test_processes_share_a_folder(inputs, call, tmp_path, monkeypatch):
    names = sorted(path.stem for path in inputs.iterdir())
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        assert call(inputs) == 0
        done = {path.stem for path in (tmp_path / "out").glob("*.json")}
        assert done == set(names[::2] if rank == 0 else names)


def test_another_input_setting_or_weight_is_another_result(inputs, call, weights, tmp_path, capsys):
    one = inputs / "one.png"
    assert call(one) == 0
    assert call(one, "--seed", 1) == 2 and "--overwrite" in capsys.readouterr().err
    assert call(one, "--seed", 1, "--overwrite") == 0
    Image.open(one).rotate(180).save(one)
    assert call(one, "--seed", 1) == 2
    again = shutil.copytree(weights, tmp_path / "weights")
    settings = json.loads((again / "config.json").read_text(encoding="utf-8"))
    settings["config"]["mismatch_limit"] = 0.1
    (again / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert call(one, "--seed", 1, "--overwrite") == 0 and call(one, "--seed", 1) == 0
    assert call(one, "--seed", 1, "--weights", again) == 2


def test_a_full_disk_leaves_no_part_of_a_picture(inputs, call, tmp_path, capsys):
    """A limit on the size of files makes writing fail half-way, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # the reports fit, the pictures do not
    try:
        status = call(inputs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err.splitlines()
    assert status == 2 and len(said) == 2 and all("File too large" in row for row in said)
    assert {name for name in names(tmp_path / "out") if not name.endswith(".json")} == set()
    assert call(inputs) == 0 and len(names(tmp_path / "out")) == 4


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF"])
def test_format_and_profile_are_kept(line, call, tmp_path, kind):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    holds = kind not in ("BMP", "GIF")
    (tmp_path / "line.any").write_bytes(picture(line, kind, **({"icc_profile": profile} if holds else {})))
    assert call(tmp_path / "line.any") == 0
    written = next(path for path in (tmp_path / "out").iterdir() if path.suffix != ".json")
    with Image.open(written) as image:
        assert image.format == ("PNG" if kind == "GIF" else kind) and image.size == (384, 128)
        assert not holds or image.info["icc_profile"] == profile
    assert call(tmp_path / "line.any", "--format", "png", output=tmp_path / "b") == 0
    assert (tmp_path / "b" / "line.png").is_file()


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_results_are_a_whole_number_of_times_as_large(line, call, tmp_path, scale):
    line.resize((91, 31)).save(tmp_path / "line.png")
    assert call(tmp_path / "line.png", "--scale", scale) == 0
    with Image.open(tmp_path / "out" / "line.png") as image:
        assert image.size == (91 * scale, 31 * scale)


def test_a_result_that_would_fill_the_memory_is_refused(call, tmp_path, capsys):
    Image.new("L", (8000, 2000)).save(tmp_path / "line.png")
    assert 8000 * 2000 * 16 > MAX_PIXELS
    assert call(tmp_path / "line.png", "--scale", 4) == 2
    assert "32000 x 8000 pixels, more than 67 million; choose --scale 2" in capsys.readouterr().err


def test_a_page_at_600_dots_per_inch_is_told_the_scale_that_fits(call, tmp_path, capsys, monkeypatch):
    Image.new("1", (4960, 7016)).save(tmp_path / "page.png")
    assert call(tmp_path / "page.png", "--page") == 2
    said = capsys.readouterr().err
    assert "page.png: the result would have 9920 x 14032 pixels at scale 2, more than 67 million" in said
    assert "choose --scale 1" in said
    monkeypatch.setattr("difftsr.pages.find_lines", lambda page: [])
    assert call(tmp_path / "page.png", "--page", "--scale", 1) == 0


def test_a_known_text_that_cannot_stand_there_is_told_so(line, call, tmp_path, capsys):
    line.save(tmp_path / "line.png")
    assert call(tmp_path / "line.png", "--text", "停" * 100) == 2
    said = capsys.readouterr().err
    assert "line.png: the known text has 100 characters; a line of 90 x 30 pixels holds at most 54" in said
    assert call(tmp_path / "line.png", "--text", " ") == 2 and "--text is empty" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["cp1252", "gbk", "ascii", "utf-8"])
def test_a_name_that_the_console_lacks_changes_nothing(line, weights, tmp_path, encoding):
    """Done is done: a good picture with a Chinese and a Cyrillic name is 0, a bad one is named and 2."""
    line.save(tmp_path / "停车場 Ж.png")
    words = [sys.executable, "-m", "difftsr.restore", "--weights", weights, "--steps", 1, "--output", tmp_path / "出 Ж"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    for given, status in ((tmp_path / "停车場 Ж.png", 0), (tmp_path / "没有 Ж.png", 2)):
        done = subprocess.run([*map(str, words), str(given)], cwd=ROOT, env=environment, capture_output=True)
        assert done.returncode == status and b"Traceback" not in done.stderr, done.stderr.decode(encoding)
    assert names(tmp_path / "出 Ж") == ["停车場 Ж.json", "停车場 Ж.png"]
    assert "no such file" in done.stderr.decode(encoding)


def test_a_question_mark_is_a_character_that_nobody_knows(line, call, tmp_path):
    line.save(tmp_path / "line.png")
    assert call(tmp_path / "line.png", "--text", "A?B") == 0
    assert json.loads((tmp_path / "out" / "line.json").read_text(encoding="utf-8"))["text"] == "A\ufffdB"


# ---------------------------------------------------------------- long lines, pages and PDF files


def test_a_long_line_is_one_result(line, call, tmp_path):
    line.resize((900, 30)).save(tmp_path / "banner.png")
    assert call(tmp_path / "banner.png") == 0
    with Image.open(tmp_path / "out" / "banner.png") as image:
        assert image.height == 128 and abs(image.width - 3840) <= 20


def test_a_page_and_its_report(call, tmp_path, monkeypatch):
    monkeypatch.setattr("difftsr.pages.find_lines", lambda page: [frame(200, 30) + 10, frame(20, 90) + 150])
    Image.effect_noise((300, 260), 40).convert("RGB").save(tmp_path / "photo.jpg")
    assert call(tmp_path / "photo.jpg", "--page") == 0
    report = json.loads((tmp_path / "out" / "photo.json").read_text(encoding="utf-8"))
    assert report["size"] == [600, 520] and ["text" in line for line in report["lines"]] == [True, False]
    assert report["lines"][0]["corners"][2] == [210.0, 40.0] and "upright" in report["lines"][1]["left_alone"]


def test_the_pages_of_a_pdf_file_are_results_of_their_own(line, call, tmp_path, monkeypatch, capsys):
    pytest.importorskip("pypdfium2")
    monkeypatch.setattr("difftsr.pages.find_lines", lambda page: [])
    (tmp_path / "in").mkdir()
    line.save(tmp_path / "in" / "scan.pdf", save_all=True, append_images=[line])
    (tmp_path / "in" / "torn.pdf").write_bytes((tmp_path / "in" / "scan.pdf").read_bytes()[:100])
    assert call(tmp_path / "in", "--scale", 1) == 2
    assert names(tmp_path / "out") == ["scan-p001.json", "scan-p001.png", "scan-p002.json", "scan-p002.png"]
    assert "torn.pdf: cannot be opened as PDF" in capsys.readouterr().err
    assert call(tmp_path / "in" / "scan.pdf", "--scale", 1) == 0 and "2 skipped" in capsys.readouterr().out
    assert call(tmp_path / "in" / "scan.pdf", "--heatmap", output=tmp_path / "other") == 2
    assert capsys.readouterr().err.count("--heatmap, --trace, --animate and --candidates are for single lines") == 2


# ---------------------------------------------------------------- candidates, heatmap, trace, film


def test_everything_that_can_lie_beside_a_result(line, call, tmp_path, capsys):
    line.save(tmp_path / "line.png")
    words = [tmp_path / "line.png", "--candidates", 3, "--heatmap", "--trace", "--animate", "gif"]
    assert call(*words, "--steps", 3) == 0
    expected = {f"line.{end}" for end in ("png", "json", "2.png", "3.png", "heatmap.png", "trace.safetensors", "gif")}
    assert set(names(tmp_path / "out")) == expected
    report = json.loads((tmp_path / "out" / "line.json").read_text(encoding="utf-8"))
    scores = [candidate["score"] for candidate in report["candidates"]]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)
    assert {candidate["seed"] for candidate in report["candidates"]} == {0, 1, 2}
    assert report["seed"] == report["candidates"][0]["seed"]
    assert len(report["evidence"]) == len(report["places"]) == len(report["text"])
    with Image.open(tmp_path / "out" / "line.gif") as film:
        assert film.n_frames == 3
    (tmp_path / "out" / "line.png").unlink()
    (tmp_path / "out" / "line.json").unlink()
    assert call(*words, "--steps", 3) == 2 and "line.2.png is there already" in capsys.readouterr().err


def test_films_are_for_lines_that_fit(line, call, tmp_path, capsys):
    line.resize((900, 30)).save(tmp_path / "banner.png")
    assert call(tmp_path / "banner.png", "--trace") == 2
    assert "restored in pieces" in capsys.readouterr().err and not names(tmp_path / "out")
    assert call(tmp_path / "banner.png", "--page", "--heatmap") == 2
    assert "single lines" in capsys.readouterr().err
