"""The embedded models against brute force, against autograd, and against what their metadata says."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep import Denoiser, sample
from fewstep.eval import digits, formulas
from fewstep.eval.eval_model import EvalModel, initial_noise
from fewstep.eval.models import MODELS, load_model
from fewstep.eval.networks import NULL_CLASS, TRAIN_STEPS, DigitsUNet, log_levels
from fewstep.schedules import VP

TIMES = torch.tensor([0.0, 3.5, 120.0, 400.25, 700.0, 999.0], dtype=torch.float64)

EPSILON_LOSS_BOUND = 0.075
"""Held-out (eps_hat - eps)^2 of the U-Net with labels; the model card has what was measured."""


def states(model: EvalModel, times: torch.Tensor = TIMES) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy references at ``times`` in float64, with alpha and sigma in the shape of x."""
    assert model.reference is not None
    x0 = model.reference(range(len(times))).double()
    view = (-1,) + (1,) * (x0.ndim - 1)
    alpha, sigma = (torch.from_numpy(a).view(view) for a in model.noise_schedule.alpha_sigma(times.numpy()))
    return alpha * x0 + sigma * model.noise(range(len(times)), seed=7).double(), alpha, sigma


def smoothed_log_density(
    x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, centres: torch.Tensor, h: float
) -> torch.Tensor:
    """log p_t(x) up to a constant, straight from the definition: x (B, D), centres (K, D) -> (B,)."""
    variance = (alpha * h) ** 2 + sigma**2
    distance = ((x[:, None] - alpha[:, :, None] * centres) ** 2).sum(-1)
    return torch.logsumexp(-distance / (2 * variance), 1) - 0.5 * x.shape[1] * variance[:, 0].log()


def training_images(label: int | None = None) -> torch.Tensor:
    data = digits.digits()
    images, labels = data.images[data.train], data.labels[data.train]
    return (images if label is None else images[labels == label]).flatten(1).double()


# -- digits-exact ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("h", [0.05, 0.15, 0.4])
def test_exact_denoiser_is_the_posterior_mean(h: float) -> None:
    model = load_model(f"builtin:digits-exact:bandwidth={h}")
    x, alpha, sigma = states(model)
    centres = training_images()
    denoised = model.denoiser(range(len(x))).fn(x, TIMES)
    for j in range(len(x)):
        a, s = alpha[j].item(), sigma[j].item()
        variance = (a * h) ** 2 + s**2
        log_weight = [-float(((x[j].flatten() - a * c) ** 2).sum()) / (2 * variance) for c in centres]
        weight = np.exp(np.array(log_weight) - max(log_weight))
        posterior = centres + a * h**2 / variance * (x[j].flatten() - a * centres)
        expected = (torch.from_numpy(weight / weight.sum())[:, None] * posterior).sum(0)
        torch.testing.assert_close(denoised[j].flatten(), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("label", [None, 4])
def test_exact_epsilon_is_the_score(label: int | None) -> None:
    """eps = -sigma grad log p_t, and eps = (x - alpha E[x0 | x]) / sigma."""
    model = load_model("builtin:digits-exact:conditional=true")
    x, alpha, sigma = states(model)
    denoiser = model.denoiser([label or 0] * len(x))
    network = denoiser.unconditional if label is None else denoiser.fn
    assert network is not None
    epsilon = (x - alpha * network(x, TIMES)) / sigma
    flat = x.flatten(1).requires_grad_()
    log_p = smoothed_log_density(flat, alpha.flatten(1), sigma.flatten(1), training_images(label), 0.15)
    (score,) = torch.autograd.grad(log_p.sum(), flat)
    torch.testing.assert_close(epsilon.flatten(1), -sigma.flatten(1) * score, rtol=1e-6, atol=1e-8)


def test_exact_denoiser_in_float32_is_near_float64() -> None:
    model = load_model("builtin:digits-exact")
    x, _, _ = states(model, torch.linspace(0, 999, 200, dtype=torch.float64))
    t = torch.linspace(0, 999, 200, dtype=torch.float64)
    network = model.denoiser(range(200)).fn
    single, double = network(x.float(), t.float()), network(x.float().double(), t.float())
    assert single.dtype == torch.float32
    assert (single - double).abs().max() < 2e-4
    assert (single - double).square().mean().sqrt() < 1e-5


def test_labels_mask_the_centres() -> None:
    """Every class alone, and the classes together give back the whole."""
    model = load_model("builtin:digits-exact:conditional=true")
    t = torch.full((10,), 500.0, dtype=torch.float64)
    x = model.noise(range(1)).double().expand(10, 1, 8, 8)
    each = model.denoiser(range(10)).fn(x, t)
    assert model.labels is not None
    assert model.labels(range(8, 12)).tolist() == [8, 9, 0, 1]
    alpha, sigma = (
        torch.full((1, 1), float(a), dtype=torch.float64) for a in model.noise_schedule.alpha_sigma(500.0)
    )
    weights = torch.stack(
        [smoothed_log_density(x[:1].flatten(1), alpha, sigma, training_images(c), 0.15) for c in range(10)]
    )
    whole = load_model("builtin:digits-exact").denoiser([0]).fn(x[:1], t[:1])
    mixed = (torch.softmax(weights[:, 0], 0)[:, None, None, None] * each).sum(0)
    torch.testing.assert_close(mixed, whole[0], rtol=1e-9, atol=1e-10)
    at_rest = model.denoiser([3]).fn(torch.zeros(1, 1, 8, 8).double(), torch.tensor([999.0]))
    nearest = [(at_rest.flatten() - training_images(c).mean(0)).norm().item() for c in range(10)]
    assert int(np.argmin(nearest)) == 3


def test_exact_references_come_from_the_data_distribution() -> None:
    model = load_model("builtin:digits-exact")
    assert model.reference is not None and model.truth_is_exact
    x, centres = model.reference(range(3000)).flatten(1).double(), training_images()
    assert torch.equal(model.reference([5, 17]), model.reference(range(20))[[5, 17]])
    torch.testing.assert_close(x.mean(0), centres.mean(0), rtol=0, atol=0.07)
    residual = torch.cdist(x, centres).min(1).values.square().mean() / 64
    assert residual.sqrt() == pytest.approx(0.15, rel=0.02)
    labels = digits.digits().labels[digits.digits().train]
    conditional = load_model("builtin:digits-exact:conditional=true").reference
    assert conditional is not None
    nearest = torch.cdist(conditional(range(200)).flatten(1).double(), centres).argmin(1)
    assert torch.equal(labels[nearest], torch.arange(200) % 10)


def test_a_converged_run_lands_on_the_data() -> None:
    """The flow transports noise to the blurred images: each sample is within the blur of a training image."""
    model = load_model("builtin:digits-exact")
    x = sample(model.denoiser(range(40)), model.noise(range(40)), "dpmpp_2m", 60, "log_snr")
    spread = torch.cdist(x.flatten(1).double(), training_images()).min(1).values / 8
    assert spread.mean() == pytest.approx(0.15, rel=0.05)


# -- gmm -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["vp", "edm", "flow"])
def test_mixture_denoiser_against_autograd(noise: str) -> None:
    """Tweedie: E[x0 | x] = (x + sigma^2 grad log p_t(x)) / alpha, with p_t from torch.distributions."""
    model = load_model(f"builtin:gmm:noise={noise}")
    mixture = model.denoiser([0]).fn
    assert isinstance(mixture, formulas.MixtureDenoiser)
    levels = model.noise_schedule.level_at_ratio(np.array([0.01, 0.3, 1.0, 4.0, 60.0]))
    times = torch.from_numpy(model.noise_schedule.time(levels))
    x, alpha, sigma = states(model, times)
    x.requires_grad_()
    deviation = (alpha[:, None] ** 2 * mixture.variances + sigma[:, None] ** 2).sqrt()
    modes = torch.distributions.Independent(
        torch.distributions.Normal(alpha[:, None] * mixture.means, deviation), 1
    )
    weights = torch.distributions.Categorical(mixture.weights.expand(len(times), -1))
    log_p = torch.distributions.MixtureSameFamily(weights, modes).log_prob(x).sum()
    (score,) = torch.autograd.grad(log_p, x)
    expected = (x + sigma**2 * score) / alpha
    torch.testing.assert_close(mixture(x, times), expected, rtol=1e-8, atol=1e-9)


def test_mixture_limits() -> None:
    """No noise: the state itself. No signal: the mean of the data. Neither is a division by zero."""
    model = load_model("builtin:gmm:noise=flow")
    mixture = model.denoiser([0]).fn
    assert isinstance(mixture, formulas.MixtureDenoiser)
    x = model.noise(range(3))
    torch.testing.assert_close(mixture(x, torch.zeros(3)), x)
    mean = mixture.weights @ mixture.means
    torch.testing.assert_close(mixture(x, torch.ones(3)), mean.expand(3, -1))


def test_mixture_references_have_its_moments() -> None:
    model = load_model("builtin:gmm")
    mixture = model.denoiser([0]).fn
    assert isinstance(mixture, formulas.MixtureDenoiser) and model.reference is not None
    x = model.reference(range(6000))
    mean = mixture.weights @ mixture.means
    variance = mixture.weights @ (mixture.variances + mixture.means**2) - mean**2
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.04)
    torch.testing.assert_close(x.var(0), variance, rtol=0.08, atol=0)


# -- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits-exact", "digits-unet", "gmm"])
def test_noise_does_not_depend_on_batches(name: str) -> None:
    model = load_model(f"builtin:{name}")
    whole = model.noise(range(12), seed=3)
    assert whole.shape == (12, *model.shape) and whole.dtype == model.dtype
    parts = torch.cat([model.noise([0], 3), model.noise(range(1, 8), 3), model.noise([8, 9, 10, 11], 3)])
    assert torch.equal(whole, parts)
    assert torch.equal(model.noise([7, 2], 3), whole[[7, 2]])
    assert torch.equal(model.noise([5], 5), model.noise([7], 3))
    assert not torch.equal(whole[0], whole[1])


def test_noise_is_standard_normal_and_not_the_references() -> None:
    noise = initial_noise(range(2000), (64,))
    assert noise.mean().abs() < 0.02 and noise.var() == pytest.approx(1, abs=0.02)
    model = load_model("builtin:digits-exact")
    assert model.reference is not None
    reference = model.reference(range(2000)).flatten(1)
    centred = reference - reference.mean(0)
    assert (centred / centred.std() * noise).mean().abs() < 0.02


# -- data and weights ------------------------------------------------------------------------------------------------


def test_data_is_complete_and_split() -> None:
    data = digits.digits()
    assert data.images.shape == (1797, 1, 8, 8) and len(data.train) == 1400 and len(data.held_out) == 397
    assert sorted([*data.train.tolist(), *data.held_out.tolist()]) == list(range(1797))
    assert torch.equal((data.images + 1) * 8, ((data.images + 1) * 8).round())
    assert data.images.min() == -1 and data.images.max() == 1
    assert data.labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


@pytest.mark.parametrize("file", ["digits-unet.safetensors", "digits-features.safetensors"])
def test_weights_name_the_data_they_were_trained_on(file: str) -> None:
    metadata = digits.metadata(file)
    data = digits.DATA / metadata["data"]
    assert metadata["data_sha256"] == hashlib.sha256(data.read_bytes()).hexdigest()
    assert metadata["seed"] == 0 and metadata["recipe"]["steps"] > 0


def test_package_data_is_small_and_licensed() -> None:
    files = [
        digits.DATA / f
        for f in ("digits.npz", "digits-unet.safetensors", "digits-features.safetensors", "NOTICE")
    ]
    assert sum(f.stat().st_size for f in files) < 1_000_000
    notice = files[-1].read_text(encoding="utf-8")
    for words in ("Creative Commons Attribution 4.0", "BSD 3-Clause", "digits.npz", "Apache-2.0"):
        assert words in notice


def test_classifier_knows_held_out_digits() -> None:
    data, network = digits.digits(), digits.feature_network()
    right = network.logits(data.images[data.held_out]).argmax(1) == data.labels[data.held_out]
    assert right.double().mean().item() >= 0.97
    recorded = digits.metadata("digits-features.safetensors")["accuracy_held_out"]
    assert right.double().mean().item() == pytest.approx(recorded, abs=0.006)
    features = network.features(data.images[:70])
    assert features.shape == (70, network.dimension) and features.isfinite().all()
    file = digits.DATA / "digits-features.safetensors"
    assert network.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_unet_predicts_the_noise_of_held_out_digits() -> None:
    data, network = digits.digits(), digits.digits_network()
    generator = torch.Generator().manual_seed(0)
    i = data.held_out.repeat(2)
    t = (torch.randperm(len(i), generator=generator) + 0.5) / len(i) * (TRAIN_STEPS - 1)
    eps = torch.randn((len(i), 1, 8, 8), generator=generator)
    alpha, sigma = (torch.from_numpy(a).float().view(-1, 1, 1, 1) for a in VP.linear().alpha_sigma(t.numpy()))
    with torch.inference_mode():
        predicted = network(alpha * data.images[i] + sigma * eps, t, data.labels[i])
        blind = network(alpha * data.images[i] + sigma * eps, t, torch.full((len(i),), NULL_CLASS))
    loss, blind_loss = ((p - eps).square().mean().item() for p in (predicted, blind))
    assert loss < EPSILON_LOSS_BOUND
    assert loss < blind_loss  # the label helps


def test_unet_knows_the_library_s_noise_schedule() -> None:
    """The level it computes at fractional t is the one the solver means."""
    t = torch.tensor([0.0, 0.4, 17.3, 500.5, 998.9, 999.0])
    expected = np.log(VP.linear().level(t.double().numpy()))
    np.testing.assert_allclose(DigitsUNet().level(t).numpy(), expected, rtol=0, atol=2e-5)
    np.testing.assert_allclose(log_levels().numpy(), np.log(VP.linear().train_levels), rtol=0, atol=1e-11)


def test_unet_does_not_depend_on_batches() -> None:
    model = load_model("builtin:digits-unet")
    x, t = model.noise(range(150)), torch.linspace(0, 999, 150)
    whole = model.denoiser(range(150)).fn(x, t)
    torch.testing.assert_close(
        model.denoiser(range(90, 100)).fn(x[90:100], t[90:100]), whole[90:100], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("name", ["digits-exact", "digits-unet", "gmm"])
def test_gradients_after_a_first_call_in_inference_mode(name: str) -> None:
    """What the first call keeps must serve a later one that needs gradients."""
    digits.digits_network.cache_clear()
    with torch.inference_mode():
        model = load_model(f"builtin:{name}")
        denoiser = model.denoiser([0, 1])
        denoiser.fn(model.noise([0, 1]), torch.full((2,), 300.0))
    x = model.noise([0, 1]).requires_grad_()
    denoiser.fn(x, torch.full((2,), 300.0)).sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0


def test_guided_samples_are_the_digit_that_was_asked_for() -> None:
    model = load_model("builtin:digits-unet")
    assert model.labels is not None and model.reference is not None and model.guided
    indices = range(50)
    denoiser = model.denoiser(indices)
    with torch.inference_mode():
        x = sample(denoiser, model.noise(indices), "dpmpp_2m", 10, "log_snr", guidance=2.0)
    assert denoiser.nfe == 50 * 10 * 2
    labels = model.labels(indices)
    network = digits.feature_network()
    assert (network.logits(x).argmax(1) == labels).double().mean() >= 0.96
    assert (network.logits(model.reference(indices)).argmax(1) == labels).double().mean() >= 0.96


def test_unet_references_are_all_different() -> None:
    model = load_model("builtin:digits-unet")
    assert model.reference is not None and model.reference_size is not None and model.reference_size >= 1700
    images = model.reference(range(model.reference_size)).flatten(1)
    assert len(images.unique(dim=0)) >= len(images) - 5  # the data set itself may hold an image twice
    held_out = digits.digits().images[digits.digits().held_out].flatten(1)
    assert torch.cdist(model.reference(range(200)).flatten(1), held_out).min(1).values.max() == 0


# -- names -----------------------------------------------------------------------------------------------------------


def test_every_model_describes_itself_and_can_be_sampled() -> None:
    for key in MODELS:
        model = load_model(f"builtin:{key}")
        assert model.name == f"builtin:{key}" and model.description.endswith(".") and model.licence
        assert isinstance(model.denoiser([0]), Denoiser)
        x = sample(model.denoiser(range(3)), model.noise(range(3)), steps=4)
        assert x.isfinite().all() and x.dtype == model.dtype


def test_options_are_part_of_the_name() -> None:
    model = load_model("builtin:digits-exact:bandwidth=0.2")
    assert model.name == "builtin:digits-exact:bandwidth=0.2"
    assert model.fingerprint != load_model("builtin:digits-exact").fingerprint
    assert load_model("builtin:digits-exact:bandwidth=0.15").name == "builtin:digits-exact"
    assert (
        not load_model("builtin:digits-exact").guided
        and load_model("builtin:digits-exact:conditional=yes").guided
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("builtin:digit-exact", ["digit-exact", "builtin:digits-unet", "did you mean 'digits-exact'"]),
        ("digits-unet", ["builtin:digits-unet", "module:callable", "did you mean"]),
        ("some/folder", ["some/folder", "builtin:gmm", "module:callable"]),
        ("builtin:digits-exact:bandwith=0.1", ["bandwith", "bandwidth", "did you mean"]),
        ("builtin:digits-exact:bandwidth=0", ["bandwidth", "positive"]),
        ("builtin:digits-exact:bandwidth=wide", ["bandwidth", "wide", "number"]),
        ("builtin:gmm:noise=ve", ["noise", "vp", "edm", "flow"]),
        ("no_such_module:make", ["no_such_module"]),
        ("math:sine", ["math", "sine", "did you mean 'sin"]),
        ("math:gcd", ["Denoiser", "int"]),
    ],
)
def test_a_wrong_name_says_what_is_allowed(name: str, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        load_model(name)
    for word in words:
        assert word in str(error.value)


def test_bandwidth_that_is_not_finite() -> None:
    with pytest.raises(ValueError, match="bandwidth"):
        digits.digits_exact(bandwidth=math.inf)


def test_another_batch_than_the_labels() -> None:
    denoiser = load_model("builtin:digits-unet").denoiser(range(4))
    with pytest.raises(ValueError, match="4 sample indices, x has 5"):
        denoiser.fn(torch.zeros(5, 1, 8, 8), torch.zeros(5))
    with pytest.raises(ValueError, match="no feature network 'inception'"):
        digits.feature_network("inception")


def test_a_model_of_one_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_model.py").write_text(
        "import fewstep as fs\n"
        "def make():\n    return fs.Denoiser(lambda x, t: 0 * x, fs.schedules.EDM(), 'denoised', shape=(3,))\n"
        "def shapeless():\n    return fs.Denoiser(lambda x, t: x, fs.schedules.EDM(), 'denoised')\n"
        "def described():\n    from fewstep.eval.models import load_model\n    return load_model('builtin:gmm')\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    model = load_model("my_own_model:make")
    assert model.shape == (3,) and not model.guided and model.reference is None
    first, second = model.denoiser(range(2)), model.denoiser(range(2))
    x = sample(first, 80 * model.noise(range(2)), steps=3)
    assert torch.equal(x, torch.zeros(2, 3)) and first.nfe == 6 and second.nfe == 0
    assert load_model("my_own_model:described").name == "builtin:gmm"
    with pytest.raises(ValueError, match="shape"):
        load_model("my_own_model:shapeless")
