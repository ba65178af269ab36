#!/usr/bin/env python3
"""Records tests/golden/metrics/features.json: small feature sets and the metrics of each pair.

The formulas are written out here a second time, in numpy and in the plainest way that memory allows, so that an
error would have to be made twice to go unseen. The Frechet distance takes scipy's matrix square root, another route
than the eigenvalues of the crate.

    python3 -m pip install numpy scipy
    python3 tools/record/record_metrics.py
"""

import json
import pathlib

import numpy as np
import scipy.linalg

OUT = pathlib.Path(__file__).resolve().parents[2] / "tests/golden/metrics/features.json"


def frechet(a, b):
    mean_a, mean_b = a.mean(0), b.mean(0)
    cov_a, cov_b = np.cov(a, rowvar=False).reshape(a.shape[1], -1), np.cov(b, rowvar=False).reshape(b.shape[1], -1)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    return ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(root.real)


def distances(a, b):
    return np.sqrt(((a[:, None, :] - b[None, :, :]) ** 2).sum(-1))


def radius(a, k):
    """Distance of each row to its k-th nearest other row."""
    others = [np.sort(np.delete(row, i)) for i, row in enumerate(distances(a, a))]
    return np.array([row[k - 1] for row in others])


def prdc(real, fake, k_pr, k_dc):
    between = distances(real, fake)
    real_pr, fake_pr, real_dc = radius(real, k_pr), radius(fake, k_pr), radius(real, k_dc)
    return {
        "precision": np.mean([any(between[i, j] < real_pr[i] for i in range(len(real))) for j in range(len(fake))]),
        "recall": np.mean([any(between[i, j] < fake_pr[j] for j in range(len(fake))) for i in range(len(real))]),
        "density": sum(between[i, j] < real_dc[i] for i in range(len(real)) for j in range(len(fake)))
        / (k_dc * len(fake)),
        "coverage": np.mean([between[i].min() < real_dc[i] for i in range(len(real))]),
    }


def mean_over_others(matrix):
    n = len(matrix)
    return sum(matrix[i, j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))


def kid(a, b):
    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    return mean_over_others(kernel(a, a)) + mean_over_others(kernel(b, b)) - 2 * kernel(a, b).mean()


def energy_distance(a, b):
    return 2 * distances(a, b).mean() - mean_over_others(distances(a, a)) - mean_over_others(distances(b, b))


def sliced_wasserstein(a, b, directions):
    return np.mean([((np.sort(a @ u) - np.sort(b @ u)) ** 2).mean() for u in directions])


def case(name, rng, real, fake, k_pr, k_dc):
    directions = rng.normal(size=(9, real.shape[1]))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    values = {
        "frechet": frechet(real, fake),
        **prdc(real, fake, k_pr, k_dc),
        "kid": kid(real, fake),
        "energy_distance": energy_distance(real, fake),
        "mean_pairwise_distance": mean_over_others(distances(fake, fake)),
    }
    if len(real) == len(fake):
        values["sliced_wasserstein"] = sliced_wasserstein(real, fake, directions)
    return {
        "name": name,
        "real": real.tolist(),
        "fake": fake.tolist(),
        "directions": directions.tolist(),
        "precision_recall_k": k_pr,
        "density_coverage_k": k_dc,
        "values": {key: float(value) for key, value in values.items()},
    }


def main():
    rng = np.random.default_rng(20240917)
    mixing = rng.normal(size=(5, 5))
    two_modes = np.where(rng.random((40, 1)) < 0.5, -2.0, 2.0) + 0.3 * rng.normal(size=(40, 3))
    cases = [
        case("equal laws", rng, rng.normal(size=(40, 4)), rng.normal(size=(40, 4)), 3, 5),
        case("moved and stretched", rng, rng.normal(size=(50, 5)), 0.5 + rng.normal(size=(35, 5)) @ mixing, 3, 5),
        case("one of two modes", rng, two_modes, 2.0 + 0.3 * rng.normal(size=(40, 3)), 2, 7),
        case("too narrow", rng, rng.normal(size=(45, 2)), 0.4 * rng.normal(size=(45, 2)), 1, 3),
        # On a grid distances tie exactly, which tells < from <=, and samples coincide with reference samples.
        case("ties", rng, rng.integers(0, 4, (48, 2)).astype(float), rng.integers(0, 4, (48, 2)).astype(float), 3, 5),
        case("one feature", rng, rng.normal(size=(30, 1)), 1.0 + rng.normal(size=(30, 1)), 3, 5),
    ]
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({"made_by": "tools/record/record_metrics.py", "cases": cases}) + "\n")


if __name__ == "__main__":
    main()
