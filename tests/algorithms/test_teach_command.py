"""`covey teach` on tables and images: what it finds, what it says, what it refuses."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from click.testing import CliRunner

import covey_models
from covey_coordinator.teach.command import teach_command
from covey_coordinator.teach.comparing import Compared
from covey_coordinator.teach.data import read_work
from covey_models.datasets import breast_cancer, digits


def run(*arguments: Any) -> str:
    result = CliRunner().invoke(teach_command, [str(one) for one in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def as_table(path: Path, data: Any, users: list[str] | None = None) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*(f"f{place}" for place in range(8)), "diagnosis", *(["who"] if users else [])])
        for place, (x, y) in enumerate(zip(data.x[:, :8], data.y)):
            writer.writerow([*x.tolist(), data.class_names[y], *([users[place]] if users else [])])


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """180 tumours, of whose labels the first 70 % are the other one, and 40 trusted ones."""
    every = breast_cancer()
    order = np.random.default_rng(0).permutation(len(every))
    wrong = every.take(order[:180])
    wrong.y[:126] ^= 1
    as_table(tmp_path / "data.csv", wrong, [f"user {place % 4}" for place in range(180)])
    as_table(tmp_path / "trusted.csv", every.take(order[180:220]))
    return tmp_path


def test_a_table_with_mostly_wrong_labels(tables: Path) -> None:
    said = run(tables / "data.csv", "--trusted", tables / "trusted.csv", "--users", "who", "--label", "diagnosis",
               "--tries", 3, "--output", tables / "out")  # fmt: skip
    assert "180 examples with 4 teachers (45 to 45 each), 40 trusted, 8 features, 2 classes" in said
    summary = json.loads((tables / "out" / "summary.json").read_text())
    scores = {name: np.mean(values) for name, values in summary["scores"].items()}
    assert scores["everything"] < 0.5 < 0.75 < min(scores["trusted-only"], scores["teaching"])
    assert ("as good" in said) == (not summary["helps"])
    report = json.loads((tables / "out" / "report.json").read_text())
    found = {one["row"] for one in report["instances"] if one["suspicion"] >= 0.5}
    assert len(found & set(range(126))) > 0.8 * 126
    assert len(found - set(range(126))) < 0.2 * 54
    assert "--bundle MODEL.covey" in said


class Page(HTMLParser):
    """Counts pictures and remembers every tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]


def image_bundle() -> bytes:
    """What its last layer sees are 12 numbers of a layer that nobody trained."""
    layers = tf.keras.layers
    tf.keras.utils.set_random_seed(2)
    hidden = layers.Dense(12, "tanh")
    model = tf.keras.Sequential([layers.InputLayer((8, 8, 1)), layers.Flatten(), hidden, layers.Dense(1, "sigmoid")])
    return covey_models.export(model, name="images", loss="binary_crossentropy", input_range=(0.0, 1.0), teach=True)


def test_images_are_shown_on_a_page_that_asks_nobody_for_anything(tmp_path: Path) -> None:
    data = digits()
    part = data.take(np.flatnonzero(data.y < 2))
    y = part.y.copy()
    y[:30] ^= 1
    np.savez(tmp_path / "data.npz", x=part.x[:150], y=y[:150])
    np.savez(tmp_path / "trusted.npz", x=part.x[200:230], y=part.y[200:230])
    (tmp_path / "model.covey").write_bytes(image_bundle())
    said = run(tmp_path / "data.npz", "--trusted", tmp_path / "trusted.npz", "--tries", 1, "--teachers", 2,
               "--bundle", tmp_path / "model.covey", "--output", tmp_path / "out")  # fmt: skip
    assert "30 trusted, 12 features, 2 classes" in said
    assert '[training]\n  algorithm = "comt"\n  [teaching]\n  lambda_w = ' in said
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert 15 <= len(page.sources) == page.tags.count("img")
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    first = [one["row"] for one in report["instances"][:20]]
    assert np.mean(np.array(first) < 30) > 0.7


def test_numbers_are_learned_too(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(120, 3))
    y = x @ [1.0, -2.0, 0.5] + 3 + 0.1 * rng.normal(size=120)
    shifted = np.where(np.arange(120) < 60, y + 8, y)
    np.savez(tmp_path / "data.npz", x=x[:90], y=shifted[:90])
    np.savez(tmp_path / "trusted.npz", x=x[90:], y=y[90:])
    said = run(tmp_path / "data.npz", "--trusted", tmp_path / "trusted.npz", "--numbers", "--tries", 2,
               "--output", tmp_path / "out")  # fmt: skip
    assert "R2 on trusted examples" in said
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {one["row"] for one in report["instances"][:60]} == set(range(60))


def test_only_a_clear_gain_is_called_one() -> None:
    same = Compared({"teaching": [0.9, 0.8, 0.9], "trusted-only": [0.9, 0.8, 0.9]}, {})
    chance = Compared({"teaching": [0.9, 0.7, 0.95], "trusted-only": [0.8, 0.8, 0.9]}, {})
    clear = Compared({"teaching": [0.9, 0.8, 0.9], "trusted-only": [0.8, 0.71, 0.79]}, {})
    assert [one.helps() for one in (same, chance, clear)] == [False, False, True]


BAD = {
    "a class that the data have not": ("trusted.csv", lambda text: text.replace("benign", "harmless"), "harmless"),
    "too few trusted": ("trusted.csv", lambda text: "\n".join(text.splitlines()[:8]), "7 trusted examples"),
    "another column": ("trusted.csv", lambda text: text.replace("f7", "f7,f8").replace(",benign", ",1,benign")
                       .replace(",malignant", ",1,malignant"), "the same columns"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_fit_is_named(what: str, tables: Path) -> None:
    from covey_coordinator.grid.display import Display
    from covey_coordinator.teach.program import Request, teach
    from covey_protocol.errors import DataError

    name, change, expected = BAD[what]
    (tables / name).write_text(change((tables / name).read_text()))
    request = Request(str(tables / "data.csv"), str(tables / "trusted.csv"), label="diagnosis", users="who")
    with pytest.raises(DataError, match=expected):
        teach(request, Display())


def test_every_example_belongs_to_one_teacher(tables: Path) -> None:
    told = {"numbers": False, "label": "diagnosis", "users": None, "teachers": 7, "seed": 3}
    work = read_work(str(tables / "trusted.csv"), str(tables / "trusted.csv"), **told)
    assert np.array_equal(np.sort(np.concatenate(work.parts)), np.arange(40))
    assert len(work.parts) == 7
