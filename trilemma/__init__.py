"""Trilemma: train, sample, score and honestly compare every family of deep generative model on your own data.

    import trilemma as tl
    data = tl.load_data("digits")
    model = tl.create("vae", data.spec)
    run = model.fit(data, budget="1min")
    x = model.sample(64)

Only what `__all__` names is public. Names are imported when they are first used, so that `import trilemma` and the
command line's help do not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trilemma.check import check_model
    from trilemma.comparison import Report, compare
    from trilemma.core.codec import Codec
    from trilemma.core.errors import CapabilityError, TrilemmaError, UsageError
    from trilemma.core.model import GenerativeModel, ModelConfig, Objective, OptimizerConfig, Step
    from trilemma.core.noise import Noise
    from trilemma.core.registry import create, register
    from trilemma.core.score import Score
    from trilemma.core.spec import Batch, DataSpec
    from trilemma.data import Dataset, load_data
    from trilemma.engine import Run, load, resume

_HOMES = {
    "Batch": "trilemma.core.spec",
    "CapabilityError": "trilemma.core.errors",
    "Codec": "trilemma.core.codec",
    "DataSpec": "trilemma.core.spec",
    "Dataset": "trilemma.data",
    "GenerativeModel": "trilemma.core.model",
    "ModelConfig": "trilemma.core.model",
    "Noise": "trilemma.core.noise",
    "Objective": "trilemma.core.model",
    "OptimizerConfig": "trilemma.core.model",
    "Report": "trilemma.comparison",
    "Run": "trilemma.engine",
    "Score": "trilemma.core.score",
    "Step": "trilemma.core.model",
    "TrilemmaError": "trilemma.core.errors",
    "UsageError": "trilemma.core.errors",
    "check_model": "trilemma.check",
    "compare": "trilemma.comparison",
    "create": "trilemma.core.registry",
    "load": "trilemma.engine",
    "load_data": "trilemma.data",
    "register": "trilemma.core.registry",
    "resume": "trilemma.engine",
}

__all__ = [
    "Batch",
    "CapabilityError",
    "Codec",
    "DataSpec",
    "Dataset",
    "GenerativeModel",
    "ModelConfig",
    "Noise",
    "Objective",
    "OptimizerConfig",
    "Report",
    "Run",
    "Score",
    "Step",
    "TrilemmaError",
    "UsageError",
    "check_model",
    "compare",
    "create",
    "load",
    "load_data",
    "register",
    "resume",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trilemma' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # over the subpackage of the same name, where there is one
    return value


def __dir__() -> list[str]:
    return __all__
