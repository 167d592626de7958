"""Other people's GANs, entered without what they import and do not need here; also for the parity tests.

torchgan, stylegan2_pytorch and kornia (whose blur the latter has) import torchvision for data sets and pictures,
stylegan2_pytorch also a logger and a command line, torch_mimicry tensorflow in its first file. All raise
ModuleNotFoundError where they are not installed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import nn


@contextmanager
def _stubs(*names: str) -> Iterator[None]:
    """Modules of these names that take every attribute, as long as the context lasts."""
    before = {name: sys.modules.pop(name, None) for name in names}
    sys.modules.update({name: MagicMock() for name in names})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


@functools.cache
def torchgan() -> Any:
    """Its modules `functional`, `layers`, `losses` and `models`."""
    with _stubs("torchvision"):
        names = {"functional": "losses.functional", "layers": "layers", "losses": "losses", "models": "models"}
        return SimpleNamespace(**{k: importlib.import_module(f"torchgan.{v}") for k, v in names.items()})


@functools.cache
def mimicry(name: str) -> ModuleType:
    """torch_mimicry.NAME."""
    for bare in ("torch_mimicry", "torch_mimicry.training"):
        if bare not in sys.modules:
            spec = importlib.util.find_spec(bare)
            if spec is None or spec.submodule_search_locations is None:
                raise ModuleNotFoundError(f"No module named {bare!r}", name=bare)
            module = ModuleType(bare)
            module.__path__ = list(spec.submodule_search_locations)
            sys.modules[bare] = module
    return importlib.import_module(f"torch_mimicry.{name}")


@functools.cache
def stylegan2_pytorch() -> Any:
    """Its one module, which asserts that there is a GPU."""
    absent = ("torchvision", "torchvision.transforms", "aim", "fire", "vector_quantize_pytorch")
    with _stubs(*absent), patch("torch.cuda.is_available", return_value=True):
        return importlib.import_module("stylegan2_pytorch.stylegan2_pytorch")


@contextmanager
def on_the_cpu() -> Iterator[None]:
    """`cuda()` moves nothing."""
    with ExitStack() as stack:
        for kind in (torch.Tensor, nn.Module):
            stack.enter_context(patch.object(kind, "cuda", lambda self, *_, **__: self))
        yield
