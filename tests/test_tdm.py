"""The text diffusion: recorded reference values, brute force on small alphabets, and the denoiser's promises."""

import itertools
import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from difftsr.recognizer import Reading
from difftsr.tdm import (
    TDM,
    ImportanceSampler,
    MultinomialDiffusion,
    PublishedTDM,
    PublishedTDMConfig,
    TDMConfig,
    TDMStage,
    TDMTraining,
    categorical_kl,
    cosine_alphas,
    log_one_hot,
    log_reading,
    normalise,
    top_reading,
)
from difftsr.text_lines import PAD
from parity_common import assert_close, fill_with_recipe, load_fixture, parity_folder, recipe_state_dict

SMALL = TDMConfig(
    13, length=7, dim=32, character_dim=16, depth=2, heads=2, timesteps=50, columns=10, feature_channels=6,
    latent_shape=(3, 4, 10),
)  # fmt: skip
NETWORK = dict(atol=1e-4, rtol=1e-3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- recorded values of the reference ---


def test_schedule_tables_are_the_recorded_ones():
    aux = load_fixture("multinomial_k50").aux
    diffusion = MultinomialDiffusion(50)
    assert_close(cosine_alphas(1000), aux["alphas_float64"], atol=1e-12, rtol=0)
    assert torch.equal(diffusion.log_alpha.float(), aux["log_alpha"])
    assert torch.equal(diffusion.log_alpha_bar.float(), aux["log_cumprod_alpha"])
    assert torch.equal(diffusion.log_1_min_alpha.float(), aux["log_1_min_alpha"])
    assert torch.equal(diffusion.log_1_min_alpha_bar.float(), aux["log_1_min_cumprod_alpha"])


def test_every_function_of_the_text_diffusion_agrees_with_the_reference():
    f = load_fixture("multinomial_k50")
    t, out, diffusion = f.inputs["t"], f.outputs, MultinomialDiffusion(50)
    net = fill_with_recipe(PublishedTDM(PublishedTDMConfig(50, 64, 4, 2, 4, 2)), f.manifest["recipe_salt"])

    log_x0 = diffusion.log_onehot(f.inputs["x0"])
    assert_close(log_x0, out["log_onehot_x0"])
    assert_close(diffusion.q_pred(log_x0, t), out["q_pred"])
    x_t = diffusion.sample(diffusion.q_pred(log_x0, t), uniform=f.inputs["uniform_q_sample"])
    assert torch.equal(x_t, out["x_t"])
    log_x_t = diffusion.log_onehot(x_t)
    assert_close(diffusion.q_pred_one_timestep(log_x_t, t), out["q_pred_one_timestep"])
    assert_close(diffusion.q_pred_between(log_x_t, t, t - 1), out["q_pred_one_timestep"])
    assert_close(diffusion.posterior(log_x0, log_x_t, t), out["q_posterior"])
    assert_close(diffusion.posterior(f.inputs["log_x0_soft"], log_x_t, t), out["q_posterior_soft_x0"])

    context = (0.18215 * f.inputs["context"]).reshape(len(t), -1, 64)
    with torch.no_grad():
        log_p0 = net(x_t, t, context).log_softmax(1)
    log_p = net.posterior(log_p0, x_t, t)
    assert_close(log_p0, out["log_x_recon"], **NETWORK)
    assert_close(log_p, out["p_pred"], **NETWORK)
    assert_close(categorical_kl(diffusion.posterior(log_x0, log_x_t, t), log_p), out["multinomial_kl"], **NETWORK)
    assert_close(-(log_x0.exp() * log_p).sum(1), out["decoder_nll"], **NETWORK)
    term, prior = diffusion.bound_term(log_x0, log_x_t, t, log_p), diffusion.kl_prior(log_x0)
    assert_close(term, out["compute_Lt"], **NETWORK)
    assert_close(prior, out["kl_prior"])
    assert_close(1000 * term + prior, out["vb_loss_uniform"], atol=1e-2, rtol=1e-4)
    loss = (1000 * term + prior).sum() / (math.log(2) * x_t.numel())
    assert_close(loss, out["train_loss_uniform"], **NETWORK)

    c_s, _ = net.denoise(x_t, t, t - 1, context=context, uniform=f.inputs["uniform_p_sample"])
    assert torch.equal(c_s, out["p_sample_tokens"])
    importance = ImportanceSampler(1000)
    importance.history = f.inputs["Lt_history"]
    assert_close(importance.probabilities(), out["importance_pt_all"], atol=1e-9)


@pytest.mark.parametrize("spelling", ["weights_{}", "weights.{}"])
def test_published_denoiser_has_the_published_keys_and_outputs(spelling):
    f = load_fixture("tdm_small")
    net = PublishedTDM(PublishedTDMConfig(50, 64, 4, 2, 4, 3))
    prefix = "transformer.axial_pos_emb."
    weights = dict(f.weights)
    for i in range(2):
        weights[prefix + spelling.format(i)] = weights.pop(f"{prefix}weights_{i}")
    net.load_state_dict(weights)
    assert_close(net.transformer["axial_pos_emb"](), f.aux["axial_pos_emb"])
    logits = net(f.inputs["tokens"], f.inputs["t"], f.inputs["context"])
    assert_close(logits, f.outputs["logits"], **NETWORK)


def test_published_denoiser_at_paper_size_has_every_key_of_the_checkpoint():
    with torch.device("meta"):
        net = PublishedTDM(PublishedTDMConfig())
    assert sum(p.numel() for p in net.parameters()) == 211_099_217
    rows = [line.split("\t") for line in (parity_folder() / "keys/TDM_Decoder.tsv").read_text().splitlines()]
    published = {row[0]: row[1] for row in rows if row[0] != "key"}
    assert {k: "x".join(map(str, v.shape)) for k, v in net.state_dict().items()} == published


@pytest.mark.skipif("DIFFTSR_SLOW" not in os.environ, reason="half a minute and 2 GB: set DIFFTSR_SLOW")
def test_published_denoiser_at_paper_size_agrees():
    f = load_fixture("paper_TDM_Decoder_recipe")
    with torch.device("meta"):
        net = PublishedTDM(PublishedTDMConfig()).eval()
    net.load_state_dict(recipe_state_dict(net.state_dict(), f.manifest["recipe_salt"]), assign=True)
    with torch.no_grad():
        logits = net(f.inputs["tokens"], f.inputs["t"], f.inputs["context"])
    assert_close(logits[:, ::16], f.outputs["logits_every16"], atol=1e-3, rtol=1e-3)
    assert torch.equal(logits.argmax(1), f.outputs["argmax"])


# --- brute force ---


def matrices(diffusion: MultinomialDiffusion) -> torch.Tensor:
    """One-step transition matrices (T, K, K), float64: row = where from, column = where to."""
    k, alpha = diffusion.num_classes, diffusion.log_alpha.exp()[:, None, None]
    return alpha * torch.eye(k, dtype=torch.float64) + (1 - alpha) / k


@pytest.mark.parametrize(("t", "s"), [(5, 4), (5, 2), (5, 0), (5, -1), (3, -1), (0, -1), (4, 1)])
def test_posterior_is_bayes_rule_over_all_paths(t, s):
    k, diffusion = 4, MultinomialDiffusion(4, 6)
    step = matrices(diffusion)
    mass = torch.zeros(k, k, k, dtype=torch.float64)  # P(c_s, c_t | c_0), summed over every path c_0 .. c_t
    for path in itertools.product(range(k), repeat=t + 2):
        p = math.prod(step[i, path[i], path[i + 1]].item() for i in range(t + 1))
        mass[path[0], path[s + 1], path[-1]] += p
    for c_0, c_t in itertools.product(range(k), repeat=2):
        expected = mass[c_0, :, c_t] / mass[c_0, :, c_t].sum()
        one = [diffusion.log_onehot(torch.tensor([[c]])) for c in (c_0, c_t)]
        actual = diffusion.posterior(*one, torch.tensor([t]), torch.tensor([s])).exp()[0, :, 0]
        torch.testing.assert_close(actual.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("t", "s"), [(5, 4), (5, 1), (5, -1), (2, 0), (0, -1)])
def test_mixture_posterior_is_the_average_over_the_predicted_characters(t, s):
    k, diffusion = 5, MultinomialDiffusion(5, 6)
    p0 = torch.rand(3, k, 2, generator=generator()).softmax(1)
    c_t = torch.randint(k, (3, 2), generator=generator(1))
    expected = torch.zeros(3, k, 2)
    for c_0 in range(k):
        known = diffusion.log_onehot(torch.full_like(c_t, c_0))
        expected += p0[:, c_0, None] * diffusion.posterior(known, diffusion.log_onehot(c_t), t, s).exp()
    actual = diffusion.posterior_mixture(p0.log(), diffusion.log_onehot(c_t), t, s).exp()
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    if s == -1:  # nothing is left to do: the prediction itself
        torch.testing.assert_close(actual, p0, atol=1e-5, rtol=0)


def test_marginals_of_q_sample_are_q_pred():
    diffusion, draws = MultinomialDiffusion(6, 20), 40_000
    for t in (0, 7, 19):
        c_t = diffusion.q_sample(torch.tensor([[2, 5]]).expand(draws, 2), t, generator(t))
        share = torch.stack([(c_t == k).float().mean(0) for k in range(6)])  # (K, 2)
        expected = diffusion.q_pred(diffusion.log_onehot(torch.tensor([[2, 5]])), t).exp()[0]
        assert (share - expected).abs().max() < 0.012
    gumbel = diffusion.sample(diffusion.q_pred(diffusion.log_onehot(torch.full((draws, 1), 2)), 7), generator())
    assert abs((gumbel == 2).float().mean() - (c := diffusion.alpha_bar[7].item()) - (1 - c) / 6) < 0.012


def strided(steps: int, total: int) -> list[tuple[int, int]]:
    times = [round(total * (steps - i) / steps) - 1 for i in range(steps)] + [-1]
    return list(itertools.pairwise(times))


@pytest.mark.parametrize("steps", [1, 4, 20, 200])
@pytest.mark.parametrize("rule", ["posterior", "posterior_mixture"])
def test_an_oracle_ends_at_the_true_text(steps, rule):
    diffusion = MultinomialDiffusion(300)
    truth = torch.randint(300, (8, 24), generator=generator())
    draw, c = generator(1), diffusion.q_sample(truth, 999, generator(2))
    assert (c == truth).float().mean() < 0.1
    for t, s in strided(steps, 1000):
        log_p = getattr(diffusion, rule)(diffusion.log_onehot(truth), diffusion.log_onehot(c), t, s)
        c = diffusion.sample(log_p, draw)
    assert torch.equal(c, truth)


def chain(diffusion: MultinomialDiffusion, prior: torch.Tensor, steps: int, rule: str) -> torch.Tensor:
    """Exact distribution (K,) of what S steps produce with the Bayes-optimal denoiser of `prior`."""
    k = diffusion.num_classes
    log_x_t = diffusion.log_onehot(torch.arange(k)[:, None])  # every c_t at once: (K, K, 1)
    mass = torch.full((k,), 1 / k, dtype=torch.float64)
    for t, s in strided(steps, diffusion.timesteps):
        log_p0 = normalise(prior.log()[None, :, None] + diffusion.q_pred(log_x_t, t))
        mass = mass @ getattr(diffusion, rule)(log_p0, log_x_t, t, s).exp()[..., 0].double()
    return mass


def test_only_the_mixture_reproduces_a_soft_prediction():
    prior = torch.randn(200, generator=generator()).mul(2).softmax(0)
    diffusion = MultinomialDiffusion(200)
    distance = {rule: 0.5 * (chain(diffusion, prior, 20, rule) - prior).abs().sum().item()
                for rule in ("posterior", "posterior_mixture")}  # fmt: skip
    assert distance["posterior_mixture"] < 0.01
    assert distance["posterior"] > 0.2


def test_float32_log_space_is_as_good_as_float64_at_a_thousand_steps():
    diffusion = MultinomialDiffusion(6736)
    t, s = torch.tensor([999, 999, 500, 3, 950]), torch.tensor([998, 949, 480, 1, -1])
    alpha_bar = F.pad(diffusion.alpha_bar, (1, 0), value=1.0)
    keep_s, keep = alpha_bar[s + 1], alpha_bar[t + 1] / alpha_bar[s + 1]
    same = (keep_s + (1 - keep_s) / 6736) * (keep + (1 - keep) / 6736)  # c_s = c_0 = c_t, float64
    other = ((1 - keep_s) / 6736) * ((1 - keep) / 6736)
    expected = same / (same + 6735 * other)
    one = diffusion.log_onehot(torch.zeros(5, 1, dtype=torch.long))
    actual = diffusion.posterior(one, one, t, s).exp()[:, 0, 0]
    torch.testing.assert_close(actual.double(), expected, atol=2e-6, rtol=0)


# --- the denoiser ---


@pytest.fixture
def net() -> TDM:
    torch.manual_seed(0)
    return TDM(SMALL, torch.randint(0, 2, (13, 24, 24), dtype=torch.uint8)).eval()


def look(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 6, 2, 10, generator=generator(3)), torch.randn(batch, 3, 4, 10, generator=generator(4))


def test_shapes_where_batch_classes_and_length_differ(net):
    c_t = torch.randint(13, (3, 7))
    context = net.context(*look(), torch.randn(3, 10, 32))
    assert context.shape == (3, 10, 32)
    logits = net(c_t, torch.tensor([0, 20, 49]), context)
    assert logits.shape == (3, 13, 7)
    reading = Reading.of(c_t)
    c_s, log_p0 = net.denoise(c_t, torch.full((3,), 20), 9, context=context, reading=reading, generator=generator())
    assert c_s.shape == (3, 7) and log_p0.shape == (3, 13, 7)
    believed = top_reading(log_p0, reading, k=4)
    assert believed.tokens.shape == believed.probs.shape == (3, 7, 4)
    assert torch.equal(believed.best, log_p0.argmax(1))
    assert (believed.centers[believed.best == PAD] == -1).all()


def test_everything_it_is_given_matters(net):
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    c_t, t, features, z_lr = torch.full((1, 7), 4), torch.tensor([20]), *(x[:1] for x in look(1))
    reading = Reading.of(torch.full((1, 7), 5), prob=0.7)
    base = net(c_t, t, net.context(features, z_lr), reading)
    changed = [
        net(c_t + 1, t, net.context(features, z_lr), reading),
        net(c_t, t + 1, net.context(features, z_lr), reading),
        net(c_t, t, net.context(features + 1, z_lr), reading),
        net(c_t, t, net.context(features, z_lr.flip(1)), reading),
        net(c_t, t, net.context(features, z_lr, torch.ones(1, 10, 32)), reading),
        net(c_t, t, net.context(features, z_lr)),
        net(c_t, t, net.context(features, z_lr), Reading.of(torch.full((1, 7), 5), prob=0.6)),
        net(c_t, t, net.context(features, z_lr), Reading(reading.tokens, reading.probs, reading.centers.flip(1))),
    ]
    assert all((logits - base).abs().max() > 1e-4 for logits in changed)


def test_an_image_moved_by_one_column_moves_the_tokens_by_one(net):
    features, z_lr = look(1)
    columns, moved = net.columns(features, z_lr), net.columns(features.roll(1, -1), z_lr.roll(1, -1))
    torch.testing.assert_close(columns.roll(1, 1), moved)


def test_it_starts_by_repeating_what_was_read(net):
    truth = torch.randint(2, 13, (8, 7), generator=generator())
    features, z_lr = (x.expand(8, -1, -1, -1) for x in look(1))
    unsure = Reading.of(truth, prob=1.0)
    logits = net(truth, torch.full((8,), 25), net.context(features, z_lr), unsure)
    assert (logits.argmax(1) == truth).float().mean() > 0.6  # by chance 0.08


def test_two_witnesses_multiply(net):
    """Without its own opinion the network says what the reader says; its trust is a factor on the reader's logits."""
    look_at = look(1)
    reading = Reading(torch.tensor([[[4, 7]] * 7]), torch.tensor([[[0.6, 0.3]] * 7]), torch.full((1, 7), 0.5))
    torch.testing.assert_close(log_reading(reading, 13).exp().sum(1), torch.ones(1, 7))
    assert log_reading(reading, 13).exp()[0, :, 0].tolist() == pytest.approx(
        [0.6 + 0.1 / 13 if k == 4 else 0.3 + 0.1 / 13 if k == 7 else 0.1 / 13 for k in range(13)], abs=1e-6
    )
    c_t, t = torch.full((1, 7), 5), torch.tensor([40])
    answers = []
    for trust in (0.0, 1.0, 2.0):
        with torch.no_grad():
            net.trust.fill_(trust)
            answers.append(net(c_t, t, net.context(*look_at), reading))
    torch.testing.assert_close(answers[1] - answers[0], log_reading(reading, 13))
    torch.testing.assert_close(answers[2] - answers[1], log_reading(reading, 13), atol=1e-5, rtol=1e-5)


class World(nn.Module):
    """What a stage needs of a model, with a reader that misreads a third of the characters."""

    def __init__(self, net: TDM):
        super().__init__()
        self.tdm, self.other = net, nn.BatchNorm1d(3)
        self.vae = self.recognizer = None  # never asked: the batches bring everything along


def lines(batch: int, seed: int) -> dict:
    draw = generator(seed)
    tokens = torch.randint(2, 13, (batch, 7), generator=draw)
    wrong = torch.rand(batch, 7, generator=draw) < 0.33
    read = torch.where(wrong, torch.randint(2, 13, (batch, 7), generator=draw), tokens)
    code = torch.randn(13, 6, generator=generator(99))
    features = F.pad(code[tokens], (0, 0, 0, 3)).mT[:, :, None] + 0.1 * torch.randn(batch, 6, 1, 10, generator=draw)
    reading = Reading.of(read, (torch.arange(7) + 0.5).expand(batch, -1) / 10, prob=0.6)
    reading.features = features
    z = torch.zeros(batch, 3, 4, 10)
    return {"tokens": tokens, "centers": reading.centers, "reading": reading, "z_lr": z, "z_hr": z}


@pytest.mark.parametrize("loss", ["cross_entropy", "bound"])
def test_the_stage_learns_to_read_better_than_the_reader(net, loss):
    stage = TDMStage(TDMTraining(learning_rate=3e-3, loss=loss), model := World(net.train()))
    optimizer, draw = stage.optimizers(model)["tdm"], generator(5)
    assert not model.other.training and not model.other.weight.requires_grad
    history = []
    for step in range(120):
        ((value, name, logs),) = stage.losses(model, lines(32, step), draw)
        assert name == "tdm" and value.isfinite()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        stage.step_done()
        history.append(value.item())
    assert sum(history[-10:]) < 0.7 * sum(history[:10])
    assert {"accuracy_low_t", "accuracy_mid_t", "accuracy_high_t", "accuracy_reader"} <= set(logs)
    assert logs["accuracy_high_t"] > logs["accuracy_reader"]
    assert stage.importance.count.sum() == (120 * 32 if loss == "bound" else 0)
    assert ("bound_by_t" in stage.summary()) == (loss == "bound")


def test_looking_without_gradients_teaches_the_importance_sampler_nothing(net):
    stage = TDMStage(TDMTraining(loss="bound"), model := World(net))
    with torch.no_grad():
        list(stage.losses(model, lines(8, 0), generator(1)))
    stage.step_done()
    assert stage.importance.count.sum() == 0
    list(stage.losses(model, lines(8, 0), generator(1)))
    assert stage.importance.count.sum() == 0 and len(stage.seen) == 1  # shares of a step are learned together
    stage.step_done()
    assert stage.importance.count.sum() == 8 and not stage.seen


def test_the_typical_bound_term_is_not_pulled_to_zero_by_few_draws():
    importance = ImportanceSampler(5)
    for _ in range(3):
        importance.update(torch.tensor([1, 4]), torch.tensor([2.0, 3.0]))
    typical = importance.typical()
    assert torch.allclose(typical[[1, 4]], torch.tensor([2.0, 3.0]))
    assert typical[0].isnan()


def test_importance_sampling_prefers_what_is_hard_and_says_how_often():
    importance = ImportanceSampler(5)
    t, p = importance.draw(8, generator())
    assert torch.equal(p, torch.full((8,), 0.2))
    for _ in range(11):
        importance.update(torch.arange(5), torch.tensor([9.0, 1.0, 1.0, 1.0, 7.0]))
    t, p = importance.draw(4000, generator())
    share = torch.bincount(t, minlength=5) / 4000
    torch.testing.assert_close(share, importance.probabilities(), atol=0.03, rtol=0)
    assert share[4] > 0.5 and abs(share[0] - share[1]) < 0.05
    assert torch.equal(p, importance.probabilities()[t])


def test_the_same_seed_gives_the_same_text(net):
    c_t, context = torch.randint(13, (3, 7), generator=generator()), net.context(*look())
    first, again, other = (net.denoise(c_t, torch.full((3,), 40), 20, context=context, generator=generator(seed))[0]
                           for seed in (1, 1, 2))  # fmt: skip
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_log_one_hot_sums_to_one():
    log_x = log_one_hot(torch.tensor([[3, 0]]), 4)
    assert log_x.shape == (1, 4, 2) and torch.equal(log_x.exp().argmax(1), torch.tensor([[3, 0]]))
    torch.testing.assert_close(log_x.exp().sum(1), torch.ones(1, 2))
