"""Length-controlled win rate, as AlpacaEval 2 defines it (Dubois et al., arXiv 2404.04475, section 3)."""

from __future__ import annotations

import numpy as np

RIDGE = 1e-3
"""Penalty on the squares of the coefficients of length and difficulty, per pair."""


def length_controlled_win_rate(
    wins: np.ndarray,  # [pairs], in [0, 1]
    lengths_a: np.ndarray,  # [pairs] characters
    lengths_b: np.ndarray,  # [pairs]
    difficulty: np.ndarray | None = None,  # [pairs]
) -> float:
    """The win rate of A against B that a logistic regression predicts for answers of equal length:

        logit P(A wins | x) = θ + φ tanh((|a| - |b|) / sd(|a| - |b|)) + ψ γ_x,     the mean of σ(θ + ψ γ_x) over x

    Swapping A and B gives 1 minus it, and A against itself is 1/2.

    Args:
        wins: 1, 0, a tie's 1/2 or a probability; the regression minimizes their cross-entropy.
        difficulty: γ_x of each prompt. AlpacaEval estimates it once from all models of its leaderboard and publishes it;
            None leaves its term out.
    """
    wins = np.asarray(wins, dtype=np.float64)
    difference = np.asarray(lengths_a, dtype=np.float64) - np.asarray(lengths_b, dtype=np.float64)
    deviation = difference.std()
    length = np.tanh(difference / deviation) if deviation > 0 else np.zeros_like(difference)
    columns = [np.ones_like(wins), length] + ([] if difficulty is None else [np.asarray(difficulty, dtype=np.float64)])
    features = np.stack(columns, axis=1)
    found = _regression(features, wins)
    features[:, 1] = 0.0
    return float(np.mean(_sigmoid(features @ found)))


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(z, -30, 30)))


def _regression(features: np.ndarray, wins: np.ndarray) -> np.ndarray:
    """Newton's method; a little ridge on θ too, or it would not end where A wins always."""
    penalty = RIDGE * len(wins) * np.diag([1e-3, *[1.0] * (features.shape[1] - 1)])
    found = np.zeros(features.shape[1])
    for _ in range(100):
        p = _sigmoid(features @ found)
        gradient = features.T @ (p - wins) + penalty @ found
        hessian = (features * (p * (1 - p))[:, None]).T @ features + penalty
        step = np.linalg.solve(hessian, gradient)
        step /= max(1.0, np.abs(step).max())
        found -= step
        if np.abs(step).max() < 1e-12:
            break
    return found
