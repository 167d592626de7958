"""Energy-based models."""

from trilemma.core.registry import register
from trilemma.energy.ais import anneal, linear_betas, log_mean_exp
from trilemma.energy.rbm import RBM

__all__ = ["RBM", "anneal", "linear_betas", "log_mean_exp"]

register("rbm", RBM, family="energy", paper="Smolensky 1986; Tieleman 2008, ICML")
