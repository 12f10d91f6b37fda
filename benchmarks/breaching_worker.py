"""`breaching`'s own attacks behind one way to call them. Runs in breaching's Python, not in ours.

One JSON request a line, one line of answer each. A request names an .npz with the model's layers, parameters and
gradient as TensorFlow lays them out, and where to save the inputs found; they are turned into PyTorch's layout here.
What is patched from outside, and nothing else: torchvision's missing operators are declared, total variation gets as
many channels as the picture has (the package writes three), and the objective is counted.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import Any

import numpy as np
import torch

TORCHVISION = (
    "nms qnms roi_align qroi_align _roi_align_backward roi_pool _roi_pool_backward ps_roi_align _ps_roi_align_backward "
    "ps_roi_pool _ps_roi_pool_backward deform_conv2d _deform_conv2d_backward"
)
LBFGS_STEPS = 20  # evaluations that one step of torch.optim.LBFGS takes by default


def import_breaching() -> Any:
    try:
        import breaching
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in TORCHVISION.split():
            with contextlib.suppress(RuntimeError):
                library.define(f"{name}() -> Tensor")
        for name in [name for name in sys.modules if name.split(".")[0] in ("breaching", "torchvision")]:
            del sys.modules[name]
        import breaching

        import_breaching.kept = library  # type: ignore[attr-defined]
    return breaching


def network(layers: list[dict[str, Any]], shape: list[int], weights: list[np.ndarray]) -> tuple[Any, list[Any]]:
    """The torch model of Keras layers and the functions that turn its parameters' arrays into torch's layout."""
    parts: list[Any] = []
    turns: list[Any] = []
    height, width, channels = shape
    flat = False
    for layer in layers:
        if layer["kind"] == "conv":
            size, stride, filters = layer["size"], layer["stride"], layer["filters"]
            pads = []
            for side in (width, height):  # TensorFlow's "same" puts the odd pixel behind, torch cannot
                total = max((-(-side // stride) - 1) * stride + size - side, 0)
                pads += [total // 2, total - total // 2]
            parts += [torch.nn.ZeroPad2d(tuple(pads)), torch.nn.Conv2d(channels, filters, size, stride)]
            turns += [lambda kernel: kernel.transpose(3, 2, 0, 1), lambda bias: bias]
            height, width, channels = -(-height // stride), -(-width // stride), filters
        else:
            if not flat:
                parts.append(torch.nn.Flatten())
                turns.append(_first_dense(height, width, channels))
                inputs, flat = height * width * channels, True
            else:
                turns.append(lambda kernel: kernel.T)
            parts.append(torch.nn.Linear(inputs, layer["units"]))
            turns.append(lambda bias: bias)
            inputs = layer["units"]
        if layer["activation"]:
            parts.append({"sigmoid": torch.nn.Sigmoid, "relu": torch.nn.ReLU}[layer["activation"]]())
    model = torch.nn.Sequential(*parts)
    with torch.no_grad():
        for parameter, turn, values in zip(model.parameters(), turns, weights):
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(turn(values))))
    return model, turns


def _first_dense(height: int, width: int, channels: int) -> Any:
    """Keras flattens (height, width, channels), torch (channels, height, width)."""
    return lambda kernel: kernel.reshape(height, width, channels, -1).transpose(3, 2, 0, 1).reshape(kernel.shape[1], -1)


class Counted:
    """An attacker's objective that counts its calls and ends the attack when the budget is spent."""

    def __init__(self, objective: Any) -> None:
        self.objective, self.calls = objective, 0

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        return self.objective(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.objective, name)


def run(job: dict[str, Any]) -> dict[str, Any]:
    import breaching.attacks.auxiliaries.regularizers as regularizers
    from omegaconf import OmegaConf

    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    stored = np.load(job["path"])
    shape = job["shape"]
    count = len(job["layers"]) * 2
    weights = [stored[f"weight_{number}"] for number in range(count)]
    model, turns = network(job["layers"], shape, weights)
    gradients = [
        torch.from_numpy(np.ascontiguousarray(turn(stored[f"gradient_{number}"]))) for number, turn in enumerate(turns)
    ]
    lbfgs = job["config"] == "deepleakage"
    iterations = job["evaluations"] // LBFGS_STEPS if lbfgs else job["evaluations"]
    overrides = [f"optim.max_iterations={iterations}", "optim.callback=1000000"]
    if job.get("total_variation") is not None:
        overrides.append(f"regularization.total_variation.scale={job['total_variation']}")
    with contextlib.redirect_stdout(sys.stderr):
        config = import_breaching().get_attack_config(job["config"], overrides)
        OmegaConf.set_struct(config, False)
        attacker = import_breaching().attacks.prepare_attack(model, torch.nn.CrossEntropyLoss(), config)
        for regularizer in attacker.regularizers:
            if isinstance(regularizer, regularizers.TotalVariation):
                regularizer.groups = shape[2]
                regularizer.weight = regularizer.weight[: 2 * shape[2]]
        attacker.objective = Counted(attacker.objective)
        about = OmegaConf.create(
            {"shape": [shape[2], shape[0], shape[1]], "modality": "vision", "task": "classification", "classes": 10}
        )
        payload = [{"parameters": list(model.parameters()), "buffers": None, "metadata": about}]
        told = {"num_data_points": job["examples"], "labels": None, "local_hyperparams": None}
        shared = [{"gradients": gradients, "buffers": None, "metadata": told}]
        started, cpu = time.perf_counter(), time.process_time()
        found, _ = attacker.reconstruct(payload, shared, {}, dryrun=False)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    np.save(job["save"], found["data"].detach().numpy().transpose(0, 2, 3, 1))
    return {"seconds": seconds, "cpu_seconds": cpu, "evaluations": attacker.objective.calls}


def check(job: dict[str, Any]) -> dict[str, Any]:
    """The largest difference between torch's gradient of these examples and the stored one, over its largest number."""
    stored = np.load(job["path"])
    weights = [stored[f"weight_{number}"] for number in range(2 * len(job["layers"]))]
    model, turns = network(job["layers"], job["shape"], weights)
    x = torch.from_numpy(np.ascontiguousarray(stored["x"].transpose(0, 3, 1, 2)))
    loss = torch.nn.functional.cross_entropy(model(x), torch.from_numpy(stored["y"].astype(np.int64)))
    ours = [turn(stored[f"gradient_{number}"]) for number, turn in enumerate(turns)]
    pairs = list(zip(torch.autograd.grad(loss, list(model.parameters())), ours))
    largest = max(float(np.abs(part).max()) for _, part in pairs)
    return {"difference": max(float(np.abs(one.numpy() - part).max()) for one, part in pairs) / largest}


def main() -> None:
    import_breaching()
    print(json.dumps({"torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer = check(job) if job["do"] == "check" else run(job)
        except Exception as exc:
            answer = {"error": f"{type(exc).__name__}: {exc}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
