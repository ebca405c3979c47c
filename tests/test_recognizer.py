"""The recogniser: character vectors, readings, the small network and its training, and the published network."""

import copy
import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from difftsr.recognizer import (
    VIEW_MARGIN,
    CharacterCounter,
    CharacterEmbedding,
    LineFinder,
    PositionCode,
    Reading,
    RecognizerConfig,
    RecognizerStage,
    RecognizerTraining,
    StdNorm,
    TransOCR,
    at_centers,
    corrupted,
    ctc_loss,
    find_loss,
    look_loss,
    pack_bits,
    partly_told,
    straightened,
    unpack_bits,
)
from difftsr.text_lines import PAD, UNK, Alphabet
from parity_common import assert_close, fill_with_recipe, load_fixture, parity_folder

K = 13  # classes in these tests; B, n and K all differ


@pytest.fixture
def net() -> TransOCR:
    torch.manual_seed(0)
    glyphs = torch.randint(0, 2, (K, 24, 24), dtype=torch.uint8)
    return TransOCR(RecognizerConfig.tiny(K), glyphs).eval()


def lines(batch: int = 3, seed: int = 0) -> torch.Tensor:
    """Random images at the network's own size."""
    return torch.rand(batch, 3, 32, 128, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def padded(*rows: list[int]) -> torch.Tensor:
    return torch.tensor([row + [PAD] * (24 - len(row)) for row in rows])


# --- characters ---


def test_bits_survive_packing():
    bits = torch.rand(5, 576, generator=torch.Generator().manual_seed(0)) < 0.3
    packed = pack_bits(bits)
    assert packed.shape == (5, 72) and packed.dtype == torch.uint8
    assert unpack_bits(packed).equal(bits)
    assert packed.numpy().tolist() == np.packbits(bits.numpy(), axis=-1).tolist()


def test_vector_is_table_row_plus_drawn_character():
    glyphs = torch.zeros(K, 24, 24, dtype=torch.uint8)
    glyphs[4, 3, 5] = 255  # one pixel of class 4
    embedding = CharacterEmbedding(K, 7, glyphs)
    assert (embedding.weight - embedding.table - embedding.glyph.bias)[3].abs().max() < 1e-6
    pixel = embedding.glyph.weight[:, 3 * 24 + 5]
    torch.testing.assert_close(embedding.weight[4], embedding.table[4] + embedding.glyph.bias + pixel)
    tokens = torch.tensor([[4, 2], [0, 12]])
    torch.testing.assert_close(embedding(tokens), embedding.weight[tokens])


def test_bitmaps_travel_with_the_weights():
    glyphs = torch.randint(0, 2, (K, 24, 24), dtype=torch.uint8)
    source, target = CharacterEmbedding(K, 7, glyphs), CharacterEmbedding(K, 7)
    assert not source.weight.equal(target.weight)
    target.load_state_dict(source.state_dict())
    assert source.weight.equal(target.weight)
    with pytest.raises(ValueError, match=r"\(13, 24, 24\)"):
        CharacterEmbedding(K, 7, glyphs[:-1])


def test_soft_vector_is_an_expectation():
    embedding = CharacterEmbedding(K, 7)
    tokens, probs = torch.tensor([[[3, 5]]]), torch.tensor([[[0.5, 0.2]]])
    expected = 0.5 * embedding.weight[3] + 0.2 * embedding.weight[5] + 0.3 * embedding.weight[UNK]
    torch.testing.assert_close(embedding.soft(tokens, probs)[0, 0], expected)
    nothing = Reading.none(2)
    assert embedding.soft(nothing.tokens, nothing.probs).allclose(embedding.weight[UNK], atol=1e-5)


# --- readings ---


def test_reading_of_a_known_text():
    alphabet = Alphabet.tiny()
    reading = Reading.of(alphabet.encode_batch(["AB12", "X"]), prob=0.75)
    assert reading.text(alphabet) == ["AB12", "X"]
    assert reading.tokens.shape == reading.probs.shape == (2, 24, 1)
    assert (reading.confidence == 0.75).all()
    assert reading.centers[0, :4].tolist() == [0.125, 0.375, 0.625, 0.875]
    assert reading.centers[1, 0] == 0.5 and (reading.centers[1, 1:] == -1).all()


def test_reading_is_indexed_as_a_whole(net):
    reading = net.read(lines())
    part = reading[1:]
    assert len(part) == 2
    for name in ("tokens", "probs", "centers", "features"):
        assert getattr(part, name).equal(getattr(reading, name)[1:])
    chosen = reading[torch.tensor([True, False, True])]
    assert chosen.best.equal(reading.best[[0, 2]])
    assert Reading.none(3)[:1].features is None


# --- the network ---


def test_decoder_cannot_see_the_future(net):
    tokens = padded([2, 3, 4, 5, 6], [7, 8], [9, 10, 11])
    changed = tokens.clone()
    changed[:, 3] = 12
    with torch.no_grad():
        before, after = net(lines(), tokens), net(lines(), changed)
    assert before.shape == (3, 24, K)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert (before[:, 4] - after[:, 4]).abs().amax(-1).min() > 1e-3


def test_padding_does_not_change_what_comes_before(net):
    tokens = padded([2, 3, 4, 5, 6], [7, 8], [9, 10, 11])
    with torch.no_grad():
        torch.testing.assert_close(net(lines(), tokens)[:, :6], net(lines(), tokens[:, :6]), atol=1e-5, rtol=1e-5)
        whole, short = net.ocr_loss(lines(), tokens), net.ocr_loss(lines(), tokens[:, :7])
    torch.testing.assert_close(whole, short)


def test_loss_counts_characters_and_first_end(net):
    tokens = padded([2, 3, 4], [], list(range(2, 13)) * 2 + [2, 3])
    assert net.counted(tokens).sum(1).tolist() == [4, 1, 24]
    with torch.no_grad():
        logits = net(lines(), tokens)
        expected = F.cross_entropy(logits[0, :4], tokens[0, :4])
        each, mean = net.ocr_loss(lines(), tokens, "none"), net.ocr_loss(lines(), tokens)
    torch.testing.assert_close(each[0], expected)
    torch.testing.assert_close(mean, (each * torch.tensor([4.0, 1.0, 24.0])).sum() / 29)


@torch.no_grad()
def test_greedy_reading_is_the_argmax_of_teacher_forcing_on_itself(net):
    net.generator_word.bias[PAD] = -9.0  # the untrained network shall write to the end
    images = lines()
    reading = net.read(images, k=4)
    probs = net(images, reading.best).softmax(-1)
    assert reading.tokens.shape == (3, 24, 4)
    assert probs.argmax(-1).equal(reading.best)
    torch.testing.assert_close(reading.probs, probs.topk(4).values, atol=1e-5, rtol=1e-4)
    assert ((reading.centers > 0) & (reading.centers < 1)).all()


@torch.no_grad()
def test_a_text_that_is_read_is_located_where_it_was_read(net):
    net.generator_word.bias[PAD] = -9.0
    reading = net.read(lines())
    torch.testing.assert_close(net.locate(reading.features, reading.best), reading.centers, atol=1e-5, rtol=1e-4)
    short = reading.best.clone()
    short[:, 5:] = PAD
    located = net.locate(reading.features, short)
    torch.testing.assert_close(located[:, :5], reading.centers[:, :5], atol=1e-5, rtol=1e-4)
    assert (located[:, 5:] == -1).all()


@torch.no_grad()
def test_reading_stops_at_the_end(net):
    net.generator_word.bias[PAD] = 99.0
    reading = net.read(lines())
    assert (reading.best == PAD).all() and (reading.centers == -1).all()
    assert (reading.confidence > 0.99).all() and reading.probs.sum(-1).allclose(torch.ones(3, 24), atol=1e-3)


@torch.no_grad()
def test_a_finished_line_is_not_disturbed_by_longer_neighbours(net):
    reading = net.read(lines(6))
    for i in range(6):
        alone = net.read(lines(6)[i : i + 1])
        assert alone.best[0].equal(reading.best[i])
        torch.testing.assert_close(alone.probs[0], reading.probs[i], atol=1e-5, rtol=1e-4)
        first = (reading.best[i] == PAD).int().argmax()
        if (reading.best[i] == PAD).any():
            assert (reading.best[i, first:] == PAD).all()


@torch.no_grad()
def test_input_is_resized_and_keeps_its_range(net):
    big = torch.rand(3, 3, 64, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1
    averaged = F.interpolate(big, (32, 128), mode="bilinear", antialias=True)
    torch.testing.assert_close(net.features(big), net.features(averaged))
    net.config.resize = "nearest"
    torch.testing.assert_close(net.features(big), net.features(big[..., ::2, ::2]))
    published = TransOCR(RecognizerConfig(K, size=(32, 128), input_range=(0.0, 1.0), widths=(8, 8, 8), dim=64)).eval()
    seen = {}
    published.encoder.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0]))
    published.features(lines())
    torch.testing.assert_close(seen["x"], (lines() + 1) / 2)


def test_weights_without_a_temperature_load(net):
    state = net.state_dict()
    del state["temperature"]
    net.temperature.fill_(2.0)
    net.load_state_dict(state)
    assert net.temperature == 1
    with pytest.raises(RuntimeError, match="norm.weight"):
        net.load_state_dict({key: value for key, value in state.items() if key != "norm.weight"})


@torch.no_grad()
def test_features_move_with_the_image(net):
    map_, moved = net.features(lines()), net.features(lines().roll(8, -1))
    assert map_.shape == (3, 64, 1, 32)
    torch.testing.assert_close(map_.roll(2, -1)[..., 8:-8], moved[..., 8:-8], atol=1e-4, rtol=1e-3)


def test_counter_sums_what_columns_hold():
    counter = CharacterCounter(6)
    cells = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0))
    amount = counter.amount(cells).squeeze(-1).sigmoid()
    count = counter(cells)
    torch.testing.assert_close(count[:, 3], amount[:, :3].sum(1) + amount[:, 3] / 2)


def test_position_codes_between_whole_positions():
    code = PositionCode(8, 5)
    torch.testing.assert_close(code.at(torch.arange(5.0)), code(0, 5)[0])
    torch.testing.assert_close(code.at(torch.tensor(1.5))[0], torch.tensor(math.sin(1.5)))


def test_std_norm_uses_the_unbiased_deviation():
    x = torch.tensor([[1.0, 2.0, 4.0, 6.0]])
    torch.testing.assert_close(StdNorm(4)(x), (x - x.mean()) / (np.std(x.numpy(), ddof=1) + 1e-6))


# --- losses and training ---


def test_ctc_agrees_with_the_sum_over_all_paths(net):
    tokens = padded([3, 5], [4])
    features = torch.randn(2, 64, 1, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        classes = [PAD, 3, 4, 5]  # those of the batch
        logits = net.generator_column(features.mean(2).transpose(1, 2), net.table())[..., classes]
        probs, expected = logits.softmax(-1), []
        for line, text in enumerate(([1, 3], [2])):  # positions in `classes`
            total = sum(
                math.prod(probs[line, j, k].item() for j, k in enumerate(path))
                for path in itertools.product(range(4), repeat=4)
                if [k for k, _ in itertools.groupby(path) if k] == text
            )
            expected.append(-math.log(total) / len(text))
        assert ctc_loss(net, features, tokens, net.table()).item() == pytest.approx(np.mean(expected), rel=1e-4)


def test_ctc_survives_texts_that_do_not_fit(net):
    features = torch.randn(2, 64, 1, 4, requires_grad=True)
    loss = ctc_loss(net, features, padded([3, 3, 3], [4, UNK]), net.table())  # 3 3 3 needs five columns
    loss.backward()
    assert loss.isfinite() and features.grad.isfinite().all()


def test_columns_at_centers_are_interpolated():
    columns = torch.arange(8.0).view(1, 8, 1)
    centers = torch.tensor([[0.5 / 8, 0.25, 1.0, -1.0]])
    assert at_centers(columns, centers).flatten().tolist() == [0.0, 1.5, 7.0]


def test_look_loss_prefers_the_right_column():
    centers = torch.tensor([[0.3125, -1.0]])  # the middle of column 2 of 8
    loss = {place: look_loss(torch.eye(8)[[place, 0]].view(1, 1, 2, 8), centers).item() for place in (1, 2, 5)}
    assert loss[2] < loss[1] < loss[5]


def test_corruption_spares_start_and_padding():
    inputs = padded([PAD, 2, 3, 4], [PAD, 5])
    generator = torch.Generator().manual_seed(0)
    changed = corrupted(inputs, 1.0, K, generator)
    assert (changed[inputs == PAD] == PAD).all()
    assert (changed[inputs != PAD] >= UNK).all() and (changed[inputs != PAD] < K).all()
    assert not changed.equal(inputs)
    assert corrupted(inputs, 0.0, K, generator).equal(inputs)


def bars(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures in which class k is a bar of height 2 k in a cell of 16 pixels, and the centres of the cells."""
    images, centers = -torch.ones(len(tokens), 3, 32, 128), torch.full(tokens.shape, -1.0)
    for i, row in enumerate(tokens):
        for r, k in enumerate(row[row != PAD].tolist()):
            images[i, :, 32 - 2 * k :, 16 * r + 3 : 16 * r + 13] = 1.0
            centers[i, r] = (16 * r + 8) / 128
    return images, centers


def bar_batch(size: int, generator: torch.Generator) -> dict:
    tokens = torch.randint(2, K, (size, 24), generator=generator)
    lengths = torch.randint(1, 7, (size, 1), generator=generator)
    tokens = torch.where(torch.arange(24) < lengths, tokens, PAD)
    images, centers = bars(tokens)
    noisy = images + 0.05 * torch.randn(images.shape, generator=generator)
    return dict(hr=images, lr=noisy, tokens=tokens, centers=centers)


STEPS, RATE = 120, 5e-3


@pytest.fixture(scope="module")
def trained() -> TransOCR:
    """A network that reads bars, after a few seconds of the real stage."""
    torch.manual_seed(0)
    model = SimpleNamespace(recognizer=TransOCR(RecognizerConfig.tiny(K)))
    stage, generator = RecognizerStage(RecognizerTraining(learning_rate=RATE), model), torch.Generator().manual_seed(0)
    optimizer = stage.optimizers(model)["recognizer"]
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 10, 2 * (STEPS - step) / STEPS)
        for loss, name, _ in stage.losses(model, bar_batch(16, generator), generator):
            assert name == "recognizer"
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.recognizer.parameters(), 1.0)
            optimizer.step()
    return model.recognizer.eval()


def test_training_learns_to_read(trained):
    batch = bar_batch(40, torch.Generator().manual_seed(99))
    reading = trained.read(batch["hr"])
    real = batch["tokens"] != PAD
    assert (reading.best == batch["tokens"])[real].float().mean() > 0.85
    both = real & (reading.centers >= 0)
    assert (reading.centers - batch["centers"])[both].abs().mean() < 0.05


def test_ocr_loss_prefers_the_right_text_and_pulls_the_image(trained):
    right, wrong = padded([3, 9, 5]), padded([3, 4, 5])
    image = bars(right)[0].requires_grad_()
    good, bad = trained.ocr_loss(image, right), trained.ocr_loss(image, wrong)
    assert good < bad
    (gradient,) = torch.autograd.grad(bad, image)
    place = gradient.abs().sum((0, 1, 2))  # (128,) per column of pixels
    assert gradient.isfinite().all() and place[16:32].mean() > 2 * place[64:].mean()  # at the character in question
    with torch.no_grad():
        assert trained.ocr_loss(image - 0.05 * gradient.sign(), wrong) < bad


@torch.no_grad()
def test_calibration_finds_the_best_temperature_and_reading_uses_it(trained):
    net, batch = copy.deepcopy(trained), bar_batch(40, torch.Generator().manual_seed(7))
    batch["lr"] += 2 * torch.randn(batch["lr"].shape, generator=torch.Generator().manual_seed(8))  # hard to read
    before = net.read(batch["lr"])
    temperature = net.calibrate(batch["lr"], batch["tokens"])
    counted = net.counted(batch["tokens"])
    logits, truth = net(batch["lr"], batch["tokens"])[counted], batch["tokens"][counted]
    best, colder, hotter = (F.cross_entropy(logits / (temperature * c), truth) for c in (1.0, 0.9, 1.1))
    assert best < colder and best < hotter
    net.generator_word.scale *= 2
    net.generator_word.bias *= 2  # twice as sure of itself
    doubled = net.calibrate(batch["lr"], batch["tokens"])
    assert doubled == pytest.approx(2 * temperature, rel=0.05)  # up to the grid of temperatures
    after, real = net.read(batch["lr"]), batch["tokens"] != PAD
    assert after.best.equal(before.best)
    change = (after.confidence - before.confidence)[real].mean()
    assert change > 0 if doubled < 2 else change <= 0


def test_stage_uses_lr_for_half_and_only_known_centers():
    torch.manual_seed(0)
    model = SimpleNamespace(recognizer=TransOCR(RecognizerConfig.tiny(K)))
    stage = RecognizerStage(RecognizerTraining(), model)
    assert stage.trains == ("recognizer",) and stage.name == "recognizer"
    seen = {}
    model.recognizer.encoder.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0]))
    batch = bar_batch(6, torch.Generator().manual_seed(0))
    ((loss, _, logs),) = stage.losses(model, batch, torch.Generator().manual_seed(0))
    assert seen["x"].equal(torch.cat([batch["lr"][:3], batch["hr"][3:]]))
    assert set(logs) == {"text", "accuracy", "accuracy_lr", "accuracy_hr", "ctc", "spot", "look", "count"}
    both = [logs[name].item() for name in ("accuracy_lr", "accuracy_hr")]
    assert min(both) <= logs["accuracy"] <= max(both)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.recognizer.parameters())

    batch["centers"] = torch.full_like(batch["centers"], -1.0)  # photographs: nobody knows
    ((loss, _, logs),) = stage.losses(model, batch, torch.Generator().manual_seed(0))
    assert loss.isfinite() and {"text", "ctc", "count"} <= set(logs) and not {"spot", "look"} & set(logs)


# --- the published network ---


@pytest.fixture(scope="module")
def recorded():
    fixture = load_fixture("transocr_recipe")
    network = TransOCR(RecognizerConfig.paper(fixture.manifest["config"]["word_n_class"]))
    fill_with_recipe(network, fixture.manifest["recipe_salt"], fixture.manifest["recipe_gain"])
    return fixture, network, fixture.inputs["image_u8"].float() / 127.5 - 1


def test_published_keys_and_shapes():
    with torch.device("meta"):
        state = TransOCR(RecognizerConfig.paper()).state_dict()
    table = (parity_folder() / "keys" / "TransOCR.tsv").read_text(encoding="utf-8").splitlines()
    expected = dict(line.split("\t")[:2] for line in table if "\t" in line and not line.startswith("key\t"))
    assert set(state) == set(expected)
    for key, shape in expected.items():
        assert "x".join(map(str, state[key].shape)) == shape.replace("scalar", ""), key


@torch.no_grad()
def test_published_outputs(recorded):
    fixture, network, images = recorded
    features = network.features(images)
    assert_close(features[:, ::16], fixture.outputs["conv_every16"], atol=1e-4, rtol=1e-3, name="conv")
    hidden, weights, _ = network.decode(fixture.inputs["text_input"], network.columns(features))
    logits = network.generator_word(hidden)
    assert_close(logits, fixture.outputs["pred_test"], atol=1e-4, rtol=1e-3, name="pred")
    assert_close(weights, fixture.outputs["map_test"], name="map")
    packed = torch.cat([rows[:n] for rows, n in zip(logits, fixture.inputs["text_length"], strict=True)])
    assert_close(packed, fixture.outputs["pred_packed"], atol=1e-4, rtol=1e-3, name="teacher forced")


@torch.no_grad()
def test_published_greedy_reading(recorded):
    fixture, network, images = recorded
    reading = network.read(images)
    tokens, probs = fixture.outputs["greedy_tokens"][:, 1:], fixture.outputs["greedy_probs"]
    assert reading.best[:, : tokens.shape[1]].equal(tokens)
    assert_close(reading.confidence[:, : probs.shape[1]], probs, name="probabilities")


@torch.no_grad()
def test_published_predictor_reads_the_recorded_tokens():
    fixture = load_fixture("text_predict_recipe")
    network = TransOCR(RecognizerConfig.paper(fixture.manifest["word_n_class"]))
    fill_with_recipe(network, fixture.manifest["recipe_salt"], fixture.manifest["recipe_gain"])
    network.generator_word.proj.bias[-1] = fixture.manifest["end_bias"]
    images = [np.array(Image.open(parity_folder() / name).convert("RGB")) for name in fixture.manifest["images"]]
    reading = network.read(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1)
    for line, expected, probs in zip(range(3), fixture.outputs["greedy_tokens"], fixture.outputs["greedy_prob"]):
        ends = (expected == network.config.end).nonzero()
        count = ends[0].item() + 1 if len(ends) else len(expected)  # the original writes on after END; a reading stops
        assert reading.best[line, :count].equal(expected[:count])
        assert (reading.best[line, count:] == network.config.end).all()
        assert_close(reading.confidence[line, :count], probs[:count], name="probabilities")


# ---------------------------------------------------------------- the finder


def striped(top: float, bottom: float, slope: float = 0.0) -> torch.Tensor:
    """A picture (1, 3, 128, 512), black but for a white band whose edges fall by `slope` from left to right."""
    y, x = torch.meshgrid((torch.arange(128) + 0.5) / 128, (torch.arange(512) + 0.5) / 512, indexing="ij")
    white = (y > top + slope * x) & (y < bottom + slope * x)
    return (2.0 * white - 1).expand(1, 3, -1, -1)


def test_a_new_finder_sees_the_whole_picture_and_older_weights_read_on():
    torch.manual_seed(0)
    finder = LineFinder(8).eval()
    view = finder(torch.rand(2, 3, 128, 512) * 2 - 1)
    assert view.shape == (2, 16, 2)
    torch.testing.assert_close(view, torch.tensor([0.0, 1.0]).expand(2, 16, 2))
    smooth = torch.nn.functional.interpolate(torch.rand(2, 3, 8, 16), (128, 512), mode="bicubic")
    small = torch.nn.functional.interpolate(smooth, (32, 256), mode="bilinear", antialias=True)
    torch.testing.assert_close(straightened(smooth, view, (32, 256)), small, atol=0.02, rtol=0)


@pytest.mark.parametrize("slope", [0.0, 0.3, -0.2])
def test_a_slanted_band_fills_the_height_when_it_is_straightened(slope):
    places = (torch.arange(16) + 0.5) / 16
    top = 0.3 + slope * places
    view = torch.stack([top, top + 0.3], -1)[None]
    seen = straightened(striped(0.3, 0.6, slope), view, (32, 256))
    assert seen.shape == (1, 3, 32, 256)
    inner = seen[..., 2:-2, 10:-10]  # beyond the first and the last place the edges run level
    assert inner.min() > 0.9
    outside = straightened(striped(0.3, 0.6, slope), view - 0.3, (32, 256))
    assert outside[..., 2:-2, 10:-10].max() < -0.9


def test_the_finder_is_told_off_in_heights_of_the_line_and_only_where_it_is_known():
    band = torch.full((2, 16, 2), -1.0)
    band[0, 4:12] = torch.tensor([0.4, 0.6])
    wanted = torch.tensor([0.4 - VIEW_MARGIN * 0.2, 0.6 + VIEW_MARGIN * 0.2]).expand(2, 16, 2)
    assert find_loss(wanted, band).item() == pytest.approx(0, abs=1e-6)
    assert find_loss(wanted + 0.1, band).item() == pytest.approx(0.5, abs=1e-5)
    far = wanted.clone()
    far[1], far[0, :4] = 9, 9  # nothing is known there
    assert find_loss(far, band).item() == pytest.approx(0, abs=1e-6)


def test_what_is_told_goes_on_level_beyond_the_ends_and_unknown_lines_are_left():
    band = torch.full((3, 16, 2), -1.0)
    band[0, 4:12, 0], band[0, 4:12, 1] = torch.linspace(0.2, 0.4, 8), torch.linspace(0.5, 0.7, 8)
    band[1] = torch.tensor([0.1, 0.9])
    view = torch.zeros(3, 16, 2)
    told = partly_told(view, band, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(told[0, :4], told[0, 4].expand(4, 2)) and torch.equal(told[0, 12:], told[0, 11].expand(4, 2))
    assert (told[0, :, 1] - told[0, :, 0]).min() > 0.2
    assert torch.equal(told[2], view[2])
    assert torch.equal(partly_told(view, band, 0.0, torch.Generator().manual_seed(0)), view)


def test_the_reading_teaches_the_finder_and_a_known_band_does():
    torch.manual_seed(0)
    config = replace(RecognizerConfig.tiny(), finder=8)
    model = SimpleNamespace(recognizer=TransOCR(config))
    batch = {
        "lr": torch.rand(4, 3, 32, 128) * 2 - 1, "hr": torch.rand(4, 3, 32, 128) * 2 - 1,
        "tokens": torch.tensor([[3, 4, 5] + [0] * 21] * 4),
        "centers": torch.tensor([[0.2, 0.5, 0.8] + [-1.0] * 21] * 4),
        "band": torch.tensor([0.2, 0.8]).expand(4, 16, 2),
    }  # fmt: skip
    stage = RecognizerStage(RecognizerTraining(told=0.0), model)
    for band, names in ((batch["band"], True), (torch.full((4, 16, 2), -1.0), False)):
        model.recognizer.zero_grad()
        ((loss, _, logs),) = stage.losses(model, {**batch, "band": band}, torch.Generator().manual_seed(0))
        loss.backward()
        assert ("find" in logs) == names
        assert model.recognizer.finder.edges.weight.grad.abs().sum() > 0
