"""`covey infer`: answers of the model that this device keeps, once or as a local service; its scores, and a way back.

Reads state_dir; the agent may run or not.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Optional, TypeVar

import click

if TYPE_CHECKING:
    from covey_edge.config import AgentConfig
    from covey_edge.model_store import ModelStore

F = TypeVar("F", bound=Callable[..., Any])


class Infer(click.Group):
    """`covey infer DATA` is `covey infer predict DATA`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "-h", "--help"):
            args = ["predict", *args]
        return super().parse_args(ctx, args)


@click.group(cls=Infer, short_help="Answers of the model that this device keeps.")
def infer() -> None:
    """Use the newest federated model, or this device's own, whichever [personal] in agent.toml means.

    `covey infer data.csv` is short for `covey infer predict data.csv`.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")


def of_a_task(command: F) -> F:
    config = click.option(
        "--config", "config_path", type=click.Path(path_type=Path), default="agent.toml", show_default=True
    )
    return config(click.option("--task", default="", help="Of a device that works for several.")(command))


@infer.command(short_help="Answers for examples in a file.")
@click.argument("data")
@of_a_task
@click.option("--json", "as_json", is_flag=True, help="One JSON object per example in place of CSV.")
def predict(data: str, config_path: Path, task: str, as_json: bool) -> None:
    """Print the model's answers for the examples in DATA: .npz (its array x), .npy, .csv, .json, an image, or - for
    standard input.

    A row of a CSV file is one example, flat; where [data] has the source csv, it is read by [data.options]. Which model
    answered is said on standard error.
    """
    import msgspec

    from covey_edge.inference import Predictor, labels
    from covey_edge.inference_input import read_inputs

    config = _config(config_path, task)
    predictor = Predictor(_store(config_path, task))
    own = config.data.tasks.get(task, config.data)
    output, version, manifest = predictor.answered(read_inputs(data, predictor.manifest, own))
    click.echo(f"{manifest.name}, {version}", err=True)
    named = labels(output, manifest)
    if as_json:
        for row, values in enumerate(output.tolist()):
            said = {"row": row, **({"class": named[row]} if named is not None else {}), "output": values}
            click.echo(msgspec.json.encode(said))  # null for what is no number
        return
    flat = output.reshape(len(output), -1)
    head = ["row", *(["class"] if named is not None else []), *(f"output_{place}" for place in range(flat.shape[1]))]
    click.echo(",".join(head))
    for row, values in enumerate(flat.tolist()):
        label = [_quoted(str(named[row]))] if named is not None else []
        click.echo(",".join([str(row), *label, *(f"{value:.6g}" for value in values)]))


@infer.command(short_help="A local HTTP endpoint.")
@of_a_task
@click.option("--socket", "socket_path", type=click.Path(path_type=Path), help="A Unix socket, for this user alone.")
@click.option("--port", type=click.IntRange(0, 65535), help="A TCP port; 0 for a free one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="With --port. Others need a token.")
@click.option("--token-file", type=click.Path(path_type=Path), help="A file with the token that requests must bring.")
def serve(
    config_path: Path,
    task: str,
    socket_path: Optional[Path],
    port: Optional[int],
    host: str,
    token_file: Optional[Path],
) -> None:
    """Answer POST /predict, GET /model and GET /health until Ctrl-C or SIGTERM. See docs/personal-models.md."""
    from covey_edge.inference import Predictor
    from covey_edge.inference_server import LOOPBACK, InferenceServer
    from covey_edge.processes import frugal_memory, interrupted_by_signals
    from covey_protocol.errors import ConfigError

    if (socket_path is None) == (port is None):
        raise ConfigError("a local endpoint needs one of --socket and --port", "give one of them")
    frugal_memory()
    token = _token(token_file)
    if port is not None and not token and host not in LOOPBACK:
        raise ConfigError(f"--host {host} without a token", "give --token-file: others on the network reach this port")
    store = _store(config_path, task)
    address = socket_path if socket_path is not None else (host, int(port or 0))
    server = InferenceServer(Predictor(store), store, address, token)
    where = f"unix:{socket_path}" if socket_path is not None else f"http://{host}:{server.server_address[1]}"
    click.echo(f"{server.predictor.version} answers at {where}")
    if port is not None and not token:
        click.echo("without --token-file every program of this machine can ask it", err=True)
    try:
        interrupted_by_signals()
        server.serve_forever(poll_interval=3600)
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


@infer.command(short_help="Go back to the model that was used before.")
@of_a_task
def rollback(config_path: Path, task: str) -> None:
    """Use the model from before again, from now on and while the agent runs. The one that is left is not taken again.

    A second time undoes the first.
    """
    store = _store(config_path, task)
    with store.changing():
        kept = store.load()
        if kept is None:
            raise _nothing(store.folder)
        kept = kept.rolled_back()
        store.commit(kept, {})
    click.echo(f"in use: {kept.used}")


@infer.command(short_help="How the models scored on this device's held-out data.")
@of_a_task
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def scores(config_path: Path, task: str, as_json: bool) -> None:
    """Print which model is used and how it came to that. Loads no model."""
    facts = facts_of(config_path, task)
    click.echo(json.dumps(facts, indent=2) if as_json else "\n".join(_lines(facts)))


def facts_of(config_path: Path, task: str) -> dict[str, Any]:
    import msgspec

    store = _store(config_path, task)
    kept = store.load()
    if kept is None:
        raise _nothing(store.folder)
    facts: dict[str, Any] = msgspec.to_builtins(kept)
    return {"in_use": str(kept.used), **facts}


def _lines(facts: dict[str, Any]) -> list[str]:
    lines = [f"in use: {facts['in_use']}"]
    for one in facts["history"]:
        when = time.strftime("%Y-%m-%d %H:%M", time.gmtime(one["at_ms"] / 1000))
        told = ", ".join(f"{name} {_number(loss)}/{_number(right)}" for name, (loss, right) in one["scores"].items())
        on = f" [loss/accuracy on {one['examples']} examples: {told}]" if told else ""
        lines.append(f"{when} round {one['number']}: {one['decision']}{on}")
    return lines


def _number(value: Optional[float]) -> str:
    return "none" if value is None else f"{value:.4g}"


def _quoted(text: str) -> str:
    return f'"{text.replace(chr(34), 2 * chr(34))}"' if any(sign in text for sign in ',"\n\r') else text


def _config(config_path: Path, task: str) -> AgentConfig:
    """Needs no key and no broker: an application's user may not read them."""
    from covey_edge.config import AgentConfig, read_toml
    from covey_protocol.topics import check_name

    if task:
        check_name(task, "task")
    return read_toml(config_path, AgentConfig)


def _store(config_path: Path, task: str) -> ModelStore:
    from covey_edge.model_store import ModelStore

    return ModelStore(config_path.parent.resolve() / _config(config_path, task).state_dir, task)


def _nothing(folder: Path) -> Exception:
    from covey_protocol.errors import StorageError

    return StorageError(
        f"no model is kept in {folder}", "set [personal] keep = true in agent.toml and wait for a round"
    )


def _token(path: Optional[Path]) -> str:
    from covey_edge.config import read_file
    from covey_protocol.errors import ConfigError

    if path is None:
        return ""
    token = read_file(path).decode("utf-8", "replace").strip()
    if len(token) < 16:
        raise ConfigError(f"{path} holds a token of {len(token)} characters", "make one of 16 or more")
    return token
