"""Trains any model that declares objectives; knows nothing about families."""

from trilemma.engine.config import TrainConfig
from trilemma.engine.fit import resume, train
from trilemma.engine.run import Run, load

__all__ = ["Run", "TrainConfig", "load", "resume", "train"]
