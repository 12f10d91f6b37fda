"""`covey infer serve`: a local HTTP endpoint that answers, refuses with the remedy, and lives through nonsense."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union

import numpy as np
import pytest
from click.testing import CliRunner
from models_kept import digits, keep, parameters_of
from patience import PATIENCE_S

from covey_edge.cli_infer import infer
from covey_edge.inference import Predictor
from covey_edge.inference_server import CONNECTIONS, InferenceServer
from covey_edge.model_store import ModelStore
from covey_protocol.errors import ConfigError, CoveyError, TransportError
from covey_protocol.seals import SealingKey

TOKEN = "correct-horse-battery"
JSON = {"Content-Type": "application/json"}
ZERO = np.zeros((1, 8, 8, 1)).tolist()


class Client(http.client.HTTPConnection):
    """Over TCP or a Unix socket."""

    def __init__(self, address: Union[Path, int]) -> None:
        super().__init__("localhost", address if isinstance(address, int) else None, timeout=PATIENCE_S)
        self._path = address if isinstance(address, Path) else None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def connect(self) -> None:
        if self._path is None:
            super().connect()
        else:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.connect(str(self._path))

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if isinstance(body, (dict, list)):
            body, named = json.dumps(body), {**JSON, **named}
        self.request(method, path, body, named)
        answer = self.getresponse()
        data = answer.read()
        return answer.status, json.loads(data) if answer.headers["Content-Type"] == "application/json" else data


def once(address: Union[Path, int], method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    with Client(address) as client:
        return client.ask(method, path, body, **headers)


@pytest.fixture
def served(tmp_path: Path, digits_bundle: bytes, coordinator_key: SealingKey) -> Iterator[Any]:
    """(address, token) -> a running server."""
    keep(tmp_path, digits_bundle, parameters_of(digits_bundle), coordinator_key)
    running: list[InferenceServer] = []

    def serve(address: Any = ("127.0.0.1", 0), token: str = "", **options: int) -> InferenceServer:
        store = ModelStore(tmp_path)
        server = InferenceServer(Predictor(store), store, address, token, **options)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        running.append(server)
        return server

    yield serve
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture
def stay() -> Iterator[Any]:
    """Keeps a client's connection until the end of the test."""
    with contextlib.ExitStack() as stack:
        yield stack.enter_context


def port(server: InferenceServer) -> int:
    return int(server.server_address[1])


def test_answers_over_json_and_npy_are_the_predictors_on_one_connection(served: Any, tmp_path: Path, stay: Any) -> None:
    client, predictor = stay(Client(port(served()))), Predictor.open(tmp_path)
    x, _ = digits(0, 20)
    truth = predictor.predict(x)
    status, answer = client.ask("POST", "/predict", {"x": x.tolist()})
    assert status == 200
    np.testing.assert_allclose(answer["outputs"], truth, rtol=1e-6)
    assert answer["classes"] == truth.argmax(axis=1).tolist()
    assert answer["model"] == "federated model of round 1 (r.1)"
    buffer = io.BytesIO()
    np.save(buffer, x)
    named = {"Content_Type": "application/x-npy", "Accept": "application/x-npy"}
    status, data = client.ask("POST", "/predict", buffer.getvalue(), **named)
    assert np.array_equal(np.load(io.BytesIO(data)), truth)
    assert client.ask("GET", "/health") == (200, {"status": "ok", "model": answer["model"]})
    status, model = client.ask("GET", "/model")
    assert (status, model["name"], model["input"]["shape"]) == (200, "digits", [8, 8, 1])


REFUSED: dict[str, tuple[tuple[Any, ...], dict[str, str], int, str]] = {
    "another path": (("GET", "/etc/passwd"), {}, 404, "use /predict, /model, /health"),
    "a way up": (("GET", "/model/../../device.pem"), {}, 404, "there is no"),
    "another method": (("GET", "/predict"), {}, 405, "use POST"),
    "no JSON": (("POST", "/predict", b"{"), JSON, 400, "the body is no JSON"),
    "JSON without numbers": (("POST", "/predict", {"x": [["a"]]}), {}, 400, "no lists of numbers"),
    "another key": (("POST", "/predict", {"y": ZERO}), {}, 400, "no lists of numbers"),
    "rows of different lengths": (("POST", "/predict", {"x": [[1, 2], [3]]}), {}, 400, "not equally long"),
    "deep nesting": (("POST", "/predict", b"[" * 100000), JSON, 400, "the body is no JSON"),
    "the wrong shape": (("POST", "/predict", {"x": [[1, 2]]}), {}, 400, "the model takes (8, 8, 1)"),
    "out of range": (("POST", "/predict", {"x": (np.array(ZERO) + 2).tolist()}), {}, 400, "above 1 in 1 of 1 rows"),
    "no .npy": (("POST", "/predict", b"\x93NUMPY?"), {"Content-Type": "application/x-npy"}, 400, "not a .npy file"),
    "a form of a web page": (("POST", "/predict", b"x=1"), {"Content-Type": "text/plain"}, 415, "application/json"),
    "another Host": (("GET", "/model"), {"Host": "evil.example"}, 421, "use this machine's address"),
    "no length": (("POST", "/predict", b"{}"), {"Content-Length": "many", **JSON}, 411, "send a Content-Length"),
    "too much": (("POST", "/predict", b"[" + b" " * 3_000_000), JSON, 413, "send at most 2000000"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_says_the_thing_and_the_remedy_and_the_next_request_is_answered(what: str, served: Any) -> None:
    server = served(max_body_bytes=2_000_000)
    (method, path, *body), headers, expected, words = REFUSED[what]
    try:
        status, answer = once(port(server), method, path, *body, **{k.replace("-", "_"): v for k, v in headers.items()})
        assert status == expected
        assert words in f"{answer['error']}; {answer['remedy']}"
    except (BrokenPipeError, ConnectionResetError):  # it need not read what it does not take
        assert what == "too much"
    assert once(port(server), "POST", "/predict", {"x": ZERO})[0] == 200


def test_a_token_keeps_the_other_programs_of_the_machine_out(served: Any, stay: Any) -> None:
    client = stay(Client(port(served(token=TOKEN))))
    for given in ("", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"bearer {TOKEN}", "Bearer \xe9"):
        status, answer = client.ask("GET", "/model", Authorization=given)
        assert (status, answer["remedy"]) == (401, "send Authorization: Bearer TOKEN"), given
    assert client.ask("GET", "/model", Authorization=f"Bearer {TOKEN}")[0] == 200


def test_a_unix_socket_is_for_this_user_alone_and_a_dead_servers_is_taken_over(served: Any, tmp_path: Path) -> None:
    path = tmp_path / "infer.sock"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()
    served(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert once(path, "POST", "/predict", {"x": ZERO})[0] == 200
    with pytest.raises(TransportError, match="another program listens on"):
        served(path)
    assert once(path, "GET", "/health")[0] == 200
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ConfigError, match="is no socket"):
        served(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


def test_connections_that_say_nothing_are_bounded_and_lock_nobody_out_for_long(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from covey_edge import inference_server

    monkeypatch.setattr(inference_server.Handler, "timeout", 0.3)
    server = served()
    silent = [socket.create_connection(("127.0.0.1", port(server))) for _ in range(CONNECTIONS)]
    for one in silent:
        one.settimeout(PATIENCE_S)
        assert one.recv(1) == b""  # closed by the server
        one.close()
    assert once(port(server), "GET", "/health")[0] == 200


def test_bytes_that_are_no_http_end_the_connection_and_nothing_else(served: Any) -> None:
    server, random = served(), np.random.default_rng(0)
    for size in (1, 10, 100, 70_000):
        connection = socket.create_connection(("127.0.0.1", port(server)), timeout=PATIENCE_S)
        with connection, contextlib.suppress(OSError):  # it may be closed before it was all read
            connection.sendall(random.bytes(size) + b"\r\n\r\n")
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
    assert once(port(server), "GET", "/health")[0] == 200


# --- the commands, as a user calls them


@pytest.fixture
def owner(tmp_path: Path, digits_bundle: bytes, coordinator_key: SealingKey) -> Path:
    """A folder with an agent.toml whose keys nobody needs, and two kept models."""
    lines = ['device_id = "pi"', 'fleet = "home"', "[broker]", 'url = "mqtt://x"', "[identity]", 'key_file = "none"']
    lines += [f'coordinator_key = "{coordinator_key.public.hex()}"', "[data]", 'path = "data.npz"']
    (tmp_path / "agent.toml").write_text("\n".join(lines))
    for number, scale in ((1, 1.0), (2, 0.5)):
        keep(tmp_path / "state", digits_bundle, parameters_of(digits_bundle, scale), coordinator_key, number)
    return tmp_path


def covey_infer(owner: Path, *arguments: str, given: bytes = b"") -> tuple[int, str, str]:
    command = [sys.executable, "-m", "covey_edge", "infer", *arguments]
    ended = subprocess.run(command, cwd=owner, input=given, capture_output=True, timeout=PATIENCE_S, check=False)
    return ended.returncode, ended.stdout.decode(), ended.stderr.decode()


def called(owner: Path, *arguments: str, given: bytes = b"") -> tuple[int, str]:
    """In this process; a CoveyError is raised, as it is for `covey`, which makes a line and a code of it."""
    before = Path.cwd()
    os.chdir(owner)
    try:
        ended = CliRunner().invoke(infer, list(arguments), input=given, catch_exceptions=False)
    finally:
        os.chdir(before)
    return ended.exit_code, ended.stdout


def test_the_command_answers_from_files_and_standard_input_and_goes_back(owner: Path) -> None:
    x, _ = digits(0, 3)
    truth = Predictor.open(owner / "state").predict(x)
    table = "\n".join([",".join(f"p{place}" for place in range(64)), *(",".join(map(str, row.ravel())) for row in x)])
    code, said, model = covey_infer(owner, "-", given=table.encode())
    assert (code, model) == (0, "digits, federated model of round 2 (r.2)\n")
    rows = [line.split(",") for line in said.splitlines()]
    assert rows[0][:3] == ["row", "class", "output_0"]
    np.testing.assert_allclose(np.array([row[2:] for row in rows[1:]], float), truth, rtol=1e-5)
    np.savez(owner / "data.npz", x=x)
    code, said = called(owner, "--json", "data.npz")
    assert [json.loads(line)["class"] for line in said.splitlines()] == truth.argmax(axis=1).tolist()
    assert called(owner, "rollback") == (0, "in use: federated model of round 1 (r.1)\n")
    assert called(owner, "scores")[1].startswith("in use: federated model of round 1")


@pytest.mark.parametrize(
    ("arguments", "given", "code", "words"),
    [
        (("-",), b"1,2\n1,x\n", 4, "row 1 holds '1,x', not 2 numbers"),
        (("-",), b"", 4, "holds no examples"),
        (("none.csv",), b"", 4, "none.csv cannot be read"),
        (("serve",), b"", 2, "one of --socket and --port"),
        (("serve", "--port", "0", "--host", "10.1.2.3"), b"", 2, "give --token-file"),
        (("scores", "--task", "door"), b"", 10, "no model is kept in"),
    ],
)
def test_errors_of_the_command_are_one_line_and_a_documented_code(
    arguments: tuple[str, ...], given: bytes, code: int, words: str, owner: Path
) -> None:
    with pytest.raises(CoveyError, match=re.escape(words)) as raised:
        called(owner, *arguments, given=given)
    assert raised.value.exit_code == code


def test_serving_ends_in_order_by_a_signal(owner: Path) -> None:
    command = [sys.executable, "-m", "covey_edge", "infer", "serve", "--socket", "infer.sock"]
    server = subprocess.Popen(command, cwd=owner, stdout=subprocess.PIPE)
    assert server.stdout is not None
    assert server.stdout.readline() == b"federated model of round 2 (r.2) answers at unix:infer.sock\n"
    assert once(owner / "infer.sock", "POST", "/predict", {"x": ZERO})[0] == 200
    server.send_signal(signal.SIGTERM)
    assert server.wait(PATIENCE_S) == 0
    server.stdout.close()
    assert not (owner / "infer.sock").exists()


def test_a_table_is_read_as_for_training_and_an_image_gets_the_models_size(owner: Path) -> None:
    x, y = digits(0, 3)
    predictor = Predictor.open(owner / "state")
    names = [f"p{place}" for place in range(64)]
    rows = [
        ";".join([str(label), *(f"{value:g}".replace(".", ",") for value in row.ravel())]) for row, label in zip(x, y)
    ]
    (owner / "digits.csv").write_text("\n".join([";".join(["digit", *names]), *rows]))
    options = '\nsource = "csv"\n[data.options]\nlabel = "digit"\ndelimiter = ";"\ndecimal = ","\n'
    with (owner / "agent.toml").open("a") as file:
        file.write(options)
    code, said = called(owner, "--json", "digits.csv")
    found = np.array([json.loads(line)["output"] for line in said.splitlines()])
    assert code == 0
    np.testing.assert_allclose(found, predictor.predict(x), atol=1e-6)
    large = np.repeat(np.repeat(np.rint(x[0, :, :, 0] * 255), 3, axis=0), 3, axis=1).astype(np.uint8)  # 24 x 24
    (owner / "digit.pgm").write_bytes(b"P5 24 24 255\n" + large.tobytes())
    code, said = called(owner, "--json", "digit.pgm")
    np.testing.assert_allclose(json.loads(said)["output"], predictor.predict(x[:1])[0], atol=0.01)
    (owner / "digit.pgm").write_bytes(b"P5 24 24 255\n" + large.tobytes()[:50])
    with pytest.raises(CoveyError, match=r"digit\.pgm: "):
        called(owner, "digit.pgm")
