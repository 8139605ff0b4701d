"""Frechet distance and precision and recall against their definitions, and the file they are computed from."""

import gc
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.evaluation.metrics import (
    FeatureStatistics,
    frechet_distance,
    frechet_error,
    frechet_slope_error,
    kernel_distance,
)


def gaussian(mean: Any, covariance: Any) -> FeatureStatistics:
    return FeatureStatistics(torch.as_tensor(mean).double(), torch.as_tensor(covariance).double(), 10)


def random_features(rows: int, features: int, seed: int) -> Tensor:
    """Correlated features of very different scales, as networks give them."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    mixed = mixed @ torch.randn(features, features, generator=generator, dtype=torch.float64)
    return mixed * torch.logspace(-2, 1, features, dtype=torch.float64) + torch.rand(features, generator=generator) * 3


def distance_by_definition(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) with scipy's matrix root."""
    root = scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy())
    mean = ((a.mean - b.mean) ** 2).sum().item()
    return mean + float(np.trace(a.covariance.numpy() + b.covariance.numpy() - 2 * np.real(root)))


# --- Statistics


def test_statistics_of_features() -> None:
    features = random_features(50, 6, seed=0)
    found = FeatureStatistics.of(features.float())
    assert (found.mean.dtype, found.covariance.dtype, found.num_images) == (torch.float64, torch.float64, 50)
    wide = features.float().double().numpy()
    np.testing.assert_allclose(found.mean.numpy(), wide.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance.numpy(), np.cov(wide, rowvar=False), rtol=1e-10)


def test_statistics_are_summed_in_float64() -> None:
    """In float32 the mean of many large values would be off."""
    features = torch.full((100_000, 2), 1000.1)
    features[::2] += 0.5
    expected = float(features[0, 0].double() + features[1, 0].double()) / 2
    assert FeatureStatistics.of(features).mean.tolist() == pytest.approx([expected] * 2, rel=1e-12)


# --- Frechet distance


@pytest.mark.parametrize("features", [1, 2, 7, 32, 100])
def test_agrees_with_the_definition(features: int) -> None:
    a = FeatureStatistics.of(random_features(4 * features + 10, features, seed=1))
    b = FeatureStatistics.of(random_features(5 * features + 10, features, seed=2))
    a, b = (gaussian(s.mean, s.covariance.reshape(features, features)) for s in (a, b))
    assert frechet_distance(a, b) == pytest.approx(distance_by_definition(a, b), rel=1e-6)


@pytest.mark.parametrize("rows", [3, 10, 20])
def test_agrees_with_the_exact_value_for_few_images(rows: int) -> None:
    """Fewer images than features: the covariances are singular, as for 2,048 features of 1,000 images.

    With S = X^T X / (n - 1) the trace of the root is the sum of the singular values of X Y^T, without any root.
    """
    x, y = random_features(rows, 24, seed=3), random_features(rows + 2, 24, seed=4)
    a, b = FeatureStatistics.of(x), FeatureStatistics.of(y)
    centred_x, centred_y = (x - x.mean(0)) / (rows - 1) ** 0.5, (y - y.mean(0)) / (rows + 1) ** 0.5
    root = torch.linalg.svdvals(centred_x @ centred_y.T).sum()
    traces = (centred_x**2).sum() + (centred_y**2).sum()
    expected = float(((x.mean(0) - y.mean(0)) ** 2).sum() + traces - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_agrees_with_the_exact_value_where_sets_are_nearly_alike() -> None:
    """A distance far below the variances must not drown in rounding."""
    x = random_features(200, 64, seed=5)
    a, b = FeatureStatistics.of(x), FeatureStatistics.of(x * 1.001)
    spread = float(a.covariance.trace())
    expected = float((0.001 * a.mean).square().sum()) + spread * (1 + 1.001**2 - 2 * 1.001)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_diagonal_gaussians_in_closed_form() -> None:
    """sum (m - n)^2 + (s - t)^2 for standard deviations s, t."""
    m, n, s, t = (
        torch.rand(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in range(4)
    )
    expected = float(((m - n) ** 2 + (s - t) ** 2).sum())
    assert frechet_distance(gaussian(m, (s**2).diag()), gaussian(n, (t**2).diag())) == pytest.approx(expected, rel=1e-9)


def test_one_feature_in_closed_form() -> None:
    assert frechet_distance(gaussian([1.0], [[4.0]]), gaussian([4.0], [[25.0]])) == pytest.approx(9 + 9)


def test_points_are_as_far_apart_as_their_means() -> None:
    zero = torch.zeros(3, 3)
    assert frechet_distance(gaussian([0.0, 0, 0], zero), gaussian([1.0, 2, 2], zero)) == pytest.approx(9)


@pytest.mark.parametrize("rows", [10, 200])
def test_is_symmetric(rows: int) -> None:
    a = FeatureStatistics.of(random_features(rows, 20, seed=5))
    b = FeatureStatistics.of(random_features(rows, 20, seed=6))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)


@pytest.mark.parametrize("rows", [10, 200])
def test_is_zero_for_identical_sets(rows: int) -> None:
    a = FeatureStatistics.of(random_features(rows, 20, seed=7))
    assert abs(frechet_distance(a, a)) < 1e-6 * float(a.covariance.trace())


def test_grows_with_the_shift() -> None:
    """Moving every feature by d adds exactly 20 d^2."""
    a = FeatureStatistics.of(random_features(100, 20, seed=8))
    for shift in (0.5, 2.0):
        moved = gaussian(a.mean + shift, a.covariance)
        assert frechet_distance(a, moved) == pytest.approx(20 * shift**2, rel=1e-6)


def test_statistics_of_different_networks() -> None:
    with pytest.raises(UserError, match="2 and 3 features: they come from different feature networks"):
        frechet_distance(gaussian(torch.zeros(2), torch.eye(2)), gaussian(torch.zeros(3), torch.eye(3)))


# --- The reference file


def test_npz_round_trip(tmp_path: Path) -> None:
    saved = FeatureStatistics.of(random_features(30, 8, seed=9))
    saved.save(tmp_path / "reference.npz")
    loaded = FeatureStatistics.load(tmp_path / "reference.npz")
    assert torch.equal(loaded.mean, saved.mean)
    assert torch.equal(loaded.covariance, saved.covariance)
    assert loaded.num_images == 30
    with np.load(tmp_path / "reference.npz", allow_pickle=False) as file:
        assert (file["mu"].shape, file["sigma"].shape, file["mu"].dtype) == ((8,), (8, 8), np.float64)


def test_reference_of_other_tools(tmp_path: Path) -> None:
    """Only mu and sigma, perhaps in float32; how many images there were is not known."""
    np.savez(tmp_path / "other.npz", mu=np.ones(2, np.float32), sigma=np.eye(2, dtype=np.float32))
    loaded = FeatureStatistics.load(tmp_path / "other.npz")
    assert (loaded.mean.dtype, loaded.covariance.dtype, loaded.num_images) == (torch.float64, torch.float64, 0)


def write_npz(**arrays: Any) -> Any:
    return lambda path: np.savez(path, **arrays)


def test_pickled_objects_are_refused_and_not_executed(tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Marker:
        def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
            return Path.touch, (marker,)

    pickle.loads(pickle.dumps(Marker()))
    assert marker.exists()  # the trap works
    marker.unlink()
    np.savez(tmp_path / "trap.npz", mu=np.array([Marker()], dtype=object), sigma=np.eye(1))
    (tmp_path / "trap.pkl").write_bytes(pickle.dumps(Marker()))
    for name in ("trap.npz", "trap.pkl"):
        with pytest.raises(UserError, match=rf"{name} is no feature reference \(\.npz with mu and sigma\)"):
            FeatureStatistics.load(tmp_path / name)
        assert not marker.exists()


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda path: None, id="missing"),
        pytest.param(lambda path: path.mkdir(), id="folder"),
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.write_text("mu, sigma\n1, 2\n"), id="text"),
        pytest.param(write_npz(mu=np.zeros(2)), id="without sigma"),
        pytest.param(write_npz(mean=np.zeros(2), cov=np.eye(2)), id="other names"),
    ],
)
def test_what_is_no_reference(tmp_path: Path, write: Any) -> None:
    path = tmp_path / "reference.npz"
    write(path)
    with pytest.raises(UserError, match=r"reference\.npz is no feature reference \(\.npz with mu and sigma\)"):
        FeatureStatistics.load(path)


def save_npy(path: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))


def truncated_npz(path: Path) -> None:
    np.savez(path, mu=np.zeros(200), sigma=np.eye(200))
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.slow
@pytest.mark.parametrize(
    "write",
    [
        pytest.param(truncated_npz, id="truncated"),
        pytest.param(save_npy, id="npy"),
        pytest.param(write_npz(mu=np.array(["a"]), sigma=np.eye(1)), id="words"),
    ],
)
def test_what_is_no_reference_either(tmp_path: Path, write: Any) -> None:
    path = tmp_path / "reference.npz"
    write(path)
    kind, message = "", ""
    try:
        FeatureStatistics.load(path)
    except Exception as error:
        kind, message = type(error).__name__, str(error)
    gc.collect()  # numpy forgets to close a file that it cannot read
    assert (kind, message[: len(str(path))]) == ("UserError", str(path))


@pytest.mark.parametrize(("mu", "sigma"), [((3,), (2, 2)), ((2,), (2, 3)), ((2, 2), (2, 2)), ((2,), (2,))])
def test_shapes_that_do_not_fit(tmp_path: Path, mu: tuple[int, ...], sigma: tuple[int, ...]) -> None:
    np.savez(tmp_path / "reference.npz", mu=np.zeros(mu), sigma=np.zeros(sigma))
    with pytest.raises(UserError, match="they do not fit"):
        FeatureStatistics.load(tmp_path / "reference.npz")


# --- KID


def kid_by_definition(real: np.ndarray, made: np.ndarray) -> float:
    """Unbiased squared MMD, pair by pair."""
    width = real.shape[1]

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / width + 1) ** 3)

    def within(rows: np.ndarray) -> float:
        pairs = [kernel(rows[i], rows[j]) for i in range(len(rows)) for j in range(len(rows)) if i != j]
        return sum(pairs) / len(pairs)

    across = sum(kernel(a, b) for a in real for b in made) / (len(real) * len(made))
    return within(real) + within(made) - 2 * across


def test_kid_is_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    real, made = (torch.randn(12, 5, generator=generator, dtype=torch.float64) + shift for shift in (0.0, 0.5))
    found, spread = kernel_distance(real, made)
    assert found == pytest.approx(kid_by_definition(real.numpy(), made.numpy()), rel=1e-10)
    assert spread is None  # too few for subsets


def test_kid_over_subsets_is_their_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    real, made = (torch.randn(count, 3, generator=generator, dtype=torch.float64) for count in (30, 24))
    draws = torch.Generator().manual_seed(0)
    for part in (real, made):
        torch.randint(len(part), (50, len(part)), generator=draws)  # those behind the error
    expected = []
    for _ in range(4):
        rows = [torch.randperm(len(part), generator=draws)[:7].numpy() for part in (real, made)]
        expected.append(kid_by_definition(real.numpy()[rows[0]], made.numpy()[rows[1]]))
    found, _ = kernel_distance(real, made, num_subsets=4, subset_size=7)
    assert found == pytest.approx(np.mean(expected), rel=1e-10)


def test_kid_is_unbiased_and_sees_a_shift() -> None:
    generator = torch.Generator().manual_seed(0)
    real, same = (torch.randn(400, 8, generator=generator) for _ in range(2))
    kid, error = kernel_distance(real, same)
    assert error is not None
    assert abs(kid) < 2 * error
    shifted, _ = kernel_distance(real, same + 0.5)
    assert shifted > 10 * abs(kid)
    assert kernel_distance(real, same) == (kid, error)  # repeats itself
    few, _ = kernel_distance(real[:60], same[:60] + 0.5, num_subsets=200)
    assert few == pytest.approx(shifted, rel=0.3)  # as a Frechet distance of 60 would not be
    with pytest.raises(UserError, match="KID needs at least 2 images, there are 1"):
        kernel_distance(real[:1], same)


@pytest.mark.slow
def test_the_error_of_kid_is_that_of_other_samples() -> None:
    """Against the spread over fresh samples of both distributions."""
    generator = torch.Generator().manual_seed(1)
    found = [
        kernel_distance(
            torch.randn(150, 4, generator=generator), torch.randn(150, 4, generator=generator) + 0.5, 10, 60
        )
        for _ in range(50)
    ]
    spread = float(torch.tensor([kid for kid, _ in found]).std())
    assert np.mean([error for _, error in found]) == pytest.approx(spread, rel=0.35)


@pytest.mark.slow
def test_kid_needs_no_torchvision() -> None:
    code = (
        "import sys, torch; from fewstep.evaluation.metrics import kernel_distance; "
        "kernel_distance(torch.zeros(3, 2), torch.ones(3, 2)); print('torchvision' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.split() == ["False"]


def test_the_error_of_the_distance_is_that_of_other_samples() -> None:
    """Against the spread over fresh samples of the same distribution."""
    reference = FeatureStatistics(torch.zeros(4).double(), torch.eye(4).double(), 0)
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randn(300, 4, generator=generator) * 1.3 + 0.4 for _ in range(60)]
    spread = float(torch.tensor([frechet_distance(FeatureStatistics.of(rows), reference) for rows in samples]).std())
    assert frechet_error(samples[0], reference, 60) == pytest.approx(spread, rel=0.4)


def test_the_error_to_first_order_is_that_of_resampling() -> None:
    """Its slope for each picture is what the distance moves by when that picture counts a little more."""
    reference = FeatureStatistics.of(random_features(300, 5, seed=3))
    features = random_features(200, 5, seed=4) + 0.5
    assert frechet_slope_error(features, reference) == pytest.approx(frechet_error(features, reference, 400), rel=0.1)
    slopes = []
    for row in range(len(features)):
        weights = torch.full((len(features),), 1 / len(features), dtype=torch.float64)
        step = 1e-6
        weights = weights * (1 - step)
        weights[row] += step
        mean = weights @ features
        covariance = (features - mean).T @ ((features - mean) * weights[:, None])
        unbiased = len(features) / (len(features) - 1)
        moved = frechet_distance(FeatureStatistics(mean, covariance * unbiased, 0), reference)
        slopes.append((moved - frechet_distance(FeatureStatistics.of(features), reference)) / step)
    error = float(torch.tensor(slopes).std(correction=0)) / len(features) ** 0.5
    assert frechet_slope_error(features, reference) == pytest.approx(error, rel=0.02)


def test_too_few_images_have_no_error_to_first_order() -> None:
    reference = FeatureStatistics.of(random_features(300, 5, seed=3))
    assert frechet_slope_error(random_features(9, 5, seed=4), reference) is None
    assert frechet_slope_error(random_features(10, 5, seed=4), reference) is not None


def test_a_matrix_that_is_no_covariance(tmp_path: Path) -> None:
    """With it distances below zero came out."""
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).double()
    good = torch.cov(features.T).numpy()
    for sigma in (np.triu(good) * 3, -np.eye(6), np.eye(6) * 0.1 + 1 - np.eye(6)):
        np.savez(tmp_path / "x.npz", mu=np.zeros(6), sigma=sigma)
        with pytest.raises(UserError, match="sigma is no covariance"):
            FeatureStatistics.load(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", mu=np.zeros(6), sigma=good.astype(np.float16))
    FeatureStatistics.load(tmp_path / "x.npz")
