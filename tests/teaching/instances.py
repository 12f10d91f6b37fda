"""Small fleets of teachers for the tests of machine teaching."""

from __future__ import annotations

from typing import Any

import numpy as np


def fleet(kind: str, seed: int, sizes: tuple[int, ...] = (12, 9, 15), trusted: tuple[int, ...] = (3, 0, 2)) -> Any:
    """(teachers, trusted) of one linear truth in four features, the last of them 1; what is not trusted has noise."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=4)

    def drawn(n: int, noise: float) -> Any:
        x = rng.normal(size=(n, 4))
        x[:, -1] = 1
        y = x @ truth + noise * rng.normal(size=n)
        return x, y if kind == "ridge" else np.where(y > 0, 1.0, -1.0)

    return [drawn(n, 1.5) for n in sizes], [drawn(n, 0.1) for n in trusted]


def objective(kind: str, settings: Any, teachers: Any, trusted: Any, alphas: Any, features: Any, targets: Any) -> float:
    """Equation (3), written out: of all dual variables a_k, crafted features B_k (n_k, F) and crafted targets b_k."""
    w, total = 0.0, 0.0
    for (x, y), a, b, by in zip(teachers, alphas, features, targets):
        z = (x if kind == "ridge" else y[:, None] * x) + b
        w = w + z.T @ a / settings.lambda_w
        if kind == "ridge":
            total += a @ a / 2 - a @ (y + by)
        else:
            total += a @ np.log(a) + (1 - a) @ np.log(1 - a)
        total += settings.lambda_a * np.abs(a).sum()
        total += 0.0 if np.isinf(settings.lambda_z) else settings.lambda_z * (b**2).sum()
        total += 0.0 if np.isinf(settings.lambda_y) else settings.lambda_y * (by**2).sum()
    for x, y in trusted:
        miss = (x @ w - y) ** 2 if kind == "ridge" else np.logaddexp(0, -y * (x @ w))
        total += settings.lambda_t * miss.sum()
    return float(total + settings.lambda_w / 2 * (w @ w))
