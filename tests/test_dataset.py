"""Sources, pools and loaders: repeatable, resumable, shareable, and not stopped by a bad record."""

import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections import Counter

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from difftsr import dataset, evaluate
from difftsr.cleaning import align, clean, plant_faults, sharpness
from difftsr.dataset import (
    SIZES,
    BatchOrder,
    Line,
    LinePool,
    LineSource,
    LmdbLines,
    PairFolder,
    ShardBatches,
    ShardLines,
    SyntheticLines,
    make_loader,
    open_source,
    read_index,
    read_line,
    to_float,
    write_lmdb,
    write_shards,
)
from difftsr.degradation import DegradationConfig
from difftsr.restore import load_image
from difftsr.restorers import RestorerConfig, labelled, make_restorer
from difftsr.sets import RESERVED_FAMILIES, SAMPLES, STEPS, checksums, evaluation_pairs, write_evaluation_sets
from difftsr.text_lines import (
    MAX_LENGTH,
    Alphabet,
    data_folder,
    find_fonts,
    is_reserved,
    is_reserved_face,
    package_font_folders,
    read_table,
)

SIZE = (32, 128)


@pytest.fixture(scope="module")
def alphabet() -> Alphabet:
    return Alphabet.classroom()


@pytest.fixture(scope="module")
def fonts():
    return find_fonts(package_font_folders())


def synthetic(alphabet, fonts, **options) -> SyntheticLines:
    return SyntheticLines(alphabet, SIZE, fonts=fonts, words="builtin", **{"length": 50, "seed": 4, **options})


@pytest.fixture(scope="module")
def source(alphabet, fonts) -> SyntheticLines:
    return synthetic(alphabet, fonts)


@pytest.fixture(scope="module")
def pool(source, tmp_path_factory) -> LinePool:
    return LinePool.build(tmp_path_factory.mktemp("p") / "pool", source, 37, degradations=3, workers=2, progress=False)


def same(a: dict, b: dict) -> bool:
    return all(np.array_equal(np.asarray(a[k]), np.asarray(b[k])) for k in ("hr", "lr", "tokens", "centers", "text"))


# Records


def test_record(source, alphabet):
    record = source[3]
    assert record["hr"].shape == record["lr"].shape == (*SIZE, 3) and record["hr"].dtype == np.uint8
    assert alphabet.decode(record["tokens"]) == record["text"]
    n = len(record["text"])
    assert ((0 <= record["centers"][:n]) & (record["centers"][:n] <= 1)).all()
    assert (record["centers"][n:] == -1).all() and record["centers"].shape == (MAX_LENGTH,)


def test_a_record_is_a_function_of_seed_index_and_draw(source, alphabet, fonts):
    fresh = synthetic(alphabet, fonts)
    backwards = {i: fresh.record(i, 1) for i in reversed(range(5))}
    assert all(same(source.record(i, 1), backwards[i]) for i in range(5))
    assert all(same(a, b) for a, b in zip(source.records(2, 3), [source.record(2, d) for d in range(3)], strict=True))
    other = synthetic(alphabet, fonts, seed=5)
    assert source[0]["text"] != other[0]["text"] or not np.array_equal(source[0]["hr"], other[0]["hr"])


def test_identity_share(alphabet, fonts):
    always, never = (synthetic(alphabet, fonts, identity=share) for share in (1.0, 0.0))
    assert all(np.array_equal(always[i]["hr"], always[i]["lr"]) for i in range(5))
    assert not any(np.array_equal(never[i]["hr"], never[i]["lr"]) for i in range(5))


def test_a_failing_degradation_is_not_hidden(source, monkeypatch):
    import difftsr.dataset as module

    def broken(*_):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(module, "degrade", broken)
    with pytest.raises(RuntimeError, match="no kernel"):
        [source.record(i) for i in range(5)]


def test_colours_survive(alphabet):
    class Red(LineSource):
        def line(self, index):
            return Line(np.full((128, 300, 3), (250, 10, 0), np.uint8), "红", "here")

    record = Red(alphabet, SIZE, identity=0.0, degradation=DegradationConfig(strength="mild"))[0]
    red = to_float(record["lr"][None])[0].mean((1, 2))
    assert red[0] > 0.5 and red[1] < -0.5 and red[2] < -0.5  # noise is clipped, so the extremes move a little


def test_batches_are_made_on_the_device_that_is_asked_for(pool):
    """The device without memory stands in for a GPU: what is made on it cannot have been made elsewhere."""
    batch = next(make_loader(pool, 2, device="meta"))
    assert {batch[name].device.type for name in ("hr", "lr", "tokens", "centers")} == {"meta"}
    assert batch["hr"].shape == (2, 3, *pool.size)


def test_to_float_is_exact_at_the_ends():
    ends = to_float(np.array([0, 255], np.uint8).reshape(1, 1, 2, 1).repeat(3, -1))
    assert ends.shape == (1, 3, 1, 2) and ends[0, 0, 0].tolist() == [-1, 1]


def test_training_and_evaluation_are_disjoint(alphabet):
    """The default source, with every font of this machine: no reserved face, no reserved text."""
    lines = SyntheticLines(alphabet, SIZE, length=300, seed=9)
    faces = {(font.family, font.path) for family in lines.renderer.families.values() for font in family}
    assert not any(is_reserved_face(*names) for names in faces)
    rng = np.random.default_rng(0)
    assert not any(is_reserved(lines.sampler.sample(rng)) for _ in range(500))


# Pools


def test_pool_holds_what_the_source_gives(pool, source):
    for i in (0, 31, 32, 36):  # both sides of a chunk's border
        for draw in range(3):
            assert np.array_equal(pool.hr[i], source.record(i, draw)["hr"])
            assert np.array_equal(pool.lr[i, draw], source.record(i, draw)["lr"])
        record, expected = pool[i], source[i]
        assert record["text"] == expected["text"] and record["origin"] == expected["origin"]
        assert torch.equal(record["tokens"], expected["tokens"])
        assert np.allclose(record["centers"], expected["centers"], atol=1e-4)


def test_pool_does_not_depend_on_workers(pool, source, tmp_path):
    alone = LinePool.build(tmp_path / "alone", source, 37, degradations=3, workers=1, progress=False)
    for name in ("hr.npy", "lr.npy", "records.json"):
        assert (alone.path / name).read_bytes() == (pool.path / name).read_bytes()


def test_a_broken_build_leaves_nothing(alphabet, fonts, tmp_path):
    class Faulty(SyntheticLines):
        def line(self, index):
            if index == 33:
                raise RuntimeError("power cut")
            return super().line(index)

    faulty = Faulty(alphabet, SIZE, length=50, fonts=fonts, words="builtin")
    with pytest.raises(RuntimeError, match="power cut"):
        LinePool.build(tmp_path / "pool", faulty, workers=1, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_pool_refusals(pool, source, tmp_path):
    with pytest.raises(ValueError, match="exists already"):
        LinePool.build(pool.path, source, 2)
    with pytest.raises(ValueError, match="cannot take 51 lines"):
        LinePool.build(tmp_path / "x", source, 51)
    with pytest.raises(ValueError, match="records.json"):
        LinePool(tmp_path)


def test_all_degradations_of_a_pool_are_used(pool):
    order = BatchOrder(len(pool), 37, seed=0)
    used = {draw % 3 for k in range(3) for _, draw in order.batch(k)}
    assert used == {0, 1, 2}


# Order and loader


@pytest.mark.parametrize("length, batch, world", [(37, 4, 1), (7, 2, 2), (5, 8, 3), (1, 3, 1)])
def test_every_epoch_holds_every_record_once(length, batch, world):
    orders = [BatchOrder(length, batch, seed=3, rank=rank, world=world) for rank in range(world)]
    sequence = [i for k in range(5 * length) for order in orders for i, _ in order.batch(k)]
    epochs = [sequence[e * length : (e + 1) * length] for e in range(4)]
    assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
    assert length < 5 or epochs[0] != epochs[1]


def test_order_is_a_function_of_seed_and_number():
    forwards, backwards = BatchOrder(11, 3, seed=1), BatchOrder(11, 3, seed=1)
    assert [forwards.batch(k) for k in range(9)] == [backwards.batch(k) for k in reversed(range(9))][::-1]
    assert forwards.batch(0) != BatchOrder(11, 3, seed=2).batch(0)
    for wrong in ({"length": 0}, {"batch_size": 0}, {"rank": 2, "world": 2}):
        with pytest.raises(ValueError, match="cannot make batches"):
            BatchOrder(**{"length": 5, "batch_size": 2, **wrong})


def test_batches(pool):
    batch = next(make_loader(pool, 5, 0))
    assert batch["hr"].shape == batch["lr"].shape == (5, 3, *SIZE) and batch["hr"].dtype == torch.float32
    assert batch["tokens"].shape == batch["centers"].shape == (5, MAX_LENGTH) and batch["tokens"].dtype == torch.long
    assert pool.alphabet.decode_batch(batch["tokens"]) == batch["text"]
    assert batch["hr"].is_contiguous() and -1 <= batch["hr"].min() <= batch["hr"].max() <= 1


@pytest.mark.parametrize("kind", ["pool", "synthetic"])
def test_loader_resumes_and_does_not_depend_on_workers(kind, pool, source):
    dataset = {"pool": pool, "synthetic": source}[kind]
    whole = make_loader(dataset, 3, 7)
    batches = [next(whole) for _ in range(4)]
    for options in ({"start": 2}, {"start": 2, "workers": 2}):
        resumed = next(make_loader(dataset, 3, 7, **options))
        assert same(resumed, batches[2])


def test_ranks_share_an_epoch(pool):
    loaders = [make_loader(pool, 6, 2, rank=rank, world=3) for rank in range(3)]
    order = BatchOrder(len(pool), 18, seed=2).batch(0)  # one process with a batch three times as large
    together = [text for loader in loaders for text in next(loader)["text"]]
    assert together == [pool.texts[i] for i, _ in order]


# Data of others


@pytest.fixture
def ctr(tmp_path, source):
    path = tmp_path / "ctr"
    write_lmdb(path, [source.line(i) for i in range(6)])
    return path


def put(path, **pairs):
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(path)) as environment, environment.begin(write=True) as transaction:
        for key, value in pairs.items():
            transaction.put(key.replace("_", "-").encode(), value)


def test_lmdb_round_trip(ctr, source, alphabet):
    lines = LmdbLines(ctr, alphabet, SIZE, identity=1.0)
    assert len(lines) == 6 and not lines.errors
    for i in range(6):
        assert np.array_equal(lines.line(i).hr, source.line(i).hr) and lines.line(i).text == source.line(i).text
    assert (lines[0]["centers"] == -1).all()  # nobody knows them


def test_lmdb_leaves_bad_records_out(ctr, source, alphabet):
    square = np.zeros((50, 30, 3), np.uint8)
    good = cv2.imencode(".jpg", np.zeros((40, 99, 3), np.uint8))[1].tobytes()
    put(ctr, image_000000001=b"no picture", image_000000002=good[: len(good) // 2],
        image_000000003=cv2.imencode(".png", square)[1].tobytes(), label_000000004=b"x" * 25)  # fmt: skip
    lines = LmdbLines(ctr, alphabet, SIZE)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        texts = [lines[i]["text"] for i in range(6)] + [lines[i]["text"] for i in range(6)]
    assert set(lines.errors) == {0, 1, 2, 3} and len(said) == 4
    assert "0.60 times" in lines.errors[2] and "25 characters" in lines.errors[3]
    assert texts[:5] == [source.line(4).text] * 5 and texts[5] == source.line(5).text


def test_lmdb_without_a_good_record(ctr, alphabet):
    put(ctr, **{f"image_{i:09d}": b"" for i in range(1, 7)})
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no good record"):
        LmdbLines(ctr, alphabet, SIZE)[0]


def test_lmdb_in_worker_processes(ctr, alphabet):
    lines = LmdbLines(ctr, alphabet, SIZE)
    lines[0]  # open in this process, then used in others
    assert same(next(make_loader(lines, 4, 0, workers=2)), next(make_loader(lines, 4, 0)))


def test_pairs_keep_their_own_low_resolution_side(alphabet):
    folder = data_folder() / "samples"
    pairs = PairFolder(folder, alphabet, SIZES["classroom"])
    assert len(pairs) == len(SAMPLES) == 12
    for i, row in enumerate(read_table(folder / "labels.tsv")):
        line = pairs.line(i)
        assert np.array_equal(line.lr, read_line((folder / "lr" / row["file"]).read_bytes(), row["file"]))
        assert line.text == row["text"] and line.hr.shape[0] == 128 and line.lr.shape[0] <= 128
        assert abs(line.hr.shape[1] / 128 - line.lr.shape[1] / line.lr.shape[0]) < 0.1  # the same ratio
        assert is_reserved(row["text"]) and is_reserved_face(row["font"])
    assert same(pairs.record(0, 0), pairs.record(0, 1))


def test_a_bad_pair_is_left_out_and_said(alphabet, tmp_path):
    shutil.copytree(data_folder() / "samples", tmp_path / "pairs")
    files = [row["file"] for row in read_table(tmp_path / "pairs" / "labels.tsv")]
    (tmp_path / "pairs" / "lr" / files[3]).write_bytes(b"no picture")
    (tmp_path / "pairs" / "hr" / files[5]).unlink()
    pairs = PairFolder(tmp_path / "pairs", alphabet, SIZES["classroom"])
    with pytest.warns(UserWarning, match="record (4|6) left out") as said:
        texts = [pairs[i]["text"] for i in range(12)] + [pairs[i]["text"] for i in range(12)]
    assert len(said) == 2 and set(pairs.errors) == {3, 5} and files[5] in pairs.errors[5]
    assert texts[3] == texts[4] and texts[5] == texts[6] and len(set(texts)) == 10


def test_samples_are_what_the_table_says():
    rows = read_table(data_folder() / "samples" / "labels.tsv")
    told = [(row["text"], row["pipeline"], row["strength"]) for row in rows]
    assert told == [(text, pipeline, strength) for text, _, pipeline, strength in SAMPLES]
    assert all(row["font"].startswith(face) for row, (_, face, _, _) in zip(rows, SAMPLES, strict=True))


def test_open_source(pool, ctr, alphabet, tmp_path):
    assert isinstance(open_source(f"pool:{pool.path}", alphabet, SIZE, 0), LinePool)
    assert isinstance(open_source(f"lmdb:{ctr}", alphabet, SIZE, seed=1), LmdbLines)
    assert isinstance(open_source(f"pairs:{data_folder() / 'samples'}", alphabet, SIZE), PairFolder)
    assert isinstance(open_source("synthetic", alphabet, SIZE), SyntheticLines)
    with pytest.raises(ValueError, match="the model wants"):
        open_source(f"pool:{pool.path}", alphabet, (64, 256))
    for wrong in ("pool", "zip:x", "", "synthetic:x"):
        with pytest.raises(ValueError, match="allowed: synthetic"):
            open_source(wrong, alphabet, SIZE)
    for kind in ("pool", "lmdb", "pairs"):
        with pytest.raises(ValueError, match="nothing-here"):
            open_source(f"{kind}:{tmp_path / 'nothing-here'}", alphabet, SIZE)


def test_command_line(tmp_path):
    def run(*options):
        command = [sys.executable, "-m", "difftsr.dataset", *map(str, options)]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "DIFFTSR_FONTS": ""})

    done = run("--pool", tmp_path / "p", "--count", 5, "--degradations", 2, "--preset", "tiny", "--workers", 1)
    assert done.returncode == 0, done.stderr
    described = json.loads((tmp_path / "p/records.json").read_text(encoding="utf-8"))
    assert len(described["texts"]) == 5 and set("".join(described["texts"])) <= set(Alphabet.tiny().characters)
    again = run("--pool", tmp_path / "p", "--count", 5, "--preset", "tiny")
    assert again.returncode == 2 and "exists already" in again.stderr.splitlines()[-1]
    assert run().returncode == 2


# The evaluation sets


@pytest.mark.parametrize("name, count", [("dev", 40), ("test", 80)])
def test_evaluation_sets(name, count, alphabet):
    folder = data_folder() / "eval" / name
    rows, texts = read_table(folder / "labels.tsv"), read_table(data_folder() / "eval" / "texts.tsv")
    assert [row["text"] for row in rows] == [row["text"] for row in texts if row["set"] == name for _ in STEPS]
    assert [row["strength"] for row in rows] == [*STEPS] * count and len({row["file"] for row in rows}) == 4 * count
    assert all(is_reserved(row["text"]) and is_reserved_face(row["font"]) for row in rows)
    faces, pipelines = Counter(row["font"].split()[0] for row in rows), Counter(row["pipeline"] for row in rows)
    assert len(faces) == 4 and min(faces.values()) >= 4 * count // 5
    assert pipelines == {"bsrgan": 2 * count, "real_esrgan": 2 * count}
    pairs = PairFolder(folder, alphabet, SIZES["classroom"])
    sizes = {step: [] for step in STEPS}
    for row, line in zip(rows, map(pairs.line, range(len(pairs))), strict=True):
        ratio, height = line.hr.shape[1] / 128, line.lr.shape[0]
        assert line.hr.shape[0] == 128 and abs(ratio - line.lr.shape[1] / height) <= (1 + ratio) / height
        sizes[row["strength"]].append(line.lr.shape[0])
    assert all(max(sizes[step]) <= 64 and min(sizes[step]) >= 18 for step in STEPS)


def test_evaluation_sets_are_as_committed():
    folder = data_folder() / "eval"
    told = (folder / "SHA256SUMS").read_text(encoding="utf-8")
    assert checksums(folder, ["dev", "test"]) == told and told.count("\n") == 5 * (40 + 80) + 2
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 8_000_000


def test_evaluation_sets_can_be_written_again(tmp_path, monkeypatch):
    families = {font.family for font in find_fonts(training=False)}
    if missing := set(RESERVED_FAMILIES) - families:
        pytest.skip(f"needs the reserved typefaces: {', '.join(sorted(missing))}")
    pairs = evaluation_pairs("dev")
    monkeypatch.setattr("difftsr.sets.evaluation_pairs", lambda name: pairs[:4] if name == "dev" else [])
    write_evaluation_sets(tmp_path / "eval")
    for row in read_table(tmp_path / "eval/dev/labels.tsv"):
        for side in ("hr", "lr"):
            file = row["hr" if side == "hr" else "file"]
            new, old = (root / "dev" / side / file for root in (tmp_path / "eval", data_folder() / "eval"))
            difference = np.abs(read_line(new.read_bytes(), "new").astype(int) - read_line(old.read_bytes(), "old"))
            assert difference.mean() < 0.5, (side, file)  # not to the bit: another FreeType draws a little otherwise


# Cleaning


def test_alignment_is_measured(source):
    hr = source.line(2).hr
    height, width = hr.shape[:2]
    for dx, dy, scale in ((0, 0, 1), (9, 0, 1), (-6, 5, 1), (0, 0, 1.06)):
        move = np.float32([[scale, 0, dx + width / 2 * (1 - scale)], [0, 1, dy]])
        lr = cv2.warpAffine(hr, move, (width, height), borderMode=cv2.BORDER_REPLICATE)
        found = align(hr, cv2.resize(lr, (width // 4, height // 4), interpolation=cv2.INTER_AREA))
        assert np.allclose(found.shift, (dx / height, dy / height), atol=0.015)
        assert abs(found.scale - (scale - 1)) < 0.02 and found.correlation > 0.8 and found.residual < 0.03
    wave = np.float32(6 * np.sin(np.linspace(0, 12, width)))[None] + np.zeros((height, 1), np.float32)
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    assert align(hr, cv2.remap(hr, x, y + 2 * wave, 1, borderMode=cv2.BORDER_REPLICATE)).residual > 0.02


def test_sharpness_falls_with_blur_and_not_with_contrast(source):
    hr = source.line(3).hr
    values = [sharpness(cv2.GaussianBlur(hr, (0, 0), sigma)) for sigma in (0.1, 2, 4, 8)]
    assert values == sorted(values, reverse=True) and values[0] > 3 * values[-1]
    assert sharpness(hr // 2 + 60) == pytest.approx(values[0], rel=0.1)
    assert sharpness(np.full((40, 90, 3), 7, np.uint8)) == 0


@pytest.mark.parametrize("seed", [11, 12])
def test_planted_faults_are_found(alphabet, fonts, tmp_path, seed):
    lines = synthetic(alphabet, fonts, seed=seed, length=160)
    planted = plant_faults(tmp_path / "pairs", [lines.line(i) for i in range(120)], seed=seed)
    pairs = PairFolder(tmp_path / "pairs", alphabet, SIZE)
    report = clean(pairs, tmp_path / "index.tsv", workers=2, progress=False)
    assert sum(report.counts.values()) + len(report.kept) == 120
    truth = [None] * 70 + [fault for fault, count in planted.items() for _ in range(count)]
    confused = [(row["record"], want, row["reason"]) for row, want in zip(report.rows, truth, strict=True)
                if want != row["reason"]]  # fmt: skip
    assert len(confused) <= 3, confused
    missed = [one for one in confused if one[2] is None]
    assert len(missed) <= 1 and sum(one[1] is None for one in confused) <= 2, confused
    chosen = open_source(f"pairs:{tmp_path / 'pairs'}@{tmp_path / 'index.tsv'}", alphabet, SIZE)
    assert len(chosen) == len(report.kept) and chosen.line(3).text == pairs.line(report.kept[3]).text
    told = json.loads((tmp_path / "index.json").read_text(encoding="utf-8"))
    assert told["dropped"] == report.counts and sum(told["histograms"]["length"]["counts"]) == len(report.kept)
    for name in ("index_dropped.png", "index_histograms.png"):
        assert read_line((tmp_path / name).read_bytes(), name).std() > 5


def test_cleaning_an_lmdb_names_the_record_itself(ctr, alphabet, tmp_path):
    put(ctr, image_000000002=b"no picture")
    report = clean(LmdbLines(ctr, alphabet, SIZE), tmp_path / "index.tsv", progress=False)
    assert report.rows[1]["reason"] == "unreadable" and 1 not in report.kept
    assert {row.record for row in read_index(tmp_path / "index.tsv")} == set(report.kept)


def test_index_refusals(pool, ctr, alphabet, tmp_path):
    (tmp_path / "index.tsv").write_text("record\ttext\n99\tx\n", encoding="utf-8")
    with pytest.raises(ValueError, match="beyond the 6"):
        open_source(f"lmdb:{ctr}@{tmp_path / 'index.tsv'}", alphabet, SIZE)
    with pytest.raises(ValueError, match="no index file"):
        read_index(tmp_path / "missing.tsv")
    with pytest.raises(ValueError, match=".tsv"):
        clean(LmdbLines(ctr, alphabet, SIZE), tmp_path / "index.json")


# One reader of pictures, one of labels


def stored_as(image: Image.Image, how: str) -> bytes:
    """A file that shows the image, stored as phones, scanners and drawing programs do."""
    buffer, exif = io.BytesIO(), Image.Exif()
    if how.startswith("turned"):
        turn = {"turned 3": Image.Transpose.ROTATE_180, "turned 6": Image.Transpose.ROTATE_90,
                "turned 8": Image.Transpose.ROTATE_270}[how]  # fmt: skip
        exif[0x0112] = int(how[-1])
        image.transpose(turn).save(buffer, "PNG", exif=exif)
    elif how == "16 bits":
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(buffer, "PNG")
    elif how == "transparent":
        clear = Image.new("RGBA", image.size)  # black everywhere, and the line in the transparency
        clear.putalpha(Image.fromarray(255 - np.asarray(image.convert("L"))))
        clear.save(buffer, "PNG")
    elif how == "palette":
        image.convert("L").convert("P").save(buffer, "GIF")
    elif how == "CMYK":
        image.convert("CMYK").save(buffer, "TIFF")
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()


KINDS = ["plain", "turned 3", "turned 6", "turned 8", "16 bits", "transparent", "palette", "CMYK"]


@pytest.mark.parametrize("how", KINDS)
def test_training_cleaning_evaluation_and_restoring_see_the_same_picture(how, alphabet, fonts, tmp_path):
    """The picture as a person sees it, whoever asks."""
    shown = Image.fromarray(synthetic(alphabet, fonts, seed=5).line(0).hr).convert("L").convert("RGB")
    for side in ("hr", "lr"):
        (tmp_path / side).mkdir()
        (tmp_path / side / "a.png").write_bytes(stored_as(shown, how))
    (tmp_path / "labels.tsv").write_text("file\ttext\na.png\t停车\n", encoding="utf-8")
    write = {b"num-samples": b"1", b"label-000000001": "停车".encode(), b"image-000000001": stored_as(shown, how)}
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(tmp_path / "lmdb"), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        for key, value in write.items():
            transaction.put(key, value)
    pair = PairFolder(tmp_path, alphabet, SIZE).line(0)
    (line,) = labelled(tmp_path)
    seen = {
        "training, sharp": pair.hr, "training, spoiled": pair.lr,
        "training, LMDB": LmdbLines(tmp_path / "lmdb", alphabet, SIZE).line(0).hr,
        "evaluation": line.image, "evaluation, sharp": line.target, "restoring": load_image(tmp_path / "lr" / "a.png"),
        "a folder of results": np.asarray(make_restorer(f"folder:{tmp_path / 'lr'}", RestorerConfig()).run(line)),
    }  # fmt: skip
    for who, pixels in seen.items():
        assert pixels.shape == (shown.height, shown.width, 3), who
        assert np.abs(pixels.astype(int) - np.asarray(shown)).max() <= 1, who


SAVED = ["bom", "windows", "commas", "capitals", "blank", "utf-16", "path", "backslashes", "csv"]


@pytest.mark.parametrize("how", SAVED)
def test_labels_as_people_save_them_train_and_are_evaluated_alike(how, alphabet, tmp_path):
    shutil.copytree(data_folder() / "samples", tmp_path / "s")
    table, name = (tmp_path / "s" / "labels.tsv").read_text(encoding="utf-8"), "labels.tsv"
    want = [row["text"] for row in read_table(tmp_path / "s" / "labels.tsv")]
    (tmp_path / "s" / "labels.tsv").unlink()
    encoding = {"bom": "utf-8-sig", "utf-16": "utf-16"}.get(how, "utf-8")
    if how == "windows":
        table = table.replace("\n", "\r\n")
    if how in ("commas", "csv"):
        table, name = table.replace("\t", ","), "labels.csv" if how == "csv" else name
    if how == "capitals":
        table = table.replace("file\ttext", "File\tText")
    if how == "blank":
        table = table.replace("\n", "\n \t\n\n")
    if how == "path":
        table = table.replace("file\ttext", "path\ttext")
    if how == "backslashes":
        (tmp_path / "s" / "lr" / "in").mkdir()
        (tmp_path / "s" / "hr" / "in").mkdir()
        for side in ("lr", "hr"):
            for file in list((tmp_path / "s" / side).glob("*.*")):
                file.rename(file.parent / "in" / file.name)
        table = "".join(row if row.startswith("file") else f"in\\{row}" for row in table.splitlines(keepends=True))
    (tmp_path / "s" / name).write_bytes(table.encode(encoding))
    pairs = PairFolder(tmp_path / "s", alphabet, SIZE)
    assert [pairs.line(i).text for i in range(12)] == want and not pairs.errors
    lines = labelled(tmp_path / "s")
    assert [line.truth for line in lines] == want and all(line.sharp for line in lines)


@pytest.mark.parametrize("how", ["gbk", "extra", "nameless"])
def test_labels_that_cannot_be_understood_are_refused_by_file_and_row(how, tmp_path, capsys):
    shutil.copytree(data_folder() / "samples", tmp_path / "s")
    table = (tmp_path / "s" / "labels.tsv").read_text(encoding="utf-8")
    content, reason = {
        "gbk": (table.encode("gbk"), "labels.tsv, row 2: its bytes are no UTF-8"),
        "extra": (table.replace("\tmild\n", "\tmild\tnote\n", 1).encode(), "row 2: 6 cells under 5 columns"),
        "nameless": (table.replace("file\t", "name\t").encode(), "labels.tsv, row 1: no column file"),
    }[how]  # fmt: skip
    (tmp_path / "s" / "labels.tsv").write_bytes(content)
    assert dataset.main(["--clean", f"pairs:{tmp_path / 's'}", "--output", str(tmp_path / "i.tsv")]) == 2
    first = capsys.readouterr().err.splitlines()
    assert evaluate.main(["--set", str(tmp_path / "s"), "--output", str(tmp_path / "out")]) == 2
    for said in (first, capsys.readouterr().err.splitlines()):
        assert len(said) == 1 and reason in said[0] and "allowed: UTF-8" in said[0]


def test_labels_of_an_lmdb_that_are_no_utf_8_are_refused_counted_and_named(ctr, source, alphabet, tmp_path, capsys):
    put(ctr, label_000000002="停车".encode("gbk"))
    lines = LmdbLines(ctr, alphabet, SIZE)
    with pytest.warns(UserWarning, match="record 2 left out: its label is no UTF-8"):
        texts = [lines.line(i).text for i in range(6)]
    assert texts[1] == texts[2] and set(lines.errors) == {1}
    assert clean(lines, tmp_path / "i.tsv", progress=False).counts["label not UTF-8"] == 1
    other = shutil.copytree(ctr, tmp_path / "other")
    put(other, **{f"label_{i:09d}": "停车".encode("gbk") for i in range(1, 5)})
    assert dataset.main(["--clean", f"lmdb:{other}", "--output", str(tmp_path / "i.tsv")]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "4 of 6 labels looked at are no UTF-8, that of record 1 first" in said and str(other) in said


def test_an_lmdb_of_textzoom_holds_pairs(alphabet, source, tmp_path):
    lmdb = pytest.importorskip("lmdb")
    lines = [source.line(i) for i in range(3)]
    with lmdb.open(str(tmp_path / "tz"), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"num-samples", b"3")
        for k, line in enumerate(lines, 1):
            transaction.put(b"label-%09d" % k, line.text.encode())
            transaction.put(b"image_hr-%09d" % k, cv2.imencode(".png", line.hr[..., ::-1])[1].tobytes())
            transaction.put(b"image_lr-%09d" % k, cv2.imencode(".png", line.hr[::2, ::2, ::-1])[1].tobytes())
    found = LmdbLines(tmp_path / "tz", alphabet, SIZE)
    for i, line in enumerate(lines):
        read = found.line(i)
        assert read.text == line.text and (read.hr == line.hr).all() and (read.lr == line.hr[::2, ::2]).all()
    assert not found.errors


def test_an_lmdb_of_another_layout_is_told_by_its_keys(alphabet, tmp_path):
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(tmp_path / "l")) as environment, environment.begin(write=True) as transaction:
        for key in (b"num-samples", b"img-1", b"txt-1"):
            transaction.put(key, b"1")
    with pytest.raises(ValueError, match="its first keys are img-1, num-samples, txt-1; allowed: num-samples, label-0"):
        LmdbLines(tmp_path / "l", alphabet, SIZE)
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "data.mdb").write_bytes(b"no database " * 1000)
    with pytest.raises(ValueError, match="words is no LMDB, or a damaged one"):
        LmdbLines(tmp_path / "words", alphabet, SIZE)


# An index


@pytest.fixture
def indexed(tmp_path, alphabet):
    """A copy of the sample pairs, and an index of the records 2, 5 and 7 of it."""
    shutil.copytree(data_folder() / "samples", tmp_path / "s")
    clean(PairFolder(tmp_path / "s", alphabet, SIZES["classroom"]), tmp_path / "all.tsv", progress=False)
    head, *rows = (tmp_path / "all.tsv").read_text(encoding="utf-8").splitlines()
    chosen = [row for row in rows if row.split("\t")[0] in ("2", "5", "7")]
    (tmp_path / "index.tsv").write_text("\n".join([head, *chosen]) + "\n", encoding="utf-8")
    assert len(chosen) == 3
    return tmp_path / "s", tmp_path / "index.tsv"


def test_an_index_is_refused_once_its_labels_have_moved(indexed, alphabet):
    folder, index = indexed
    head, *rows = (folder / "labels.tsv").read_text(encoding="utf-8").splitlines()
    (folder / "labels.tsv").write_text("\n".join([head, rows[0], *rows]) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="index.tsv no longer fits .*: record 2 says .*3 of 3 differ.*--clean"):
        open_source(f"pairs:{folder}@{index}", alphabet, SIZE)


def test_a_picture_that_is_another_one_than_in_the_index_is_left_out(indexed, alphabet):
    folder, index = indexed
    files = [row["file"] for row in read_table(folder / "labels.tsv")]
    shutil.copy(folder / "lr" / files[0], folder / "lr" / files[5])
    chosen = open_source(f"pairs:{folder}@{index}", alphabet, SIZE)
    with pytest.warns(UserWarning, match="record 6 left out: it is another picture than when its index was made"):
        chosen.line(1)


def test_what_stands_in_for_a_bad_record_is_within_the_index(indexed, alphabet):
    folder, index = indexed
    rows = read_table(folder / "labels.tsv")
    allowed = {rows[k]["text"] for k in (2, 5, 7)}
    chosen = open_source(f"pairs:{folder}@{index}", alphabet, SIZE)
    (folder / "lr" / rows[7]["file"]).unlink()
    (folder / "hr" / rows[2]["file"]).write_bytes(b"no picture")
    with pytest.warns(UserWarning, match="record (3|8) left out"):
        seen = {chosen[i]["text"] for i in range(3)}
    assert seen == {rows[5]["text"]} < allowed


def test_a_path_may_hold_an_at(indexed, alphabet):
    folder, index = indexed
    there = folder.rename(folder.with_name("me@home"))
    assert len(open_source(f"pairs:{there}", alphabet, SIZE)) == 12
    assert len(open_source(f"pairs:{there}@{index}", alphabet, SIZE)) == 3
    with pytest.raises(ValueError, match="nobody: there is no labels.tsv"):
        open_source("pairs:nobody@home", alphabet, SIZE)


# Writers and shards


def test_lmdb_grows_while_it_is_written_and_appears_whole(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (128, 1000, 3), dtype=np.uint8)  # 18 MB: over the first size
    assert write_lmdb(tmp_path / "big", (Line(noise, str(i), "") for i in range(48))) == 48
    lines = LmdbLines(tmp_path / "big", Alphabet.classroom(), SIZE)
    assert len(lines) == 48 and np.array_equal(lines.line(47).hr, noise)

    def cut():
        yield Line(noise, "1", "")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_lmdb(tmp_path / "cut", cut())
    assert [path.name for path in tmp_path.iterdir()] == ["big"]
    for path, lines in ((tmp_path / "big", []), (tmp_path / "none", [])):
        with pytest.raises(ValueError, match="exists already|no lines"):
            write_lmdb(path, lines)


def test_two_sources_and_their_workers_read_one_lmdb(tmp_path):
    picture = np.full((32, 96, 3), 200, np.uint8)
    write_lmdb(tmp_path / "one", (Line(picture, str(i), "") for i in range(4)))
    first, second = (LmdbLines(tmp_path / "one", Alphabet.classroom(), SIZE, seed=seed) for seed in (0, 1))
    loaders = [iter(make_loader(source, 2, seed=0, workers=1)) for source in (first, second)]
    assert all(next(loader)["hr"].shape[0] == 2 for loader in loaders)
    assert first.line(3).text == second.line(3).text == "3"
    (tmp_path / "one").rename(tmp_path / "old")
    write_lmdb(tmp_path / "one", [Line(picture, "9", "")])
    assert LmdbLines(tmp_path / "one", Alphabet.classroom(), SIZE).line(0).text == "9"


def test_lmdb_is_read_without_writing_anything(ctr, alphabet):
    (ctr / "lock.mdb").unlink(missing_ok=True)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in ctr.iterdir())
    LmdbLines(ctr, alphabet, SIZE)[0]
    assert sorted((path.name, path.stat().st_mtime_ns) for path in ctr.iterdir()) == before


@pytest.fixture(scope="module")
def shards(source, tmp_path_factory):
    pytest.importorskip("webdataset")
    folder = tmp_path_factory.mktemp("s") / "shards"
    assert write_shards(folder, (source.line(i) for i in range(23)), per_shard=5) == 23
    return folder


def test_shards_give_every_record_once_an_epoch(shards, source, alphabet):
    lines = open_source(f"shards:{shards}", alphabet, SIZE, degradation=DegradationConfig(strength="mild"))
    assert len(lines) == 23 and lines.counts == [5, 5, 5, 5, 3]
    loader = make_loader(lines, 23, 1)
    first, second = next(loader), next(loader)
    expected = sorted(source.line(i).text for i in range(23))
    assert sorted(first["text"]) == sorted(second["text"]) == expected and first["text"] != second["text"]
    assert first["hr"].shape == (23, 3, *SIZE) and (first["centers"][0] >= 0).any()
    record = first["text"].index(source.line(7).text)
    assert np.allclose(first["hr"][record], to_float(source.record(7)["hr"][None])[0])


def test_shards_resume_and_are_shared(shards, alphabet):
    lines = ShardLines(shards, alphabet, SIZE, seed=3)
    whole = make_loader(lines, 4, 7)
    batches = [next(whole) for _ in range(9)]
    for options in ({"start": 8}, {"start": 8, "workers": 2}):
        assert same(next(make_loader(lines, 4, 7, **options)), batches[8])
    ranks = [list(itertools.islice(ShardBatches(lines, 1, rank=rank, world=2)._samples(), 9)) for rank in range(2)]
    keys = [{sample["__key__"] for sample, epoch in rank if epoch == 0} for rank in ranks]
    assert not keys[0] & keys[1]
    with pytest.raises(ValueError, match="cannot be shared"):
        ShardBatches(lines, 4, rank=5, world=6)


def test_a_broken_shard_does_not_stop_the_stream(shards, alphabet, tmp_path):
    copy = shutil.copytree(shards, tmp_path / "copy")
    data = (copy / "shard-000001.tar").read_bytes()
    (copy / "shard-000001.tar").write_bytes(data[: len(data) // 2])
    lines = ShardLines(copy, alphabet, SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = make_loader(lines, 10, 0)
        assert all(len(next(loader)["text"]) == 10 for _ in range(6))


def test_command_line_writes_cleans_and_refuses(tmp_path):
    def run(*options):
        command = [sys.executable, "-m", "difftsr.dataset", *map(str, options)]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "DIFFTSR_FONTS": ""})

    done = run("--lmdb", tmp_path / "l", "--count", 8, "--looks.photograph", 0)
    assert done.returncode == 0, done.stderr
    done = run("--clean", f"lmdb:{tmp_path / 'l'}", "--output", tmp_path / "i.tsv", "--workers", 1)
    assert done.returncode == 0 and "of 8 records kept" in done.stdout and (tmp_path / "i.json").is_file()
    done = run("--shards", tmp_path / "s", "--source", f"lmdb:{tmp_path / 'l'}@{tmp_path / 'i.tsv'}")
    assert done.returncode == 0 and (tmp_path / "s/shards.json").is_file()
    assert run("--clean", f"lmdb:{tmp_path / 'l'}").returncode == 2
    refused = run("--clean", "lmdb:nothing", "--output", tmp_path / "i.tsv")
    assert refused.returncode == 2 and refused.stderr.splitlines()[-1].startswith("error: nothing does not exist")


def test_a_bad_record_in_a_shard_is_reported_and_replaced(alphabet, source, tmp_path):
    pytest.importorskip("webdataset")
    good = [source.line(i) for i in range(3)]
    write_shards(tmp_path / "s", [*good, Line(good[0].hr, "字" * 30, "")])
    with pytest.warns(UserWarning, match="left out: it has 30 characters"):
        batch = next(make_loader(ShardLines(tmp_path / "s", alphabet, SIZE), 4, 0))
    assert set(batch["text"]) == {line.text for line in good} and len(batch["text"]) == 4
