"""`export`: a trained model in a form that other programs read, checked by reading it back.

safetensors: weights, manifest and card. torch: the sampler's network through `torch.export`. onnx: the same network
for ONNX Runtime. The exported network and the original are run on the same input; the largest difference is
reported, and one above the tolerance is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trilemma.core import registry
from trilemma.core.errors import CapabilityError, MissingExtraError, TrilemmaError, UsageError
from trilemma.core.model import GenerativeModel
from trilemma.core.storage import load_model, model_header, staged_folder, write_bytes, write_manifest, write_tensors
from trilemma.engine.card import make_card, make_model_card
from trilemma.engine.run import Run, load

FORMATS = ("safetensors", "torch", "onnx")
TOLERANCE = 1e-4


def export_model(source: str | Path, out: str | Path, form: str = "safetensors") -> dict[str, Any]:
    """Write the model of a run (or a saved model) into the new folder `out`.

    Returns:
        The files, and the largest difference between the original and what was read back.

    Raises:
        UsageError: unknown format.
        CapabilityError: the model has no sampler network to export.
        TrilemmaError: what was written computes something else.
    """
    if form not in FORMATS:
        raise UsageError(f"unknown export format {form!r}; there are: {', '.join(FORMATS)}")
    source, out = Path(source), Path(out)
    model = load(source)
    model.eval()
    if form != "safetensors" and model.sampler_network() is None:
        able = [n for n, e in registry.entries().items() if _has_network(e.model)]
        raise CapabilityError(f"{model.name} has no sampler network; models that have: {', '.join(able)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"cannot export to {out}: it exists already; give a new folder")
    is_run = (source / "config.yaml").is_file()
    with staged_folder(out) as stage:
        write_tensors(stage / "model.safetensors", model.state_dict())
        write_bytes(stage / "card.md", (_run_card(source, model) if is_run else make_model_card(model)).encode())
        if form != "safetensors":
            difference = _export_network(model, stage, form)
        write_manifest(stage, model_header(model))
        if form == "safetensors":
            again = load_model(stage).state_dict()
            distances = [_distance(v, again[k]) for k, v in model.state_dict().items()]
            difference = float(torch.tensor(distances or [0.0]).max())  # unlike max(), it keeps a NaN
        if not difference <= TOLERANCE:
            raise TrilemmaError(f"the exported network differs from the model by {difference:.3g}: nothing was written")
    files = sorted(p.name for p in out.iterdir())
    return {"folder": str(out), "format": form, "files": files, "largest_difference": difference}


class Network(nn.Module):
    """A function of a model's networks as a module of its own."""

    def __init__(self, model: GenerativeModel, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def _has_network(model: type[GenerativeModel]) -> bool:
    return model.sampler_network is not GenerativeModel.sampler_network


def _run_card(source: Path, model: GenerativeModel) -> str:
    card = source / "card.md"
    if card.exists():
        return card.read_text(encoding="utf-8")
    from trilemma.engine.checkpoint import latest_checkpoint

    run = Run(source)
    checkpoint, _ = latest_checkpoint(run.checkpoints)
    assert checkpoint is not None, "the model was loaded from it"
    return make_card(run, model, checkpoint.state)


def _distance(a: Tensor, b: Tensor) -> float:
    if a.numel() == 0:
        return 0.0
    same = (a == b) | (a.isnan() & b.isnan())
    return float(torch.where(same, 0.0, (a.double() - b.double()).abs()).max())  # NaN on one side only stays NaN


def _export_network(model: GenerativeModel, out: Path, form: str) -> float:
    found = model.sampler_network()
    assert found is not None
    function, inputs = found
    network = Network(model, function)
    network.eval()
    with torch.no_grad():
        expected = network(*inputs)
    batch = torch.export.Dim("batch", min=1)
    dynamic = (tuple({0: batch} for _ in inputs),)  # of the one argument, *inputs
    if form == "torch":
        program = torch.export.export(network, inputs, dynamic_shapes=dynamic)
        torch.export.save(program, out / "network.pt2")
        with torch.no_grad():
            got = torch.export.load(out / "network.pt2").module()(*inputs)
        return _distance(expected, got)
    return _export_onnx(network, inputs, dynamic, out, expected)


def _export_onnx(network: nn.Module, inputs: tuple[Tensor, ...], dynamic: Any, out: Path, expected: Tensor) -> float:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ImportError as error:
        raise MissingExtraError("export to ONNX needs onnxruntime: pip install 'trilemma[onnx]'") from error
    path = out / "network.onnx"
    try:
        torch.onnx.export(
            network, inputs, path, dynamo=True, dynamic_shapes=dynamic, verbose=False, external_data=False
        )
    except torch.onnx.errors.OnnxExporterError as error:
        causes = [line for line in str(error).splitlines() if "No ONNX function" in line]
        reason = causes[0].partition(": ")[2] if causes else str(error).splitlines()[0]
        raise TrilemmaError(f"ONNX cannot express this network: {reason} Try --format torch") from error
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {i.name: t.numpy() for i, t in zip(session.get_inputs(), inputs, strict=True)}
    got = np.asarray(session.run(None, feed)[0])
    return _distance(expected, torch.from_numpy(got))
