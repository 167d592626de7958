"""Files that survive a crash and cannot run code: safetensors for tensors, JSON and YAML for the rest.

A folder is written under a temporary name in the same parent, its files and itself are flushed to the disk,
and only then is it renamed: what has its final name is complete. A manifest holds each file's SHA-256.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from trilemma.core import registry
from trilemma.core.errors import CheckpointError, TrilemmaError
from trilemma.core.spec import DataSpec

if TYPE_CHECKING:
    from trilemma.core.model import GenerativeModel

FORMAT = 1
MANIFEST = "manifest.json"


def write_bytes(path: Path, data: bytes) -> None:
    """Write and flush to the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush a folder's entries (its renames) to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(value: Any) -> str:
    """Readable JSON; NaN and infinity are written as such words, as Python and pydantic read them."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def replace_file(path: Path, text: str) -> None:
    """Replace a file in one step: a reader sees the old text or the new one, never a part."""
    stage = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_bytes(stage, text.encode())
        os.replace(stage, path)
    except OSError as error:
        stage.unlink(missing_ok=True)
        raise _explain_os_error(error, path) from error
    sync_folder(path.parent)


def append_line(path: Path, text: str) -> None:
    """Append one line to a log with a single write, mending a line that a crash cut short."""
    try:
        with open(path, "ab+") as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":
                    text = "\n" + text
            file.write((text + "\n").encode())
    except OSError as error:
        raise _explain_os_error(error, path) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl log; a line that a crash cut short is passed over."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict):
                records.append(record)
    return records


@contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends well, and vanishes when it does not."""
    stage = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if stage.exists():
            shutil.rmtree(stage)
        stage.mkdir()
        yield stage
        sync_folder(stage)
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        os.rename(stage, path)
    except OSError as error:
        shutil.rmtree(stage, ignore_errors=True)
        raise _explain_os_error(error, path) from error
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    sync_folder(path.parent)


def _explain_os_error(error: OSError, path: Path) -> TrilemmaError:
    reasons = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "the file-size limit is reached",
        errno.ENOTEMPTY: "it exists already",
        errno.EEXIST: "it exists already",
    }
    reason = reasons.get(error.errno or 0, os.strerror(error.errno) if error.errno else str(error))
    return CheckpointError(f"cannot write {path}: {reason}; what was saved before is intact")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors (contiguous CPU copies)."""
    write_bytes(path, save_safetensors({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}))


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write manifest.json: `content` and the SHA-256 of every other file in the folder."""
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}
    write_bytes(folder / MANIFEST, to_json({"format": FORMAT, **content, "files": files}).encode())


def read_manifest(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest and the verified bytes of every file it names.

    Raises:
        CheckpointError: a file is missing, or differs from its hash.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{folder} has format {manifest['format']}, this version reads format {FORMAT}")
        content = {}
        for name, digest in files.items():
            if Path(name).name != name:
                raise CheckpointError(f"{folder}: the manifest names a file outside its folder: {name!r}")
            content[name] = (folder / name).read_bytes()
            if hashlib.sha256(content[name]).hexdigest() != digest:
                raise CheckpointError(f"{folder / name} is damaged: its SHA-256 differs from the manifest's")
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename} does not exist: {folder} is no complete saved model") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} cannot be read: {error}") from error
    return manifest, content


def parse_tensors(data: bytes, where: Path) -> dict[str, Tensor]:
    """Read safetensors from memory."""
    try:
        return load_safetensors(data)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{where} is not a valid safetensors file: {error}") from error


def load_state(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy tensors into a module, strictly by name.

    A buffer that is empty before fitting (a closed-form model's stored data) takes the shape it was saved with;
    every other shape must agree.
    """
    own = module.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        raise CheckpointError(f"{where} does not fit: missing {missing[:3]}, unexpected {extra[:3]}")
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape and own[name].numel() > 0:
            raise CheckpointError(f"{where}: {name} has shape {tuple(tensor.shape)}, not {tuple(own[name].shape)}")
        if own[name].numel() == 0 and tensor.numel() > 0:
            owner = module.get_submodule(name.rpartition(".")[0])
            leaf = name.rpartition(".")[2]
            if leaf not in owner._buffers:
                raise CheckpointError(f"{where}: {name} has shape {tuple(tensor.shape)}, not {tuple(own[name].shape)}")
            owner._buffers[leaf] = torch.empty_like(tensor, device=own[name].device, dtype=own[name].dtype)
    module.load_state_dict(dict(tensors), strict=True)


def model_header(model: GenerativeModel) -> dict[str, Any]:
    """What is needed, beside the tensors, to make the model again."""
    return {
        "model": model.name,
        "settings": model.config.model_dump(mode="json"),
        "spec": model.spec.model_dump(mode="json"),
    }


def model_from_header(header: Mapping[str, Any], where: Path) -> GenerativeModel:
    """An initialised, still unfitted model from `model_header`'s description."""
    try:
        spec = DataSpec.model_validate(header["spec"])
        model = registry.create(header["model"], spec, **header["settings"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where} does not describe a model of this version: {error}") from error
    model.initialize(seed=0)
    return model


def save_model(model: GenerativeModel, path: Path) -> None:
    """Save to a folder that does not exist or is empty."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"cannot save to {path}: it exists already; give a new folder")
    with staged_folder(path) as stage:
        write_tensors(stage / "model.safetensors", model.state_dict())
        write_manifest(stage, model_header(model))


def load_model(path: Path) -> GenerativeModel:
    """Load what `save_model` wrote; the result is on the CPU.

    Raises:
        CheckpointError: missing, damaged, or not of this version.
    """
    manifest, content = read_manifest(path)
    model = model_from_header(manifest, path)
    if "model.safetensors" not in content:
        raise CheckpointError(f"{path} holds no model.safetensors")
    load_state(model, parse_tensors(content["model.safetensors"], path), str(path))
    model.fitted = True
    return model


def model_folder(path: str | Path) -> Path:
    inside = Path(path) / "model"
    return inside if inside.is_dir() else Path(path)
