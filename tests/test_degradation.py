"""Degradation against the recorded blocks of the reference, and by properties that need no recording."""

import json
from dataclasses import asdict

import cv2
import numpy as np
import pytest
import torch

from difftsr import degradation as deg
from parity_common import load_fixture, max_difference, parity_folder

BIVARIATE = ("gaussian", "generalized", "plateau")


@pytest.fixture(scope="module")
def recorded():
    return load_fixture("degradation")


@pytest.fixture(scope="module")
def crop(recorded) -> np.ndarray:
    """The image of the recorded blocks: (40, 48, 3) in [0, 1], float64."""
    return recorded.inputs["crop_u8"].numpy() / 255.0


@pytest.fixture
def line() -> np.ndarray:
    """A picture with strokes, colours and a gradient: (64, 256, 3) RGB in [0, 1], float32."""
    ground = np.array((220, 205, 150)) * np.linspace(0.7, 1.0, 256)[None, :, None]
    image = np.repeat(ground, 64, axis=0).astype(np.uint8)
    cv2.putText(image, "Line 42", (12, 46), cv2.FONT_HERSHEY_SIMPLEX, 1.6, (25, 40, 100), 4, cv2.LINE_AA)
    return image.astype(np.float32) / 255


def as_batch(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32)).permute(2, 0, 1)[None]


def matches(recorded, name: str, actual, atol: float = 1e-9) -> None:
    difference = max_difference(actual, recorded.outputs[name])
    assert difference <= atol, f"{name} differs by {difference:.2e}"


# Against the reference, block by block ------------------------------------------------------------------------------


@pytest.mark.parametrize("i", range(3))
def test_recorded_gaussians(recorded, i):
    a = recorded.manifest["blocks"][f"anisotropic_gaussian.{i}"]
    matches(recorded, f"anisotropic_gaussian.{i}", deg.anisotropic_gaussian(a["ksize"], a["theta"], a["l1"], a["l2"]))
    a = recorded.manifest["blocks"][f"fspecial_gaussian.{i}"]
    matches(recorded, f"fspecial_gaussian.{i}", deg.fspecial_gaussian(a["hsize"], a["sigma"]))


def test_recorded_laplacian_and_shifted_kernels(recorded):
    matches(recorded, "fspecial_laplacian.0", deg.fspecial_laplacian(0.2))
    for i in range(2):
        a = recorded.manifest["blocks"][f"shift_pixel.{i}"]
        kernel = deg.shift_kernel(deg.fspecial_gaussian(a["hsize"], a["sigma"]), a["sf"])
        matches(recorded, f"shift_pixel.{i}", kernel / kernel.sum())


@pytest.mark.parametrize("i", range(3))
@pytest.mark.parametrize("kind", BIVARIATE)
@pytest.mark.parametrize("shape", ["iso", "aniso"])
def test_recorded_bivariate_kernels(recorded, kind, shape, i):
    name = f"bivariate_{kind}_{shape}.{i}"
    a = recorded.manifest["blocks"][name]
    sigma_y = None if a["isotropic"] else a["sig_y"]
    kernel = deg.bivariate_kernel(
        a["kernel_size"], a["sig_x"], sigma_y, theta=a["theta"], kind=kind, beta=a.get("beta", 1.0)
    )
    matches(recorded, name, kernel)


@pytest.mark.parametrize("i", range(3))
def test_recorded_sinc(recorded, i):
    a = recorded.manifest["blocks"][f"sinc.{i}"]
    # 1e-7: torch's Bessel function itself is off by up to 4e-7 between 4.5 and 8.3
    matches(recorded, f"sinc.{i}", deg.sinc_kernel(a["cutoff"], a["kernel_size"], a["pad_to"]), 1e-7)


class RecordedDraws:
    """Answers like a Generator, from numpy's legacy stream: the one the reference drew from."""

    def __init__(self, seed: int):
        self.legacy = np.random.RandomState(seed)

    def uniform(self, low, high):
        return self.legacy.uniform(low, high)

    def random(self):
        return self.legacy.uniform()


@pytest.mark.parametrize("kind", deg.KERNEL_KINDS)
def test_recorded_random_kernels(recorded, kind):
    a = recorded.manifest["blocks"][f"random_mixed.{kind}"]
    kernel = deg.random_mixed_kernel(a["kernel_size"], RecordedDraws(a["seed"]), a["sigma_range"], name=kind)
    matches(recorded, f"random_mixed.{kind}", kernel)


def test_recorded_filter2d(recorded, crop):
    kernel = deg.bivariate_kernel(13, 1.1, 2.4, theta=0.7).astype(np.float32)
    image = crop.astype(np.float32)
    matches(recorded, "filter2D.shared", as_batch(deg.correlate(image, kernel)), 2e-6)
    pair = [deg.correlate(image, kernel), deg.correlate(1 - image, np.ascontiguousarray(kernel[:, ::-1]))]
    matches(recorded, "filter2D.per_image", torch.cat([as_batch(x) for x in pair]), 2e-6)


def test_recorded_convolution(recorded, crop):
    convolved = deg.convolve(crop, deg.anisotropic_gaussian(9, 0.5, 3, 1))
    matches(recorded, "ndimage_convolve.mirror", convolved, 1e-6)


@pytest.mark.parametrize("name, scale", [("half", 0.5), ("quarter", 0.25), ("up2", 2)])
def test_recorded_imresize(recorded, crop, name, scale):
    matches(recorded, f"imresize_np.{name}", deg.imresize(crop, scale), 2e-6)


@pytest.mark.parametrize("mode", ["linear", "cubic", "area", "lanczos4"])
def test_recorded_cv2_resize(recorded, crop, mode):
    matches(recorded, f"cv2_resize.{mode}", deg.resize(crop, 15, 19, mode.removesuffix("4")), 1e-6)
    matches(recorded, f"cv2_resize_up.{mode}", deg.resize(crop, 80, 96, mode.removesuffix("4")), 1e-6)


@pytest.mark.parametrize("quality", [30, 50, 75, 95])
def test_recorded_diff_jpeg(recorded, crop, quality):
    images = as_batch(crop)
    matches(recorded, f"diffjpeg.q{quality}", deg.diff_jpeg(images, quality), 2e-5)
    matches(recorded, f"diffjpeg_odd.q{quality}", deg.diff_jpeg(images[..., :37, :45], quality), 2e-5)


def test_recorded_diff_jpeg_variants(recorded, crop):
    images = as_batch(crop)
    both = torch.cat([images, 1 - images])
    matches(recorded, "diffjpeg.vector", deg.diff_jpeg(both, torch.tensor([35.5, 80.25])), 2e-5)
    matches(recorded, "diffjpeg_differentiable.q60", deg.diff_jpeg(images, 60, differentiable=True), 2e-5)


@pytest.mark.parametrize("name, gray", [("color", False), ("gray", True)])
def test_recorded_poisson_noise_counts_in_the_same_units(recorded, crop, name, gray):
    """The draws differ, but both are whole counts of the same size around the same mean, and equally strong."""
    block = recorded.manifest["blocks"][f"poisson_noise_pt.{name}"]
    levels = block["vals_gray" if gray else "vals"]
    image = crop.astype(np.float32)
    light = image @ np.array([[0.2989], [0.587], [0.114]], np.float32) if gray else image
    mean = np.rint(light * 255) / 255
    theirs = recorded.outputs[f"poisson_noise_pt.{name}"][0].permute(1, 2, 0).numpy()[..., : mean.shape[2]]
    ours = deg.poisson_noise(image, block["scale"], np.random.default_rng(0), gray=gray)
    for noise in (theirs, ours):
        counts = (noise / block["scale"] + mean) * levels
        assert np.abs(counts - np.rint(counts)).max() < 1e-3
    assert ours.std() == pytest.approx(theirs.std(), rel=0.06)


@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize("pipeline", ["bsrgan", "real_esrgan"])
def test_recorded_statistics_of_random_draws(recorded, pipeline, scale):
    """The distance from the input of whole random degradations is distributed as in the reference."""
    expected = recorded.manifest["random_pipeline_statistics"]["draws"][f"{pipeline}_sf{scale}"]
    image = cv2.imread(str(parity_folder() / "degradation" / "input_0.png"))[:, :256, ::-1].astype(np.float32) / 255
    small = cv2.resize(image, (256 // scale, 128 // scale), interpolation=cv2.INTER_AREA)
    rng, draws = np.random.default_rng(1), 60
    distances = [np.sqrt(((getattr(deg, pipeline)(image, scale, rng) - small) ** 2).mean()) for _ in range(draws)]
    theirs = expected["rmse_vs_area"]
    standard_error = theirs["std"] * np.sqrt(1 / draws + 1 / expected["n"])
    assert abs(np.mean(distances) - theirs["mean"]) < 3.5 * standard_error
    assert 0.65 < np.std(distances) / theirs["std"] < 1.5


# Without the reference: kernels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", deg.KERNEL_KINDS)
def test_random_kernels_are_weights(name, seed):
    kernel = deg.random_mixed_kernel(15, np.random.default_rng(seed), name=name)
    assert kernel.sum() == pytest.approx(1) and kernel.min() >= 0
    assert np.allclose(kernel, kernel[::-1, ::-1])  # symmetric about the centre
    if name.endswith("_iso") or name == "iso":
        assert np.allclose(kernel, kernel.T) and np.allclose(kernel, kernel[::-1])


def test_kernels_have_the_variance_asked_for():
    x, _ = deg.offsets(41)
    kernel = deg.anisotropic_gaussian(41, 0.0, 9.0, 4.0)
    assert (kernel * x**2).sum() == pytest.approx(9, rel=1e-3)
    assert (kernel.T * x**2).sum() == pytest.approx(4, rel=1e-3)
    assert (deg.fspecial_gaussian(41, 2.0) * x**2).sum() == pytest.approx(4, rel=1e-3)
    assert deg.fspecial_laplacian(0.2).sum() == pytest.approx(0, abs=1e-12)


def test_sinc_keeps_low_frequencies_and_drops_high_ones():
    kernel = deg.sinc_kernel(np.pi / 2, 21)
    x, _ = deg.offsets(21)
    response = {frequency: (kernel * np.cos(frequency * x)).sum() for frequency in (0.3, 2.6)}
    assert response[0.3] > 0.9 and abs(response[2.6]) < 0.1
    padded = deg.sinc_kernel(np.pi / 2, 7, pad_to=21)
    assert padded.shape == (21, 21) and np.count_nonzero(padded[0]) == 0 and padded.sum() == pytest.approx(1)


def test_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match="known: gaussian"):
        deg.bivariate_kernel(7, 1.0, kind="box")


# Filters, resizing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [deg.fspecial_gaussian(13, 1.7), deg.anisotropic_gaussian(13, 0.5, 5.0, 1.0)])
def test_short_way_of_separable_kernels_changes_nothing(line, kernel):
    plain = cv2.filter2D(line, -1, kernel, borderType=cv2.BORDER_REFLECT_101)
    assert np.abs(deg.correlate(line, kernel) - plain).max() < 2e-6


def test_convolution_turns_the_kernel():
    point = np.zeros((7, 7, 1), np.float32)
    point[3, 3] = 1
    kernel = np.arange(9, dtype=np.float32).reshape(3, 3)
    assert np.array_equal(deg.convolve(point, kernel)[2:5, 2:5], kernel)
    assert np.array_equal(deg.correlate(point, kernel)[2:5, 2:5], kernel[::-1, ::-1])


def test_every_scale_th_pixel_does_not_move_the_picture():
    rows = np.exp(-((np.arange(64) - 31.5) ** 2) / (2 * 6.0**2)).astype(np.float32)
    blob = np.outer(rows, rows)[..., None]  # centred
    kernel = deg.shift_kernel(deg.fspecial_gaussian(25, 2.0), 4)
    small = deg.convolve(blob, kernel / kernel.sum())[::4, ::4]
    centre = (small.sum(axis=1).ravel() @ np.arange(16)) / small.sum()
    assert centre == pytest.approx(7.5, abs=0.02)  # the middle of 16 pixels


def test_area_of_torch_and_of_opencv_agree_where_the_factor_is_whole(line):
    assert np.allclose(deg.interpolate(line, 16, 64, "area"), deg.resize(line, 16, 64, "area"), atol=1e-6)
    constant = np.full((20, 30, 3), 0.25, np.float32)
    for mode in ("area", "linear", "cubic"):
        assert np.allclose(deg.interpolate(constant, 27, 13, mode), 0.25, atol=1e-6)


def test_matlab_resize_keeps_even_ground_and_rounds_sizes_up():
    constant = np.full((21, 30, 3), 0.4, np.float32)
    small = deg.imresize(constant, 0.5)
    assert small.shape == (11, 15, 3) and small.dtype == np.float32 and np.allclose(small, 0.4, atol=1e-6)


# Noise --------------------------------------------------------------------------------------------------------------


def test_gaussian_noise():
    rng = np.random.default_rng(0)
    colour = deg.gaussian_noise((100, 100, 3), 20, rng)
    assert (
        colour.std() * 255 == pytest.approx(20, rel=0.02)
        and abs(np.corrcoef(*colour.reshape(-1, 3).T[:2])[0, 1]) < 0.05
    )
    assert deg.gaussian_noise((100, 100, 3), 20, rng, gray=True).shape == (100, 100, 1)


def test_correlated_noise_has_correlated_channels_and_bounded_strength():
    samples = [deg.correlated_noise((80, 80, 3), 25, np.random.default_rng(seed)).reshape(-1, 3) for seed in range(20)]
    assert max(sample.std() * 255 for sample in samples) < 26
    assert max(abs(np.corrcoef(sample.T)[0, 1]) for sample in samples) > 0.3


def test_poisson_noise_follows_the_law():
    """Mean zero, variance v / levels; black stays black."""
    values = np.array([0, 51, 128, 255], np.uint8)
    image = np.repeat(values[None, :, None] / np.float32(255), 20000, axis=0)  # 4 distinct values: 4 levels
    noise = deg.poisson_noise(image, 1.0, np.random.default_rng(0))[..., 0]
    assert np.all(noise[:, 0] == 0)
    assert np.allclose(noise.mean(axis=0), 0, atol=0.02)
    assert np.allclose(noise.var(axis=0), values / 255 / 4, rtol=0.05, atol=1e-9)


@pytest.mark.parametrize("levels", [1, 8, 256])
def test_poisson_table_against_the_exact_probabilities(levels):
    table = deg.poisson_table(levels)
    for value in (1, 100, 255):
        mean = value / 255 * levels
        assert table[value].mean() == pytest.approx(mean, rel=2e-2, abs=2e-3)
        assert (table[value] == 0).mean() == pytest.approx(np.exp(-mean), abs=5e-4)


# JPEG ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", [deg.jpeg, deg.soft_jpeg])
def test_jpeg_gets_worse_with_lower_quality(line, through):
    loss = [np.abs(through(line, quality) - line).mean() for quality in (95, 80, 60, 40, 20, 10)]
    assert loss == sorted(loss) and loss[0] < 0.02
    damaged = through(line, 10)
    assert damaged.shape == line.shape and damaged.dtype == np.float32 and damaged.min() >= 0 and damaged.max() <= 1


def test_jpeg_does_not_swap_colours():
    red = np.zeros((16, 16, 3), np.float32)
    red[..., 0] = 0.8
    for through in (deg.jpeg, deg.soft_jpeg):
        assert np.allclose(through(red, 95), red, atol=0.03)


def test_gradient_of_diff_jpeg(line):
    images = as_batch(line[:32, :48]).requires_grad_()
    (plain,) = torch.autograd.grad(deg.diff_jpeg(images, 50).square().sum(), images)
    (soft,) = torch.autograd.grad(deg.diff_jpeg(images, 50, differentiable=True).square().sum(), images)
    assert not plain.any() and soft.isfinite().all() and (soft != 0).float().mean() > 0.5


def test_diff_jpeg_of_a_batch_is_that_of_its_images_and_leaves_the_quality_alone(line):
    images = torch.cat([as_batch(line[:33, :50]), as_batch(line[30:63, 60:110])])
    quality = torch.tensor([20.0, 90.0])
    together = deg.diff_jpeg(images, quality)
    assert quality.tolist() == [20.0, 90.0]
    for i in range(2):
        assert torch.allclose(together[i], deg.diff_jpeg(images[i : i + 1], float(quality[i]))[0], atol=1e-6)


# Pipelines ----------------------------------------------------------------------------------------------------------

NAMES = (*deg.STRENGTHS, "mixed")
ONLY = {"bsrgan": dict(real_esrgan=0.0, bsrgan=1.0), "real_esrgan": dict(real_esrgan=1.0, bsrgan=0.0)}


@pytest.mark.parametrize("strength", NAMES)
@pytest.mark.parametrize("pipeline", ONLY)
def test_same_seed_same_bytes(line, pipeline, strength):
    config = deg.DegradationConfig(**ONLY[pipeline], strength=strength)
    before = line.copy()
    first, second, other = (deg.degrade(line, np.random.default_rng(seed), config) for seed in (3, 3, 4))
    assert np.array_equal(first.lr, second.lr) and first.scale == second.scale and first.pipeline == pipeline
    assert first.lr.shape != other.lr.shape or not np.array_equal(first.lr, other.lr)
    assert np.array_equal(line, before), "the input was written to"


def test_global_generators_play_no_part(line):
    results = []
    for seed in (0, 1):
        np.random.seed(seed)
        torch.manual_seed(seed)
        results.append(deg.degrade(line, np.random.default_rng(5)).lr)
    assert np.array_equal(*results)


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("pipeline", ONLY)
def test_size_is_the_input_divided_by_the_scale(line, pipeline, scale):
    config = deg.DegradationConfig(**ONLY[pipeline], scales=(scale,))
    for seed in range(8):
        spoiled = deg.degrade(line[:, :250], np.random.default_rng(seed), config)
        assert spoiled.lr.shape == (64 // scale, 250 // scale, 3) and spoiled.lr.dtype == np.uint8
        assert spoiled.scale == scale


@pytest.mark.parametrize("shape", [(1, 1), (2, 40), (4, 4), (5, 300), (40, 3), (17, 23)])
@pytest.mark.parametrize("pipeline", ONLY)
def test_tiny_images_survive(pipeline, shape):
    image = np.random.default_rng(0).random((*shape, 3), dtype=np.float32)
    config = deg.DegradationConfig(**ONLY[pipeline], scales=(4,), strength="severe")
    for seed in range(12):
        lr = deg.degrade(image, np.random.default_rng(seed), config).lr
        assert min(lr.shape[:2]) >= deg.MIN_SIDE


def test_bsrgan_shrinks_before_it_goes_to_the_final_size(line, monkeypatch):
    log = []

    def shrink(image, scale, rng, ranges):
        log.append("shrink")
        return image

    def resize(image, height, width, mode="cubic"):
        log.append("final")
        return image

    monkeypatch.setattr(deg, "bsrgan_shrink", shrink)
    monkeypatch.setattr(deg, "resize", resize)
    for seed in range(30):
        log.clear()
        deg.bsrgan(line, 2, np.random.default_rng(seed))
        assert log == ["shrink", "final"]


def test_pipelines_and_scales_are_drawn_as_asked(line):
    rng = np.random.default_rng(0)
    config = deg.DegradationConfig(real_esrgan=0.2, bsrgan=0.5, none=0.3)
    drawn = [deg.degrade(line[:16, :16], rng, config) for _ in range(300)]
    share = {name: np.mean([one.pipeline == name for one in drawn]) for name in ("real_esrgan", "bsrgan", "none")}
    assert share["real_esrgan"] == pytest.approx(0.2, abs=0.08) and share["none"] == pytest.approx(0.3, abs=0.09)
    assert {one.scale for one in drawn if one.pipeline != "none"} == {1, 2, 4}
    assert {one.scale for one in drawn if one.pipeline == "none"} == {1}


def test_strengths_are_ordered(line):
    """The further up the ladder, the further from the sharp line."""
    target = deg.to_canvas(np.rint(line * 255).astype(np.uint8)).astype(float)
    distances = []
    for strength in ("mild", "medium", "hard", "severe"):
        rng, config = np.random.default_rng(0), deg.DegradationConfig(strength=strength)
        lines = [deg.to_canvas(deg.degrade(line, rng, config).lr).astype(float) for _ in range(40)]
        distances.append(np.mean([np.sqrt(((one - target) ** 2).mean()) for one in lines]))
    assert distances == sorted(distances) and distances[-1] > 2 * distances[0]


def test_mixed_draws_every_strength(line):
    rng, config = np.random.default_rng(0), deg.DegradationConfig(strength="mixed")
    assert {deg.degrade(line[:16, :16], rng, config).strength for _ in range(60)} == {
        "mild",
        "medium",
        "hard",
        "severe",
    }


# Errors are raised --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((32, 128), np.uint8), "shape"),
        (np.zeros((32, 128, 4), np.uint8), "shape"),
        (np.zeros((0, 128, 3), np.uint8), "shape"),
        (np.zeros((32, 128, 3), np.int64), "int64"),
        (np.full((32, 128, 3), 255.0), r"\[0, 1\]"),
        (np.full((32, 128, 3), np.nan), r"\[0, 1\]"),
    ],
)
def test_wrong_images_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        deg.degrade(image, np.random.default_rng(0))


def test_a_failing_block_is_not_swallowed(line, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no JPEG today")

    monkeypatch.setattr(deg, "soft_jpeg", fail)
    with pytest.raises(RuntimeError, match="no JPEG today"):
        deg.degrade(line, np.random.default_rng(0), deg.DegradationConfig(**ONLY["real_esrgan"]))


@pytest.mark.parametrize(
    "settings", [dict(bsrgan=0.7), dict(real_esrgan=-0.5, bsrgan=1.5), dict(strength="brutal"), dict(scales=(0, 2))]
)
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ValueError):
        deg.DegradationConfig(**settings)


# The canvas ---------------------------------------------------------------------------------------------------------


def test_to_canvas(line):
    image = np.rint(line * 255).astype(np.uint8)
    for mode in ("linear", "cubic", "lanczos"):
        canvas = deg.to_canvas(image[::2, ::2], (128, 512), mode)
        assert canvas.shape == (128, 512, 3) and canvas.dtype == np.uint8
    assert np.array_equal(deg.to_canvas(image, image.shape[:2]), image)
    stripes = np.zeros((8, 64, 3), np.uint8)
    stripes[:, ::2] = 200  # finer than the canvas can show: must become gray, not moire
    assert np.all(deg.to_canvas(stripes, (16, 32)) == 100)
    with pytest.raises(ValueError, match="uint8"):
        deg.to_canvas(line)
    with pytest.raises(ValueError, match="known: linear"):
        deg.to_canvas(image, interpolation="bicubic")


# Batches and recipes ------------------------------------------------------------------------------------------------


def followed_alone(image: np.ndarray, recipe: deg.Recipe) -> np.ndarray:
    """A recipe without random steps, done with the blocks for one image."""
    for step in recipe.steps:
        if step["op"] == "blur":
            image = deg.correlate(image, np.ascontiguousarray(deg.recipe_kernel(**step["kernel"])))
        elif step["op"] == "resize" and step["mode"] == "matlab":
            image = np.clip(deg.imresize(image, 0.5), 0, 1)
        elif step["op"] == "resize":
            mode, area = step["mode"], step["mode"] == "mean"
            image = deg.interpolate(image, *step["size"], "area") if area else deg.resize(image, *step["size"], mode)
            image = np.clip(image, 0, 1) if step["clip"] else image
        elif step["op"] == "decimate":
            image = np.clip(image[:: step["every"], :: step["every"]], 0, 1)
        else:
            image = deg.soft_jpeg(np.clip(image, 0, 1), step["quality"])
    return np.rint(np.clip(image, 0, 1) * 255)


def as_lines(line: np.ndarray, count: int) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(line)).permute(2, 0, 1).expand(count, -1, -1, -1)


@pytest.mark.parametrize("pipeline", ONLY)
def test_a_batch_does_what_the_blocks_for_one_image_do(line, pipeline):
    config = deg.DegradationConfig(**ONLY[pipeline], scales=(1, 2, 3, 4))
    recipes = []
    for seed in range(24):
        recipe = deg.draw_recipe(line.shape[:2], np.random.default_rng(seed), config)
        still = tuple(step for step in recipe.steps if step["op"] not in ("noise", "poisson"))
        recipes.append(deg.replace(recipe, steps=still))
    done = {step["op"] for recipe in recipes for step in recipe.steps}
    assert done >= {"blur", "resize", "jpeg"} and (pipeline != "bsrgan" or "decimate" in done)
    for lr, recipe in zip(deg.follow(as_lines(line, 24), recipes), recipes, strict=True):
        expected = followed_alone(line, recipe)
        difference = np.abs(lr.permute(1, 2, 0).numpy() * 255 - expected)
        assert difference.shape == expected.shape
        # a value at the edge between two steps of the JPEG table may fall to either side: one block, a few levels
        assert np.mean(difference > 1) < 0.02 and difference.mean() < 0.1, recipe


def test_recipes_replay_to_the_bit_and_lines_do_not_depend_on_their_neighbours(line):
    config, images = deg.DegradationConfig(strength="mixed"), as_lines(line, 6)
    lines, recipes = deg.degrade_batch(images, range(6), config)
    stored = [deg.Recipe(**json.loads(json.dumps(asdict(recipe)))) for recipe in recipes]
    assert all(torch.equal(a, b) for a, b in zip(lines, deg.follow(images, stored), strict=True))
    other, _ = deg.degrade_batch(images, range(1, 7), config)
    assert all(torch.equal(a, b) for a, b in zip(lines[1:], other, strict=False))
    for one, alone in zip(deg.follow(images, recipes, together=6), lines, strict=True):  # as a GPU would
        assert alone.shape == one.shape and ((alone - one).abs() > 1.5 / 255).float().mean() < 0.02


def test_what_a_gpu_does_instead_of_opencv(line):
    """The same filters and resizes, for lines of several sizes, some smaller than their kernels."""
    small = [cv2.resize(line, size) for size in ((250, 60), (64, 33), (9, 5))]
    drawn = [deg.draw_recipe((64, 256), np.random.default_rng(seed), deg.DegradationConfig(scales=(4,))) for seed in
             range(40)]  # fmt: skip
    steps = [step for recipe in drawn for step in recipe.steps]
    kernels = [deg.recipe_kernel(**step["kernel"]) for step in steps if step["op"] == "blur"]
    assert {kernel.shape[0] for kernel in kernels} >= {7, 21, 25}
    for start in range(0, len(kernels) - 2, 3):
        three = kernels[start : start + 3]
        lines = [as_batch(image)[0] for image in small]
        for image, kernel, found in zip(small, three, deg.correlate_batch(lines, three), strict=True):
            expected = deg.correlate(image, np.ascontiguousarray(kernel))
            assert np.allclose(found.permute(1, 2, 0).numpy(), expected, atol=5e-6)
    for mode in deg.CV2_MODES:
        for size in ((24, 90), (70, 300)):
            found, expected = deg.torch_resized(as_batch(small[0])[0], size, mode), deg.resize(small[0], *size, mode)
            assert np.allclose(found.permute(1, 2, 0).numpy(), expected, atol=2e-4), mode


def distances(lines, image: np.ndarray) -> np.ndarray:
    """Root mean square distance of LR lines (h, w, 3) in [0, 1] from the area-averaged input."""
    small = {one.shape: cv2.resize(image, one.shape[1::-1], interpolation=cv2.INTER_AREA) for one in lines}
    return np.array([np.sqrt(((one - small[one.shape]) ** 2).mean()) for one in lines])


def agree(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two means differ by less than four standard errors, and the spreads by less than half."""
    error = np.hypot(a.std() / len(a) ** 0.5, b.std() / len(b) ** 0.5)
    return abs(a.mean() - b.mean()) < 4 * error and 2 / 3 < (a.std() / b.std()) < 3 / 2


@pytest.mark.parametrize("strength", deg.STRENGTHS)
@pytest.mark.parametrize("pipeline", ONLY)
def test_both_forms_follow_the_same_law(line, pipeline, strength):
    config, count = deg.DegradationConfig(**ONLY[pipeline], strength=strength), 120
    alone = [deg.degrade(line, np.random.default_rng(seed), config).lr / 255 for seed in range(count)]
    lines, _ = deg.degrade_batch(as_lines(line, count), range(1000, 1000 + count), config)
    assert agree(distances(alone, line), distances([one.permute(1, 2, 0).numpy() for one in lines], line))


@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize("pipeline", ONLY)
def test_recorded_statistics_of_batches(recorded, pipeline, scale):
    expected = recorded.manifest["random_pipeline_statistics"]["draws"][f"{pipeline}_sf{scale}"]["rmse_vs_area"]
    image = cv2.imread(str(parity_folder() / "degradation" / "input_0.png"))[:, :256, ::-1].astype(np.float32) / 255
    config = deg.DegradationConfig(**ONLY[pipeline], scales=(scale,))
    lines, _ = deg.degrade_batch(as_lines(image, 60), range(60), config)
    found = distances([one.permute(1, 2, 0).numpy() for one in lines], image)
    error = np.hypot(expected["std"], found.std()) / 60**0.5
    assert abs(found.mean() - expected["mean"]) < 4 * error


def test_canvas_of_a_batch(line):
    lines = [torch.from_numpy(cv2.resize(line, size)).permute(2, 0, 1) for size in ((30, 16), (900, 40), (512, 128))]
    batch = deg.canvas_batch(lines)
    assert batch.shape == (3, 3, 128, 512)
    for one, expected in zip(batch, lines, strict=True):
        expected = deg.to_canvas((expected.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
        assert np.abs(one.permute(1, 2, 0).numpy() * 255 - expected).max() < 3


def test_wrong_batches_are_refused(line):
    with pytest.raises(ValueError, match="and 2"):
        deg.follow(as_lines(line, 3), [deg.Recipe("none", 1, "mild", ())] * 2)
    with pytest.raises(ValueError, match="unknown operation 'rain'; known: blur"):
        deg.follow(as_lines(line, 1), [deg.Recipe("none", 1, "mild", (dict(op="rain"),))])
    with pytest.raises(ValueError, match="unknown kernel"):
        deg.recipe_kernel("box", size=3)
