"""What attacks share: statistics of the honest updates, directions, normal numbers. Same bits in every kernel."""

from __future__ import annotations

from typing import Any

from covey_coordinator.aggregation.kernels import Kernels, Updates
from covey_coordinator.aggregation.kernels.mathematics import column_mean, uniforms
from covey_coordinator.aggregation.kernels.normal import normal_quantile
from covey_protocol.errors import ConfigError

DIRECTIONS = ("mean", "unit", "std", "sign")
DISGUISE = 2.0**-16  # far above float32's 2^-24, far below what any rule could notice


def normals(k: Kernels, seed: Any, rows: Any, columns: Any) -> Any:
    """(rows, columns) float64 standard normal numbers, drawn by the seed."""
    return k.reshape(normal_quantile(k, uniforms(k, seed, rows * columns)), (rows, columns))


def seed_of(k: Kernels, seed: int, round_number: Any) -> Any:
    """int64 scalar: a seed of its own for each round."""
    return k.random_bits(k.random_bits(k.whole(seed), 1)[0] + k.whole(round_number), 1)[0]


def column_std(k: Kernels, honest: Updates) -> Any:
    """(d,) float32: standard deviation of each column, dividing by the number of rows."""

    def per_block(block: Any, carry: Any) -> tuple[Any, Any]:
        rows = k.real(block)
        share = k.divide(1.0, k.real(k.length(rows)))
        centred = rows - (k.sum_rows(rows) * share)[None, :]
        return k.single(k.sqrt(k.sum_rows(centred * centred) * share)), carry

    return k.over_columns(honest, per_block)[0]


def repeated(k: Kernels, row: Any, times: Any) -> Any:
    """(d,) -> (times, d): the same row again and again."""
    return k.take(row[None, :], 0 * k.arange(times))


def disguised(k: Kernels, rows: Any) -> Any:
    """(m, d) float32 -> the same, row i times 1 + (i + 1) 2^-16: screening takes out updates that are bit-equal.

    An attacker who controls several devices need not be so careless as to send the same bits twice. Zeros stay zeros
    and are screened out all the same.
    """
    factors = 1.0 + DISGUISE * k.real(k.arange(k.length(rows)) + 1)
    return k.single(k.real(rows) * factors[:, None])


def signs(k: Kernels, values: Any) -> Any:
    """-1.0, 0.0 or 1.0 (float64) per value."""
    return k.real(values > 0.0) - k.real(values < 0.0)


def length_of(k: Kernels, vector: Any) -> Any:
    """Euclidean length of a (d,) float32 vector, a float64 scalar."""
    return k.sqrt(k.square_norms(Updates(vector[None, :]))[0])


def check_direction(name: str, direction: str, known: tuple[str, ...] = DIRECTIONS) -> None:
    if direction not in known:
        raise ConfigError(f"{name}: direction = {direction!r}", f"set it to one of {', '.join(known)}")


def direction_of(k: Kernels, honest: Updates, direction: str) -> Any:
    """(d,) float32: where the attack pushes, away from the honest mean mu.

    "mean": -mu. "unit": -mu / |mu|. "std": minus the standard deviation of each column. "sign": -sign(mu).
    """
    if direction == "std":
        return k.single(-k.real(column_std(k, honest)))
    mu = column_mean(k, honest)
    if direction == "sign":
        return k.single(-signs(k, k.real(mu)))
    if direction == "unit":
        return k.single(k.divide(-k.real(mu), length_of(k, mu)))
    return k.single(-k.real(mu))
