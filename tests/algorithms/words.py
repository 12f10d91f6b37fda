"""A fleet of authors whose model is logistic regression on words, as a bundle and for the float64 reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

import covey_models
from covey_coordinator.algorithms.sparse_logistic import Posts, make_authors
from covey_coordinator.demo.devices import Shard, make_device
from covey_protocol.seals import SealingKey

FEATURES, DECAY, BATCH = 40, 0.01, 4
D = FEATURES + 1


def authors() -> list[Posts]:
    """Three, with 13 to 16 posts each: whole batches and ragged ones."""
    return make_authors(authors=3, features=FEATURES, fewest=18, most=22, words=5, own_words=6, seed=1).train


def model(start: Any = None) -> Any:
    """From zeros, or from `start`, (D,)."""
    layers, keras = tf.keras.layers, tf.keras
    made = keras.Sequential(
        [
            layers.InputLayer((FEATURES,)),
            layers.Dense(1, "sigmoid", kernel_regularizer=keras.regularizers.L2(DECAY / 2)),
        ]
    )
    values = np.zeros(D) if start is None else start
    made.set_weights([values[:-1, None], values[-1:]])
    return made


def bundle(key: SealingKey, start: Any = None) -> bytes:
    options = {"loss": "binary_crossentropy", "batch_size": BATCH, "correction": True, "proximal": True}
    return covey_models.export(model(start), name="words", key=key, **options)


def shard(posts: Posts) -> Shard:
    return Shard(posts.dense(), (posts.labels > 0).astype(np.int32))


def devices(folder: Path, url: str, key: SealingKey) -> dict[str, Any]:
    """Three agents' files."""
    return {
        name: make_device(name, folder / name, "home", {"url": url}, key.public, shard(posts))
        for name, posts in zip(("a", "b", "c"), authors())
    }
