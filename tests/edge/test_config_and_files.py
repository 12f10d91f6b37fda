"""agent.toml is decoded strictly, files are written whole, the cache keeps what it promises."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from covey_edge.cache import KEEP, BlobCache
from covey_edge.config import load_agent
from covey_edge.files import write_atomic
from covey_edge.mqtt import parse_broker
from covey_protocol.blobs import blob_ref
from covey_protocol.errors import ConfigError, StorageError
from covey_protocol.seals import SealingKey

KEY = SealingKey.from_seed(bytes(32))
GOOD = f"""
device_id = "kitchen-pi"
fleet = "home"
[broker]
url = "mqtts://broker.local"
username = "pi"
password_file = "password"
[identity]
key_file = "device.pem"
coordinator_key = "{KEY.public.hex()}"
[data]
path = "data.npz"
"""


def write(folder: Path, text: str) -> Path:
    (folder / "device.pem").write_bytes(KEY.pem())
    (folder / "password").write_text("secret\n")
    path = folder / "agent.toml"
    path.write_text(text)
    return path


def test_a_good_file_is_read_with_its_keys_and_paths(tmp_path: Path) -> None:
    agent = load_agent(write(tmp_path, GOOD))
    assert str(agent.broker) == "mqtts://broker.local:8883"
    assert agent.broker.password == "secret"
    assert agent.folder / agent.config.data.path == tmp_path / "data.npz"
    assert agent.coordinators == (KEY.public,)
    assert "secret" not in repr(agent.broker)
    assert (agent.broker.protocol, agent.broker.max_message_bytes) == ("auto", 0)


def test_what_the_broker_speaks_and_takes_can_be_set(tmp_path: Path) -> None:
    text = GOOD.replace("[identity]", 'protocol = "3.1.1"\nmax_message_bytes = 16384\n[identity]', 1)
    broker = load_agent(write(tmp_path, text)).broker
    assert (broker.protocol, broker.max_message_bytes, broker.username) == ("3.1.1", 16384, "pi")


BAD = {
    "a mistyped setting names the nearest": (GOOD.replace("fleet =", "fleat ="), "did you mean `fleet`"),
    "a mistyped nested setting too": (GOOD.replace("url =", "ulr ="), "did you mean `url`"),
    "a missing setting": (GOOD.replace('fleet = "home"', ""), "missing required field `fleet`"),
    "a wrong type": (GOOD.replace('"home"', "3"), "Expected `str`"),
    "an unknown compression": (GOOD + '[wire]\ncompression = ["zip"]\n', "there is no compression 'zip'"),
    "a number out of bounds": (GOOD + "[training]\ntimeout_s = 0\n", "timeout_s"),
    "a password in two places": (GOOD.replace("//broker", "//pi:secret@broker"), "password in one place"),
    "a key without its certificate": (
        GOOD.replace("[identity]", 'key_file = "k"\n[identity]', 1),
        "without its cert_file",
    ),
    "certificate files without TLS": (
        GOOD.replace("mqtts:", "mqtt:").replace("[identity]", 'ca_file = "ca"\n[identity]', 1),
        "ca_file without TLS",
    ),
    "a password file without a user": (GOOD.replace('username = "pi"\n', ""), "password_file needs"),
    "the coordinator's own name": (GOOD.replace("kitchen-pi", "coordinator"), "the coordinator's own name"),
    "a name with other rights at the broker": (GOOD.replace("kitchen-pi", "operator"), "the operator's own name"),
    "a replica that adds noise": (
        GOOD.replace("[data]\n", '[data]\nreplica = "hall"\n') + "[privacy]\nclip_norm = 1.0\nnoise_multiplier = 1.0\n",
        "replica = 'hall' with noise_multiplier",
    ),
    "a replica's name with a blank": (GOOD.replace("[data]\n", '[data]\nreplica = "the hall"\n'), "replica"),
    "noise without a clip norm": (GOOD + "[privacy]\nnoise_multiplier = 1.0\n", "needs clip_norm"),
    "a device id that breaks topics": (GOOD.replace("kitchen-pi", "kitchen/pi"), "device_id"),
    "not TOML": ("device_id = ", "not valid TOML"),
    "an address that is none": (GOOD.replace("mqtts://broker.local", "http://broker"), "write mqtt://"),
    "a version of MQTT that is none": (GOOD.replace("[identity]", 'protocol = "4"\n[identity]', 1), "broker.protocol"),
    "a negative message limit": (
        GOOD.replace("[identity]", "max_message_bytes = -1\n[identity]", 1),
        "broker.max_message_bytes",
    ),
    "a coordinator key that is none": (GOOD.replace(KEY.public.hex(), "abc"), "not a public key"),
    "a key file that is missing": (GOOD.replace("device.pem", "nokey.pem"), "nokey.pem cannot be read"),
    "a password file that is missing": (GOOD.replace('"password"', '"nopass"'), "nopass cannot be read"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_refused_naming_the_thing(what: str, tmp_path: Path) -> None:
    text, message = BAD[what]
    with pytest.raises(ConfigError, match=message):
        load_agent(write(tmp_path, text))


def test_a_password_in_a_wrong_address_is_not_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_broker("http://pi:secret@host")
    assert "secret" not in str(caught.value)


def test_a_file_is_replaced_whole_and_leaves_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_atomic(path, b"one")
    write_atomic(path, b"two", mode=0o600)
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_write_that_fails_half_way_keeps_the_old_file_and_names_it(tmp_path: Path) -> None:
    """A file size limit makes the kernel refuse the write as a full disk does."""
    script = """
import resource, sys
from pathlib import Path
from covey_edge.files import write_atomic
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
write_atomic(Path(sys.argv[1]), bytes(5000))
"""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    ended = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False)
    assert f"StorageError: cannot write {path}" in ended.stderr
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write"):
        write_atomic(tmp_path / "file" / "x", b"")


def test_the_cache_knows_a_blob_by_its_content(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path)
    ref = blob_ref(b"model")
    assert not cache.has(ref)
    cache.put(b"model", ref.sha256)
    assert cache.has(ref)
    cache.path(ref.sha256).write_bytes(b"mode1")
    assert not cache.has(ref)


def test_the_cache_drops_old_blobs_but_never_one_in_use(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path)
    refs = [blob_ref(bytes([i])) for i in range(10)]
    for age, ref in enumerate(refs):
        cache.put(bytes([age]), ref.sha256)
        os.utime(cache.path(ref.sha256), (age, age))
    cache.prune({refs[0].sha256})
    kept = [i for i, ref in enumerate(refs) if cache.has(ref)]
    assert kept == [0, 7, 8, 9]
    assert len(kept) == KEEP


def test_two_tasks_that_take_turns_keep_their_bundles_in_the_cache(tmp_path: Path) -> None:
    """A bundle is fetched once and a model every round, so the bundles are the oldest files."""
    cache = BlobCache(tmp_path)
    bundles = {task: blob_ref(f"bundle of {task}".encode()) for task in "xy"}
    fetched = []
    for number in range(6):
        for task, bundle in bundles.items():
            model = f"model {number} of {task}".encode()
            for ref, data in ((bundle, f"bundle of {task}".encode()), (blob_ref(model), model)):
                if not cache.has(ref):
                    fetched.append(data)
                    cache.put(data, ref.sha256)
                time.sleep(0.01)  # file times are coarse
            cache.prune({bundle.sha256, blob_ref(model).sha256})
    assert [data for data in fetched if data.startswith(b"bundle")] == [b"bundle of x", b"bundle of y"]
    assert len(list(tmp_path.iterdir())) == KEEP
