"""Distances between two sets of pictures, computed on features in float64."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.formats.atomic import replaced_file
from fewstep.formats.bundled import resolve_path
from fewstep.formats.npz_file import read_npz


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean (F,) and covariance (F, F) of features, float64, and the number of samples behind them (0: unknown).

    Attributes:
        weights: SHA-256 of the feature network's weights, in hexadecimal digits; "": unknown, as in other tools' files.
    """

    mean: Tensor
    covariance: Tensor
    num_images: int
    weights: str = ""

    @classmethod
    def of(cls, features: Tensor) -> "FeatureStatistics":
        """Statistics of features (N, F), N >= 2; the covariance is the unbiased one, as FID tools use."""
        features = features.double()
        return cls(features.mean(0), torch.cov(features.T), len(features))

    def save(self, path: Path) -> None:
        """Write the .npz that FID tools share: `mu`, `sigma`, float64 (and `num_images`, and `weights` as bytes)."""
        arrays: dict[str, Any] = {
            "mu": self.mean.numpy(),
            "sigma": self.covariance.numpy(),
            "num_images": self.num_images,
        }
        if self.weights:
            arrays["weights"] = np.frombuffer(bytes.fromhex(self.weights), np.uint8)
        with replaced_file(path) as aside, open(aside, "wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> "FeatureStatistics":
        """Read an .npz with `mu` and `sigma` (or "bundled:..."); raises UserError when it is not one."""
        path = resolve_path(path)
        try:
            arrays = read_npz(path, ("mu", "sigma"), ("num_images", "weights"))
            mean, covariance = torch.from_numpy(arrays["mu"]), torch.from_numpy(arrays["sigma"])
            number = int(arrays["num_images"].item()) if "num_images" in arrays else 0
            if number < 0:
                raise ValueError(f"num_images is {number}")
            weights = arrays.get("weights", np.empty(0)).astype(np.uint8).tobytes().hex()
        except ValueError as error:
            raise UserError(f"{path} is no feature reference (.npz with mu and sigma): {error}") from None
        if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
            raise UserError(
                f"{path}: mu has shape {tuple(mean.shape)}, sigma {tuple(covariance.shape)}; they do not fit"
            )
        if not _is_covariance(covariance.double()):
            raise UserError(
                f"{path}: sigma is no covariance (not symmetric, or of a negative variance); write it again"
            )
        return cls(mean.double(), covariance.double(), number, weights)


def _is_covariance(matrix: Tensor) -> bool:
    """Whether a matrix can be one, to what half precision rounds: symmetric, and no entry above its two variances' root."""
    variances = matrix.diagonal()
    slack = 4e-3 * float(matrix.abs().max())
    if bool((variances < -slack).any()) or bool(((matrix - matrix.T).abs() > slack).any()):
        return False
    roots = variances.clamp_min(0).sqrt()
    return not bool((matrix.abs() > roots[:, None] * roots + slack).any())


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)): the Frechet distance of two Gaussians.

    Source: Heusel et al. 2017 (arXiv:1706.08500). The trace of the root is the sum of the singular values of
    S_a^(1/2) S_b^(1/2). The eigenvalues of S_a^(1/2) S_b S_a^(1/2) are their squares, and rounding in the largest
    of those drowns the small ones: for sets that are nearly alike the distance would be off in the third digit.

    Raises:
        UserError: the statistics have different numbers of features.
    """
    if len(a.mean) != len(b.mean):
        raise UserError(
            f"the statistics have {len(a.mean)} and {len(b.mean)} features: they come from different feature networks"
        )
    trace_of_root = torch.linalg.svdvals(_root(a.covariance) @ _root(b.covariance).T).sum()
    squared = ((a.mean - b.mean) ** 2).sum()
    return float(squared + a.covariance.trace() + b.covariance.trace() - 2 * trace_of_root)


def _root(covariance: Tensor) -> Tensor:
    """A matrix R with R^T R = covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    return values.clamp_min(0).sqrt()[:, None] * vectors.T


def frechet_error(features: Tensor, reference: FeatureStatistics, resamples: int) -> float:
    """Standard error of the Frechet distance of features (N, F), from `resamples` draws of N rows with repetition.

    It says how much other pictures of the same model would move the figure, not how far its bias is from zero.
    """
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(resamples):
        rows = torch.randint(len(features), (len(features),), generator=generator)
        found.append(frechet_distance(FeatureStatistics.of(features[rows]), reference))
    return float(torch.tensor(found, dtype=torch.float64).std())


def frechet_slope_error(features: Tensor, reference: FeatureStatistics) -> float | None:
    """The same error to first order, of features (N, F) of any width for the price of another distance.

    With T = R^T (R S R^T)^(-1/2) R for the reference's covariance R^T R and the features' S, a picture x moves the distance by

        2 (mu - mu_r).(x - mu) + (x - mu)^T (I - T) (x - mu)

    less the mean of that over all pictures, divided by N: what resampling comes to where the figure is large beside its
    error. Of sets that are nearly alike it says too little. Source: the derivative of the Frechet distance (Bures metric).

    Returns:
        None where there are not at least twice as many pictures as features, for which S has no trusty inverse.
    """
    if len(features) < 2 * features.shape[1]:
        return None
    own, features = FeatureStatistics.of(features), features.double()
    root = _root(reference.covariance)
    values, vectors = torch.linalg.eigh(root @ own.covariance @ root.T)
    slack = float(values.max()) * 1e-12
    inverse = torch.where(values > slack, values.clamp_min(slack) ** -0.5, 0.0)
    transport = root.T @ (vectors * inverse) @ vectors.T @ root
    apart = features - own.mean
    bend = (apart @ (torch.eye(len(own.mean), dtype=torch.float64) - transport) * apart).sum(1)
    pulls = 2 * apart @ (own.mean - reference.mean) + bend
    return float(pulls.std(correction=0)) / len(features) ** 0.5


def kernel_distance(
    real: Tensor, generated: Tensor, num_subsets: int = 50, subset_size: int = 1000, resamples: int = 50
) -> tuple[float, float | None]:
    """KID, the squared maximum mean discrepancy under (x.y / F + 1)^3, unbiased for any number of pictures.

    Source: Binkowski et al. 2018 (arXiv:1801.01401), by torchmetrics over our own features, in float64.

    Args:
        real, generated: features, (N, F) and (M, F), each with at least 2 rows.
        num_subsets, subset_size: the mean is over this many subsets; their size is at most half of the smaller set.
        resamples: draws of both sets with repetition behind the error; a picture that is drawn twice is not compared with itself.

    Returns:
        (mean, its standard error); None in place of the latter where the sets are too small for subsets.
    """
    from torchmetrics.image.kid import (  # imports much: only where KID is asked for
        maximum_mean_discrepancy,
        poly_kernel,
    )

    real, generated = real.double().cpu(), generated.double().cpu()
    smaller = min(len(real), len(generated))
    if smaller < 2:
        raise UserError(f"KID needs at least 2 images, there are {smaller}")
    size, num_subsets = (smaller, 1) if smaller < 20 else (min(subset_size, smaller // 2), num_subsets)
    generator = torch.Generator().manual_seed(0)
    counts = [_drawn_counts(len(part), resamples, generator) for part in (real, generated)]
    found, redrawn = [], []
    for _ in range(num_subsets):
        rows = [
            torch.arange(size) if smaller < 20 else torch.randperm(len(part), generator=generator)[:size]
            for part in (real, generated)
        ]
        x, y = real[rows[0]], generated[rows[1]]
        kernels = poly_kernel(x, x), poly_kernel(x, y), poly_kernel(y, y)
        found.append(maximum_mean_discrepancy(*kernels))
        redrawn.append(_weighted_discrepancy(*kernels, counts[0][:, rows[0]], counts[1][:, rows[1]]))
    error = None if smaller < 20 else float(torch.stack(redrawn).mean(0).std())
    return float(torch.stack(found).mean()), error


def _drawn_counts(rows: int, resamples: int, generator: torch.Generator) -> Tensor:
    """How often each row is drawn when as many rows are drawn with repetition, (resamples, rows), float64."""
    drawn = torch.randint(rows, (resamples, rows), generator=generator)
    return torch.zeros(resamples, rows, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())


def _weighted_discrepancy(xx: Tensor, xy: Tensor, yy: Tensor, of_x: Tensor, of_y: Tensor) -> Tensor:
    """The discrepancy (B,) when row i counts of_x[b, i], or of_y[b, i], times; pairs of one row with itself are left out."""

    def within(kernel: Tensor, counts: Tensor) -> Tensor:
        own = (counts**2 * kernel.diagonal()).sum(1)
        pairs = counts.sum(1) ** 2 - (counts**2).sum(1)
        return ((counts @ kernel * counts).sum(1) - own) / pairs.clamp_min(1)

    across = (of_x @ xy * of_y).sum(1) / (of_x.sum(1) * of_y.sum(1)).clamp_min(1)
    return within(xx, of_x) + within(yy, of_y) - 2 * across
