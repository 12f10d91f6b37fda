"""What attacks share: statistics of the honest updates, directions, normal numbers. Same bits in every kernel."""

from __future__ import annotations

from typing import Any

from covey_coordinator.aggregation.kernels import Kernels, Updates
from covey_coordinator.aggregation.kernels.mathematics import column_mean, log, uniforms
from covey_protocol.errors import ConfigError

DIRECTIONS = ("mean", "unit", "std", "sign")
DISGUISE = 2.0**-16  # far above float32's 2^-24, far below what any rule could notice

# Wichura 1988, algorithm AS 241 (PPND16), coefficients a, b (middle), c, d (near tails), e, f (far tails), from the
# highest power down. Relative error about 1e-16.
MIDDLE = (
    (
        2.5090809287301226727e3,
        3.3430575583588128105e4,
        6.7265770927008700853e4,
        4.5921953931549871457e4,
        1.3731693765509461125e4,
        1.9715909503065514427e3,
        1.3314166789178437745e2,
        3.3871328727963666080e0,
    ),
    (
        5.2264952788528545610e3,
        2.8729085735721942674e4,
        3.9307895800092710610e4,
        2.1213794301586595867e4,
        5.3941960214247511077e3,
        6.8718700749205790830e2,
        4.2313330701600911252e1,
        1.0,
    ),
)
NEAR = (
    (
        7.74545014278341407640e-4,
        2.27238449892691845833e-2,
        2.41780725177450611770e-1,
        1.27045825245236838258e0,
        3.64784832476320460504e0,
        5.76949722146069140550e0,
        4.63033784615654529590e0,
        1.42343711074968357734e0,
    ),
    (
        1.05075007164441684324e-9,
        5.47593808499534494600e-4,
        1.51986665636164571966e-2,
        1.48103976427480074590e-1,
        6.89767334985100004550e-1,
        1.67638483018380384940e0,
        2.05319162663775882187e0,
        1.0,
    ),
)
FAR = (
    (
        2.01033439929228813265e-7,
        2.71155556874348757815e-5,
        1.24266094738807843860e-3,
        2.65321895265761230930e-2,
        2.96560571828504891230e-1,
        1.78482653991729133580e0,
        5.46378491116411436990e0,
        6.65790464350110377720e0,
    ),
    (
        2.04426310338993978564e-15,
        1.42151175831644588870e-7,
        1.84631831751005468180e-5,
        7.86869131145613259100e-4,
        1.48753612908506148525e-2,
        1.36929880922735805310e-1,
        5.99832206555887937690e-1,
        1.0,
    ),
)
CENTRAL = 0.425  # |p - 1/2| up to here is the middle
TAIL = 5.0  # sqrt(-log p) up to here is near


def _ratio(k: Kernels, coefficients: tuple[tuple[float, ...], tuple[float, ...]], r: Any) -> Any:
    parts = []
    for row in coefficients:
        value = r * 0.0 + row[0]
        for coefficient in row[1:]:
            value = value * r + coefficient
        parts.append(value)
    return k.divide(*parts)


def normal_quantile(k: Kernels, p: Any) -> Any:
    """Phi^-1 of float64 numbers in (0, 1), within 1e-15 relative. Source: Wichura 1988, AS 241."""
    q = p - 0.5
    middle = q * _ratio(k, MIDDLE, 0.180625 - q * q)
    r = k.sqrt(-log(k, k.minimum(p, 1.0 - p)))
    tail = k.where(r <= TAIL, _ratio(k, NEAR, r - 1.6), _ratio(k, FAR, r - TAIL))
    return k.where(k.maximum(q, -q) <= CENTRAL, middle, k.where(q < 0.0, -tail, tail))


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
