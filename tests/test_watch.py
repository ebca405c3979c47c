"""Traces as pictures, players and films."""

import cv2
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from difftsr.model import DiffTSR
from difftsr.restore import restore
from difftsr.watch import animate, contact_sheet, draw_frames, entropy, player, save_trace
from restore_common import coloured_line, save_tiny_weights


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return DiffTSR.from_pretrained(save_tiny_weights(tmp_path_factory.mktemp("weights")))


@pytest.fixture(scope="module")
def trace(model):
    return restore(model, coloured_line(), steps=4, trace=True).trace


@pytest.fixture(scope="module")
def frames(model, trace):
    return draw_frames(model, trace, 3.0, 48)


def test_entropy_in_bits():
    probs = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.25, 0.25], [0.0, 0.0]])
    torch.testing.assert_close(entropy(probs), torch.tensor([0.0, 1.0, 1.5, 0.0]), atol=1e-5, rtol=0)


def test_one_frame_a_step_of_one_size_and_all_differ(frames):
    assert len(frames) == 4 and len({frame.size for frame in frames}) == 1
    assert len({frame.tobytes() for frame in frames}) == 4
    assert contact_sheet(frames, 3).height == 3 * (frames[0].height + 4)
    assert contact_sheet(frames[:1], 6).height == frames[0].height + 4


def test_an_empty_trace_has_no_frames(model):
    with pytest.raises(ValueError, match="trace=True"):
        draw_frames(model, [], 3.0)


def test_films_hold_every_frame(frames, tmp_path):
    with Image.open(animate(frames, tmp_path / "a.gif")) as film:
        assert film.n_frames == 4 and film.size == frames[0].size and film.info["loop"] == 0
    film = cv2.VideoCapture(str(animate(frames, tmp_path / "a.mp4")))
    shown = []
    while (read := film.read())[0]:
        shown.append(read[1])
    assert len(shown) == 4 and abs(shown[0].astype(int) - shown[3]).mean() > 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gif", "a.mp4"]
    with pytest.raises(ValueError, match=".gif or .mp4"):
        animate(frames, tmp_path / "a.avi")


def test_a_trace_on_disk(trace, tmp_path):
    save_trace(trace, tmp_path / "trace.safetensors")
    stored = load_file(tmp_path / "trace.safetensors")
    assert stored["t"].tolist() == [step.t for step in trace]
    assert stored["z_t"].shape == (4, 4, 8, 32) and stored["c_t"].shape == stored["bits"].shape == (4, 24)
    assert torch.equal(stored["z0"][2:3], trace[2].z0)


def test_the_player_follows_its_slider(frames):
    pytest.importorskip("ipywidgets")
    controls, picture = player(frames).children
    first = picture.value
    controls.children[1].value = 3
    assert picture.value != first
