"""The benchmarks run and say what they measured. Slow but for a small fleet; that of the training step needs a
package index once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from brokers import mosquitto_binary

ROOT = Path(__file__).parent.parent


@pytest.mark.broker
@pytest.mark.fleet
def test_the_benchmark_of_fleets_measures_a_small_one_to_the_byte(tmp_path: Path) -> None:
    mosquitto_binary()
    d, n = 20_000, 20
    written = tmp_path / "fleet.json"
    command = [sys.executable, "benchmarks/fleet.py", "--sizes", f"{n}", "--repeats", "2", "--dimension", f"{d}"]
    ended = subprocess.run(
        [*command, "--json", str(written), "--folder", str(tmp_path)],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    (row,) = json.loads(written.read_text())["rows"]
    assert row["n"] == row["least_accepted"] == n
    assert row["chunks_per_device"] >= 2.0  # of 65,536 bytes
    for way in ("up", "down"):  # the model or the update, and what is said around it
        assert 4 * d < row[way] < 4 * d * row["chunks_per_device"] / 2 + 20_000
        assert 4 * d < row[f"raw_{way}"] < 4 * d + 1000
    assert len(row["rounds"]) == len(row["raws"]) == 2
    assert all(0.0 < one["closed_after_s"] < one["seconds"] for one in row["rounds"])
    assert f"\n{n:>6} | " in ended.stdout
    assert list(tmp_path.iterdir()) == [written]  # nothing else is left


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_benchmark_of_the_training_step_compares_all_contestants() -> None:
    command = [sys.executable, "benchmarks/train_step.py", "--quick", "--rounds", "1", "--steps", "2"]
    ended = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    said = ended.stdout
    assert "weights after 5 steps from the same start agree within" in said
    for contestant in ("tflite_runtime", "tf.function, oneDNN", "tf.function, no oneDNN", "Flex in full TensorFlow"):
        assert f"\n{contestant}  " in said
    assert "times faster than Flex" in said
    assert "MB resident" in said


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_deep_nets_are_no_further_from_float64_than_tensorflow_is() -> None:
    command = [sys.executable, "benchmarks/parity.py", "mobilenet-v2", "mobilenet-v3-small", "ds-cnn"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["mobilenet-v2", "mobilenet-v3-small", "ds-cnn"]
    for _, tflite, with_onednn, without_onednn, larger in rows:
        medians = [float(cell.split(",")[0]) for cell in (tflite, with_onednn, without_onednn)]
        assert medians[0] <= max(1e-5, 2.0 * max(medians[1:]))
        assert float(larger) > 1e-4


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_benchmark_of_the_rules_measures_ours_without_the_peers(tmp_path: Path) -> None:
    written = tmp_path / "rules.json"
    command = [sys.executable, "benchmarks/rules.py", "--quick", "--shapes", "10x3000"]
    command += ["--rules", "median,multi-krum", "--memory", "--json", str(written)]
    ended = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    rows = json.loads(written.read_text())["rows"]
    assert [(row["rule"], row["n"], row["d"]) for row in rows] == [("median", 10, 3000), ("multi-krum", 10, 3000)]
    for row in rows:
        columns = {"direct", "live", "round", "reference", "numpy", "read"}
        assert set(row["milliseconds"]) == columns | ({"product"} if row["rule"] == "multi-krum" else set())
        assert row["milliseconds"]["round"] > 0.0
        assert row["notes"] == []  # all give the same aggregate
        assert set(row["memory"]) == {"direct", "round"}
        assert f"\n{row['rule']:<17}{row['n']:>4}" in ended.stdout


@pytest.mark.skipif(
    os.environ.get("COVEY_PEERS_PYTHON") is None, reason="COVEY_PEERS_PYTHON names no Python with the peers"
)
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_benchmark_of_the_rules_leaves_out_what_takes_a_peer_too_long(tmp_path: Path) -> None:
    written = tmp_path / "rules.json"
    folder = Path(os.environ["COVEY_PEERS_PYTHON"]).parent.parent
    command = [sys.executable, "benchmarks/rules.py", "--quick", "--peers", str(folder), "--budget", "0.5"]
    command += ["--rules", "krum", "--shapes", "10x3000,100x100000", "--json", str(written)]
    ended = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    small, large = json.loads(written.read_text())["rows"]
    ours = {"direct", "live", "round", "reference"}
    assert set(small["milliseconds"]) == {*ours, "flwr", "byzfl", "torch", "numpy", "product", "read"}
    assert small["notes"] == []
    assert large["not measured"]["byzfl"] == "> 0.5 s"


def test_the_benchmark_of_encryption_says_what_it_costs() -> None:
    command = [sys.executable, "benchmarks/encryption.py", "--quick"]
    ended = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "| float32 | 100,000 | 400,000 | 400,560 | 0.14% |" in ended.stdout
    assert len(ended.stdout.splitlines()) == 2 + 6


@pytest.mark.slow
@pytest.mark.fleet
@pytest.mark.timeout(600)
def test_the_benchmark_of_slow_devices_runs_every_kind_of_rounds(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/asynchronous.py", "--quick", "--plot", str(tmp_path / "plot.png")]
    ended = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    slow = {line.split(":")[0]: int(line.split()[-1]) for line in ended.stdout.splitlines() if "of slow ones" in line}
    assert slow["goal of 4"] == 0 < slow["asynchronous, goal of 4"]
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_benchmark_of_compressed_rules_shows_that_the_median_of_sparse_rows_learns_nothing(tmp_path: Path) -> None:
    written = tmp_path / "runs.json"
    command = [sys.executable, "benchmarks/compressed_rules.py", "--quick", "--json", str(written)]
    ended = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    runs = {(one["rule"], one["attack"], one["form"]): one for one in json.loads(written.read_text())}
    assert len(runs) == 6 * 2 * 5
    assert ended.stdout.count("\n| ") == 1 + 6 * 2
    accuracy = {form: runs["median", "nobody", form]["accuracy"] for form in ("none", "rotated-8bit", "top-k 1%")}
    assert accuracy["rotated-8bit"] > accuracy["none"] - 2.0
    assert accuracy["top-k 1%"] < 20.0 < 50.0 < accuracy["none"]


@pytest.mark.slow
@pytest.mark.broker
@pytest.mark.fleet
@pytest.mark.timeout(900)
def test_real_agents_of_a_corrupted_majority_end_as_at_the_desk(tmp_path: Path) -> None:
    mosquitto_binary()
    found = {}
    for how in ([], ["--desk"]):
        written = tmp_path / f"{len(how)}.json"
        command = [sys.executable, "benchmarks/corrupted_majority.py", "--quick", *how, "--json", str(written)]
        ended = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr[-2000:]
        found[bool(how)] = {one["method"]: one["accuracy"] for one in json.loads(written.read_text())}
    assert found[False]["FLTrust"] > 0.7 > 0.1 > max(found[False][name] for name in ("mean", "median", "Multi-Krum"))
    assert found[False]["CoMT"] == pytest.approx(found[True]["CoMT"], abs=0.01)  # the same arithmetic


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_benchmark_of_compression_measures_every_form() -> None:
    command = [sys.executable, "benchmarks/compression.py", "--quick"]
    ended = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    for form in ("float32", "rotated-8bit", "rotated-4bit", "top-k 10%", "top-k 1%", "top-k-8bit 1%"):
        assert ended.stdout.count(f"\n| {form} |") == 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_benchmark_of_several_workers_finds_equal_results() -> None:
    command = [sys.executable, "benchmarks/scale_out.py", "--quick"]
    ended = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    rows = [line.split(" | ") for line in ended.stdout.splitlines() if line.startswith(("| mean", "| multi-krum"))]
    assert len(rows) == 15
    assert all(float(row[-1].strip(" |")) <= 1e-6 for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_benchmark_of_defences_draws_the_trade_off_of_audits(tmp_path: Path) -> None:
    written = tmp_path / "found.json"
    command = [sys.executable, "benchmarks/defences.py", "--part", "trade-off", "--quick", "--json", str(written)]
    ended = subprocess.run(
        [*command, "--pictures", str(tmp_path)], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    rows = {(row["curve"], row["at"]): row for row in json.loads(written.read_text())["trade-off"]}
    assert {curve for curve, _ in rows} == {"noise_multiplier", "epochs", "examples", "clip_norm", "rounds"}
    assert rows["rounds", 3.0]["resolved_per_example"] > rows["rounds", 1.0]["resolved_per_example"]
    assert all(0.0 <= row["accuracy_percent"] <= 100.0 for row in rows.values())
    assert (tmp_path / "trade-off.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.broker
@pytest.mark.timeout(1800)
def test_the_agent_alone_is_as_small_as_promised(tmp_path: Path) -> None:
    """What does not depend on how busy the machine is; times are for `benchmarks/agent.py` on a quiet one."""
    mosquitto_binary()
    written = tmp_path / "agent.json"
    command = [sys.executable, "benchmarks/agent.py", "--quick", "--idle", "20", "--json", str(written)]
    ended = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    (row,) = json.loads(written.read_text())
    assert row["installed_mb"] < 85.0  # as a kit installs it
    assert row["idle_processes"] == 1  # the training child has ended
    assert row["idle_mb"] < 45.0
    assert row["training_mb"] < 70.0  # edge/README.md says what it is made of
    assert row["idle_cpu_percent"] < 0.2
    for bytes_ in (row["up_bytes"], row["down_bytes"]):
        assert 827_688 < bytes_ < 850_000  # 206,922 parameters, and what is said around them
    assert "| idle (PSS), MB |" in ended.stdout
