"""The do-no-harm gate: what it measures, what it decides, and whom it stops."""

import pytest
import torch

from difftsr.gate import (
    GateConfig,
    blur,
    certainty,
    gate,
    gaussian,
    is_faithful,
    mask_of,
    mismatch,
    mismatch_limit,
    read_trust,
    same_light,
    spans,
)  # fmt: skip
from difftsr.recognizer import Reading

SIZE = (8, 32)  # of the input before it was brought to the canvas of 32 x 128


def reading(text: str, *confidence: float) -> Reading:
    """A text of at most eight characters, known with the given certainties."""
    tokens, probs = torch.zeros(1, 8, dtype=torch.long), torch.ones(1, 8)
    tokens[0, : len(text)], probs[0, : len(text)] = torch.tensor([2 + ord(c) for c in text]), torch.tensor(confidence)
    return Reading.of(tokens, prob=probs)


def bars(seed: int = 0) -> torch.Tensor:
    """A line of 32 x 128: sixteen columns of eight pixels, dark or light."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randint(0, 2, (16,), generator=generator).float() * 1.6 - 0.8
    return columns.repeat_interleave(8).expand(3, 32, 128).clone()


def asking(**limits: float) -> GateConfig:
    """A gate that no agreement between the pictures satisfies and no disagreement upsets: the readings decide."""
    return GateConfig(mismatch=9, faithful=0, **limits)


class Reader:
    """Says what each picture says by the nearest of those it knows."""

    def __init__(self, *known: tuple[torch.Tensor, Reading]):
        self.known = known

    def read(self, images: torch.Tensor) -> Reading:
        nearest = [min(self.known, key=lambda pair: float((image - pair[0]).square().mean()))[1] for image in images]
        return Reading(*(torch.cat([getattr(r, name) for r in nearest]) for name in ("tokens", "probs", "centers")))


# --- measuring ---


@pytest.mark.parametrize("sigma", [0.5, 2.0, 7.3])
def test_a_gaussian_has_its_width(sigma):
    weights = gaussian(sigma)
    x = torch.arange(len(weights)) - len(weights) // 2
    assert float(weights.sum()) == pytest.approx(1, abs=1e-6)
    assert float((weights * x**2).sum().sqrt()) == pytest.approx(sigma, rel=0.1 if sigma < 1 else 0.02)


def test_agreement_says_more_where_the_input_has_more_rows():
    flat, bump = torch.full((120,), 0.1), torch.full((120,), 0.1)
    bump[50:60] = 0.2  # one twelfth of the line
    assert is_faithful(flat, 32, 0.15) and not is_faithful(flat, 21, 0.15)
    assert not is_faithful(bump, 32, 0.15) and is_faithful(bump, 48, 0.15)
    assert not is_faithful(3.1 * flat, 64, 0.15) and not is_faithful(3.1 * flat, 1000, 0.15)
    assert not is_faithful(torch.zeros(120), 64, 0.0)


def test_blur_keeps_constants_and_treats_each_axis_and_channel_alone():
    flat = torch.full((2, 3, 9, 11), 0.3)
    torch.testing.assert_close(blur(flat, (2.0, 5.0)), flat)
    point = torch.zeros(1, 3, 31, 31)
    point[0, 1, 15, 15] = 1.0
    spread = blur(point, (3.0, 1.0))[0]
    assert spread[0].abs().max() == 0 and spread[2].abs().max() == 0
    rows, columns = spread[1].sum(1), spread[1].sum(0)
    x = torch.arange(31) - 15
    assert float((rows * x**2).sum()) == pytest.approx(9, rel=0.05)
    assert float((columns * x**2).sum()) == pytest.approx(1, rel=0.05)


def test_mismatch_sees_what_is_coarser_than_a_pixel_of_the_input_and_where():
    lr = bars()
    assert mismatch(lr, lr, SIZE).abs().max() == 0
    fine = lr + 0.3 * (torch.arange(128) % 2 * 2 - 1)  # finer than the pitch of four: free to be invented
    coarse = lr.clone()
    coarse[..., 64:80] *= -1
    assert mismatch(fine, lr, SIZE)[14:-14].max() < 0.05  # the alternation breaks off at the edges
    e = mismatch(coarse, lr, SIZE)
    assert e[66:78].mean() > 1 and e[:50].max() < 0.05 and e[96:].max() < 0.05
    grey = mismatch(0.1 * coarse, 0.1 * lr, SIZE)  # contrast does not matter
    torch.testing.assert_close(grey, e, rtol=1e-3, atol=1e-3)


def test_light_comes_from_the_input_and_strokes_from_the_restored_line():
    lr = bars()[None]
    tinted = bars(1)[None] + torch.tensor([0.4, -0.2, 0.1]).view(1, 3, 1, 1)
    lit = same_light(tinted, lr)
    torch.testing.assert_close(lit.mean((0, 2, 3)), lr.mean((0, 2, 3)), atol=0.05, rtol=0)
    assert torch.corrcoef(torch.stack([lit.flatten(), tinted.flatten()]))[0, 1] > 0.6


def test_the_limit_is_the_quantile_of_true_lines():
    pairs = [(bars(seed), blur(bars(seed)[None], (2.0, 2.0 + seed))[0], SIZE) for seed in range(5)]
    low, high = mismatch_limit(pairs, share=0.5), mismatch_limit(pairs, share=0.95)
    assert 0 < low < high
    values = torch.stack(
        [mismatch(same_light(a[None], b[None])[0], b, SIZE).view(8, 16).mean(1) for a, b, _ in pairs]
    )  # a second way: eight equal parts
    assert low == pytest.approx(float(values.quantile(0.5)), rel=1e-4)


# --- deciding ---


def test_the_rules_on_two_readings():
    rules = {  # before, after, trust
        "same": (reading("AB", 0.6, 0.6), reading("AB", 0.6, 0.7), [1, 1]),
        "less certain": (reading("AB", 0.6, 0.6), reading("AB", 0.5, 0.58), [0.5, 1]),
        "the input was clear": (reading("AB", 0.6, 0.95), reading("AC", 0.6, 0.99), [1, 0]),
        "surer": (reading("AB", 0.6, 0.5), reading("AC", 0.6, 0.8), [1, 1]),
        "unreadable before": (reading("AB", 0.6, 0.45), reading("AC", 0.6, 0.3), [1, 1]),
        "unreadable after": (reading("AB", 0.6, 0.45), reading("AC", 0.6, 0.1), [1, 0]),
        "not surer": (reading("AB", 0.6, 0.5), reading("AC", 0.6, 0.6), [1, 0]),
        "gone": (reading("ABC", 0.9, 0.95, 0.9), reading("AC", 0.9, 0.9), [0, 0]),
        "put in, unsure": (reading("AC", 0.9, 0.9), reading("ABC", 0.9, 0.1, 0.9), [1, 0, 1]),
        "put in, sure": (reading("AC", 0.9, 0.9), reading("ABC", 0.9, 0.8, 0.9), [1, 1, 1]),
        "nothing before": (Reading.of(torch.zeros(1, 2, dtype=torch.long)), reading("A", 0.8), [1]),
        "nothing after": (reading("A", 0.8), Reading.of(torch.zeros(1, 1, dtype=torch.long)), []),
    }
    for name, (before, after, wanted) in rules.items():
        trust, reasons = read_trust(before, after, GateConfig())
        assert trust.tolist() == wanted, name
        assert len(reasons) == sum(t < 1 for t in wanted) or name in ("gone", "nothing after"), name


def test_spans_cover_the_line_without_overlap():
    for centers in ([0.2, 0.5, 0.9], [0.5], [0.2, 0.9, 0.5]):
        places = spans(torch.tensor(centers), 128)
        assert len(places) == len(centers) and places[0][0] == 0 and places[-1][1] == 128
        assert all(a[1] == b[0] and a[0] <= a[1] for a, b in zip(places, places[1:]))
    mask = mask_of(torch.tensor([1.0, 0.0]), [(0, 64), (64, 128)], 128, 4.0)
    assert mask[0] == pytest.approx(1) and mask[-1] == pytest.approx(0) and mask[63:65].mean() == pytest.approx(0.5)


# --- the whole gate ---


def test_the_gate_against_four_restorers():
    truth, other = bars(), bars()
    other[..., 96:112] *= -1  # the last character but one says something else, sharply
    lr = blur(truth[None], (2.0, 2.0))[0]
    noise = torch.randn(3, 32, 128, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    clear, sharp = reading("ABCDEFGH", *[0.92] * 8), reading("ABCDEFGH", *[0.97] * 8)
    wrong, nothing = reading("ABCDEFXH", *[0.97] * 8), reading("QQ", 0.3, 0.3)
    lit = [same_light(image[None], lr[None])[0].clamp(-1, 1) for image in (lr, truth, other, noise)]
    reader = Reader(*zip(lit, (clear, sharp, wrong, nothing)))
    images, verdicts, readings = gate(
        reader, torch.stack(lit), lr.expand(4, -1, -1, -1).clone(), [SIZE] * 4,
        config=GateConfig(mismatch=1.5, refused=0.4),
    )  # fmt: skip
    assert [v.action for v in verdicts] == ["kept", "kept", "blended", "input"]
    torch.testing.assert_close(images[0], lr, atol=1e-4, rtol=0)
    assert (images[1] - truth).square().mean() < (lr - truth).square().mean()
    assert verdicts[2].trust == [1, 1, 1, 1, 1, 1, 0, 1]
    assert (images[2] - lr)[..., 100:108].abs().max() < 0.1  # the lie is gone,
    assert (images[2] - lit[2])[..., :80].abs().max() < 0.05  # the rest stayed
    assert torch.equal(images[3], lr) and verdicts[3].reasons
    assert all(torch.equal(read.probs, reader.read(image[None]).probs) for read, image in zip(readings, images))


def test_by_default_one_refused_character_takes_the_line_back():
    lr, restored = blur(bars()[None], (1.0, 1.0))[0], bars()
    lit = same_light(restored[None], lr[None])[0].clamp(-1, 1)
    for after, action in ((reading("AC", 0.8, 0.6), "input"), (reading("AB", 0.8, 0.6), "blended")):
        reader = Reader((lr, reading("AB", 0.8, 0.66)), (lit, after))
        images, [verdict], _ = gate(reader, lit[None], lr[None], [SIZE], config=asking(worse=1))
        assert verdict.action == action and torch.equal(images[0], lr) == (action == "input")


def test_a_line_that_became_less_certain_is_taken_back():
    lr, restored = blur(bars()[None], (1.0, 1.0))[0], bars()
    lit = same_light(restored[None], lr[None])[0].clamp(-1, 1)
    reader = Reader((lr, reading("AB", 0.8, 0.8)), (lit, reading("AB", 0.76, 0.76)))
    images, [verdict], _ = gate(reader, lit[None], lr[None], [SIZE], config=asking())
    assert verdict.action == "input" and torch.equal(images[0], lr) and "less certain by 0.04" in verdict.reasons[-1]


def test_what_is_put_back_is_the_safe_picture():
    lr, restored, safe = blur(bars()[None], (1.0, 1.0))[0], bars(), blur(bars()[None], (0.5, 0.5))[0]
    lit = same_light(restored[None], lr[None])[0].clamp(-1, 1)
    for worse, after in ((0.02, 0.6), (1.0, 0.6)):  # the whole line is less certain; half of its characters is blended
        reader = Reader((lr, reading("AB", 0.8, 0.8)), (lit, reading("AB", 0.9, after)))
        config = asking(worse=worse)
        images, [verdict], _ = gate(reader, lit[None], lr[None], [SIZE], config=config, safe=safe[None])
        if verdict.action == "input":
            assert torch.equal(images[0], safe)
        else:
            torch.testing.assert_close(images[0][..., 100:], (safe + lit)[..., 100:] / 2, atol=1e-2, rtol=0)


def test_a_line_drawn_with_an_uncertain_text_is_not_shown():
    lr, restored = blur(bars()[None], (1.0, 1.0))[0], bars()
    lit = same_light(restored[None], lr[None])[0].clamp(-1, 1)
    reader = Reader((lr, reading("AB", 0.8, 0.8)), (lit, reading("AB", 0.9, 0.9)))
    actions = []
    for sure in (None, [[]], [[0.9, 0.9]], [[0.99, 0.6]]):  # nothing is known; no text was drawn; certain; uncertain
        images, [verdict], _ = gate(reader, lit[None], lr[None], [SIZE], config=asking(), sure=sure)
        actions.append(verdict.action)
        assert torch.equal(images[0], lr) == (verdict.action == "input")
    assert actions == ["kept", "kept", "kept", "input"] and "80%" in verdict.reasons[-1]


def test_what_agrees_with_the_input_is_shown_though_nobody_is_certain_of_it():
    lr = blur(bars()[None], (1.0, 1.0))[0]
    lit = same_light(bars()[None], lr[None])[0].clamp(-1, 1)
    unsure = dict(config=GateConfig(mismatch=9), sure=[[0.3, 0.3]])
    reader = Reader((lr, reading("AB", 0.8, 0.8)), (lit, reading("AB", 0.6, 0.6)))
    images, [verdict], _ = gate(reader, lit[None], lr[None], [SIZE], **unsure)
    assert verdict.action == "kept" and verdict.faithful and torch.equal(images[0], lit)
    other = Reader((lr, reading("AB", 0.95, 0.95)), (lit, reading("AC", 0.99, 0.99)))  # agreement is no leave to lie
    _, [verdict], _ = gate(other, lit[None], lr[None], [SIZE], **unsure)
    assert verdict.action == "input" and not verdict.faithful


def test_certainty_of_an_empty_reading_is_zero():
    assert certainty(Reading.of(torch.zeros(2, 3, dtype=torch.long))).tolist() == [0, 0]


def test_a_line_is_read_again_only_where_it_was_blended():
    lr, restored = blur(bars()[None], (1.0, 1.0)), bars()[None]

    def asked(certain: float) -> tuple[str, int]:
        reader, pictures = Reader((lr[0], reading("AB", 0.8, 0.8)), (restored[0], reading("AB", 0.9, certain))), []
        read, reader.read = reader.read, lambda images: pictures.append(images) or read(images)
        known = {"before": read(lr), "after": read(restored)}
        _, [verdict], _ = gate(reader, restored, lr, [SIZE], config=asking(worse=1), **known)
        return verdict.action, len(pictures)

    assert asked(0.9) == ("kept", 0) and asked(0.7) == ("blended", 1)
