"""Epsilon of noised updates: against dp-accounting's numbers, and against the definition."""

from __future__ import annotations

import math

import numpy as np
import pytest

from covey_protocol.gaussian import delta_of, epsilon_of, mu_of


def test_epsilon_of_many_rounds_is_that_of_dp_accountings_privacy_loss_distributions() -> None:
    from dp_accounting.pld import privacy_loss_distribution

    loss = privacy_loss_distribution.from_gaussian_mechanism(8.0 / 2, value_discretization_interval=1e-3)
    expected = loss.self_compose(20).get_epsilon_for_delta(1e-5)
    assert epsilon_of(mu_of({8.0: 20}), 1e-5) == pytest.approx(expected, rel=1e-5)


def test_one_update_of_noise_multiplier_2_costs_4_4() -> None:
    """sensitivity 2 C, noise 2 C: the Gaussian mechanism with mu = 1, whose epsilon at 1e-5 is published as 4.377."""
    assert epsilon_of(mu_of({2.0: 1}), 1e-5) == pytest.approx(4.377178, abs=1e-6)


def test_delta_is_the_mass_by_which_two_gaussians_differ() -> None:
    """The definition, integrated: delta(e) = integral of max(0, p - exp(e) q)."""
    x = np.linspace(-30, 30, 600_001)
    for mu, epsilon in ((0.5, 1.0), (1.0, 2.0), (3.0, 4.0)):
        p, q = (np.exp(-((x - mean) ** 2) / 2) / math.sqrt(2 * math.pi) for mean in (mu, 0.0))
        mass = float(np.maximum(0.0, p - math.exp(epsilon) * q).sum() * (x[1] - x[0]))
        assert delta_of(epsilon, mu) == pytest.approx(mass, rel=1e-5)


@pytest.mark.parametrize("mu", [1e-3, 0.1, 1.0, 10.0, 1e3, 1e5])
@pytest.mark.parametrize("delta", [1e-12, 1e-5, 0.3])
def test_epsilon_is_never_rounded_down(mu: float, delta: float) -> None:
    epsilon = epsilon_of(mu, delta)
    assert delta_of(epsilon, mu) <= delta
    assert epsilon == 0 or delta_of(epsilon * (1 - 1e-6), mu) > delta


def test_rounds_of_different_noise_add_up_in_the_square_of_mu() -> None:
    assert mu_of({1.0: 3, 2.0: 4}) == pytest.approx(math.sqrt(3 * 4 + 4 * 1))
    assert mu_of({}) == 0
    assert epsilon_of(0.0, 1e-5) == 0
