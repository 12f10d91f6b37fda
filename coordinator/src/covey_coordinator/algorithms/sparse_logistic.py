"""Sparse, unbalanced, non-IID two-class data with planted feature frequencies, and logistic regression on them.

The kind of data Federated SVRG was made for (Konecny et al. 2016, section 4: posts of 10,000 authors as bags of words,
which are not public). What is planted: words follow a power law; every author has words of her own, so many words are
with few authors (omega^j small) who use them often; numbers of posts are spread over two orders of magnitude.
Numpy alone, in float64; the posts are kept as lists of words, not as a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Posts:
    """n examples as lists of the features that they have, each with the value 1.

    columns: the features of all examples one after another. starts: (n + 1,), where each example's begin. labels: -1 or
    1. features: F; the weights are (F + 1,), the last one the bias.
    """

    columns: Rows
    starts: Rows
    labels: Numbers
    features: int

    def __len__(self) -> int:
        return len(self.labels)

    def taken(self, rows: Rows) -> Posts:
        """These examples, in this order."""
        lengths = np.diff(self.starts)[rows]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        places = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths) + np.repeat(self.starts[rows], lengths)
        return Posts(self.columns[places], starts, self.labels[rows], self.features)

    def margins(self, w: Numbers) -> Numbers:
        """(n,): w x + bias."""
        sums = np.add.reduceat(np.append(w[self.columns], 0.0), self.starts[:-1])
        return np.asarray(np.where(np.diff(self.starts) > 0, sums, 0.0) + w[-1])

    def dense(self) -> npt.NDArray[np.float32]:
        """(n, F) zeros and ones, for models that take a matrix."""
        x = np.zeros((len(self), self.features), np.float32)
        x[np.repeat(np.arange(len(self)), np.diff(self.starts)), self.columns] = 1.0
        return x

    def shares(self) -> Numbers:
        """(F + 1,): in which share of the examples each feature is; 1 for the bias."""
        return np.append(np.bincount(self.columns, minlength=self.features) / len(self), 1.0)


def loss(w: Numbers, posts: Posts, decay: float) -> float:
    """mean log(1 + exp(-y m)) + decay / 2 |w|^2 (without the bias: it is not shrunk)."""
    return float(np.logaddexp(0.0, -posts.labels * posts.margins(w)).mean() + decay / 2 * (w[:-1] @ w[:-1]))


def gradient(w: Numbers, posts: Posts, decay: float) -> Numbers:
    """(F + 1,), of `loss`."""
    margins = posts.labels * posts.margins(w)
    slopes = -posts.labels / (1.0 + np.exp(margins))
    spread = np.bincount(posts.columns, np.repeat(slopes, np.diff(posts.starts)), minlength=posts.features)
    return np.append(spread / len(posts) + decay * w[:-1], slopes.mean())


def error(w: Numbers, posts: Posts) -> float:
    """Share of the examples on the wrong side."""
    return float(np.mean(np.where(posts.margins(w) > 0, 1.0, -1.0) != posts.labels))


def optimum(posts: Posts, decay: float, *, tolerance: float = 1e-6) -> Numbers:
    """The minimiser of `loss`: L-BFGS until no slope is above the tolerance. Needs SciPy."""
    from scipy.optimize import minimize

    found: Any = minimize(
        lambda w: (loss(w, posts, decay), gradient(w, posts, decay)),
        np.zeros(posts.features + 1),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 5000, "gtol": tolerance, "ftol": 0.0, "maxcor": 30},
    )
    return np.asarray(found.x)


@dataclass(frozen=True)
class Authors:
    """train, test: one Posts per author; the first three quarters of her posts and the rest, as in the paper."""

    train: list[Posts]
    test: list[Posts]

    def all_train(self) -> Posts:
        return joined(self.train)

    def all_test(self) -> Posts:
        return joined(self.test)

    def reshuffled(self, seed: int) -> Authors:
        """The same sizes, with the training examples dealt out anew: IID, everything else equal (FSVRGR)."""
        every, sizes = self.all_train(), [len(one) for one in self.train]
        rows = np.random.default_rng(seed).permutation(len(every))
        return Authors([every.taken(part) for part in np.split(rows, np.cumsum(sizes)[:-1])], self.test)


def joined(parts: list[Posts]) -> Posts:
    lengths = np.concatenate([np.diff(part.starts) for part in parts])
    return Posts(
        np.concatenate([part.columns for part in parts]),
        np.concatenate([[0], np.cumsum(lengths)]),
        np.concatenate([part.labels for part in parts]),
        parts[0].features,
    )


def make_authors(
    authors: int = 200,
    features: int = 2000,
    *,
    fewest: int = 20,
    most: int = 400,
    words: int = 15,
    own_words: int = 40,
    own_share: float = 0.3,
    seed: int = 0,
) -> Authors:
    """Authors with between `fewest` and `most` posts of about `words` words.

    Words follow Zipf's law (frequency 1 / rank). Each author has `own_words` of the rarer half for herself to prefer:
    a share `own_share` of her words is of these. A post's label depends on its words by a hidden weight each, on its
    author by a leaning of her own (so devices differ in labels, too), and on chance.
    """
    rng = np.random.default_rng(seed)
    frequency = 1.0 / np.arange(1, features + 1)
    cumulated = np.cumsum(frequency / frequency.sum())
    truth = rng.normal(0.0, 1.0, features)
    parts = [
        _posts_of_one(rng, cumulated, truth, _size(rng, fewest, most), words, own_words, own_share)
        for _ in range(authors)
    ]
    cut = [(part, max(1, 3 * len(part) // 4)) for part in parts]
    train = [part.taken(np.arange(at)) for part, at in cut]
    return Authors(train, [part.taken(np.arange(min(at, len(part) - 1), len(part))) for part, at in cut])


def _size(rng: np.random.Generator, fewest: int, most: int) -> int:
    """Spread evenly over the logarithm: many authors with few posts."""
    return int(np.exp(rng.uniform(np.log(fewest), np.log(most))))


def _posts_of_one(
    rng: np.random.Generator,
    cumulated: Numbers,
    truth: Numbers,
    n: int,
    words: int,
    own_words: int,
    own_share: float,
) -> Posts:
    features = len(truth)
    own = rng.choice(np.arange(features // 2, features), own_words, replace=False)
    lengths = 1 + rng.poisson(words - 1, n)
    total = int(lengths.sum())
    common = np.minimum(np.searchsorted(cumulated, rng.random(total)), features - 1)
    chosen = np.where(rng.random(total) < own_share, rng.choice(own, total), common)
    posts = np.repeat(np.arange(n), lengths)
    pairs = np.unique(posts * features + chosen)  # a word is in a post or not
    posts, columns = pairs // features, pairs % features
    starts = np.searchsorted(posts, np.arange(n + 1))
    leaning = rng.normal(-0.5, 1.0)
    plain = Posts(columns, starts, np.ones(n), features)
    margins = plain.margins(np.append(truth, leaning))
    labels = np.where(rng.random(n) < 1.0 / (1.0 + np.exp(-margins)), 1.0, -1.0)
    return Posts(columns, starts, labels, features)
