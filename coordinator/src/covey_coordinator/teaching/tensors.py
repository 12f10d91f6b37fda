"""What a teacher computes in a round, in TensorFlow, float64: covey_protocol.teaching once more, for TFF's workers.

The tests hold both against each other. Names and equations are those of covey_protocol.teaching.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from covey_protocol.teaching import HALVINGS, NEARLY_DONE, NEWTON_STEPS, RIDGE, Problem, Settings

Tensor = Any


class Squares(NamedTuple):
    target: Tensor
    scale: float
    margin: float = 0.0

    def value(self, m: Tensor) -> Tensor:
        return self.scale / 2 * tf.reduce_sum(_soft(self.target - m, self.margin) ** 2)

    def pull(self, m: Tensor) -> Tensor:
        return self.scale * _soft(self.target - m, self.margin)

    def bend(self, m: Tensor) -> Tensor:
        return self.scale * tf.cast(tf.abs(self.target - m) > self.margin, tf.float64)


class Logistic(NamedTuple):
    scale: float
    margin: float = 0.0

    def value(self, m: Tensor) -> Tensor:
        return self.scale * tf.reduce_sum(tf.nn.softplus(-(m + self.margin)))

    def pull(self, m: Tensor) -> Tensor:
        return self.scale * tf.sigmoid(-(m + self.margin))

    def bend(self, m: Tensor) -> Tensor:
        p = tf.sigmoid(-(m + self.margin))
        return self.scale * p * (1 - p)


class Kept(NamedTuple):
    """Of one teacher between rounds: alpha (n, C), the others (F, C); corrected: 1.0 after its first correction."""

    alpha: Tensor
    direction: Tensor
    local: Tensor
    share: Tensor
    own_theta: Tensor
    dual: Tensor
    corrected: Tensor


def answered(problem: Problem, told: Settings, teachers: int, x: Tensor, y: Tensor, kept: Kept, model: Any) -> Kept:
    """As Teacher.answer; model: theta, u and tau, tau with this teacher's last answer in it. x (n, F), y (n, C)."""
    wanted = kept.share + (model["theta"] - model["tau"]) / teachers + model["u"]
    columns = [tf.transpose(part) for part in (y, kept.alpha, kept.direction, kept.local, wanted)]
    found = tf.map_fn(
        lambda parts: _answer_column(problem, told, x, *parts),
        tuple(columns),
        fn_output_signature=(tf.float64,) * 4,
        parallel_iterations=1,
    )
    alpha, direction, local, share = (tf.transpose(part) for part in found)
    teaches = tf.cast(tf.shape(x)[0] > 0, tf.float64)
    return kept._replace(alpha=alpha, direction=direction, local=local, share=teaches * share)


def corrected(problem: Problem, told: Settings, x: Tensor, y: Tensor, kept: Kept, theta: Tensor) -> tuple[Kept, Tensor]:
    """As Teacher.correct, for any number of trusted instances; the second is zero where there are none."""
    dual = kept.dual + kept.corrected * (kept.own_theta - theta)
    own = tf.transpose(
        tf.map_fn(
            lambda parts: _corrected_column(problem, told, x, *parts),
            (tf.transpose(y), tf.transpose(theta - dual)),
            fn_output_signature=tf.float64,
            parallel_iterations=1,
        )
    )
    trusts = tf.cast(tf.shape(x)[0] > 0, tf.float64)
    after = kept._replace(own_theta=trusts * own, dual=trusts * dual, corrected=trusts)
    return after, trusts * (own + dual - theta)


def _answer_column(
    problem: Problem, told: Settings, x: Tensor, y: Tensor, alpha: Tensor, direction: Tensor, local: Tensor, r: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kappa = told.lambda_w**2 / told.curvature
    loss: Any
    if problem.kind == RIDGE:
        loss = Squares(y, 1 / (1 - 1 / (2 * told.lambda_y)), told.lambda_a)
    else:
        x, loss = y[:, None] * x, Logistic(1.0, told.lambda_a)
    crafted = x + alpha[:, None] * direction[None, :]
    local = minimised(crafted, loss, told.lambda_w * r, told.curvature, local)
    alpha = loss.pull(_times(crafted, local))
    size, plain = tf.reduce_sum(alpha**2), _times(x, alpha, transpose_a=True) / told.lambda_w
    v = kappa / told.lambda_w * (r - plain) / (kappa * size / told.lambda_w**2 + 2 * told.lambda_z)
    free = v.shape[0] - problem.fixed
    v = tf.concat([v[:free], tf.zeros([problem.fixed], tf.float64)], axis=0)
    return alpha, v, local, plain + size / told.lambda_w * v


def _corrected_column(problem: Problem, told: Settings, x: Tensor, y: Tensor, target: Tensor) -> Tensor:
    loss: Any
    if problem.kind == RIDGE:
        loss = Squares(y, 2 * told.lambda_t)
    else:
        x, loss = y[:, None] * x, Logistic(told.lambda_t)
    return minimised(x, loss, -told.rho * target, told.rho, target)


def minimised(z: Tensor, loss: Any, linear: Tensor, curvature: float, start: Tensor) -> Tensor:
    """As covey_protocol.teaching.minimised."""
    identity = tf.eye(z.shape[1], dtype=tf.float64)

    def value_at(w: Tensor) -> Tensor:
        return loss.value(_times(z, w)) + _dot(linear, w) + curvature / 2 * _dot(w, w)

    def shorter(w: Tensor, step: Tensor, value: Tensor, decrement: Tensor) -> tuple[Tensor, Tensor]:
        def enough(count: Tensor, factor: Tensor, new: Tensor) -> Tensor:
            return (new > value - 0.25 * factor * decrement) & (count < HALVINGS - 1)

        _, factor, new = tf.while_loop(
            enough,
            lambda count, factor, _: (count + 1, factor / 2, value_at(w - factor / 2 * step)),
            (tf.constant(0), tf.constant(1.0, tf.float64), value_at(w - step)),
        )
        return w - factor * step, new

    def newton(count: Tensor, w: Tensor, value: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        m = _times(z, w)
        gradient = linear + curvature * w - _times(z, loss.pull(m), transpose_a=True)
        hessian = tf.matmul(z, loss.bend(m)[:, None] * z, transpose_a=True) + curvature * identity
        step = tf.linalg.solve(hessian, gradient[:, None])[:, 0]
        decrement = _dot(gradient, step)
        done = decrement <= NEARLY_DONE * tf.maximum(tf.constant(1.0, tf.float64), tf.abs(value))
        after = tf.cond(done, lambda: (w - step, value), lambda: shorter(w, step, value, decrement))
        return count + 1, *after, done

    state = tf.while_loop(
        lambda count, _, __, done: (count < NEWTON_STEPS) & ~done,
        newton,
        (tf.constant(0), start, value_at(start), tf.constant(False)),
        parallel_iterations=1,
    )
    return state[1]


def _times(matrix: Tensor, vector: Tensor, transpose_a: bool = False) -> Tensor:
    return tf.linalg.matvec(matrix, vector, transpose_a=transpose_a)


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return tf.reduce_sum(one * other)


def _soft(values: Tensor, threshold: float) -> Tensor:
    return tf.sign(values) * tf.maximum(tf.abs(values) - threshold, tf.constant(0.0, tf.float64))
