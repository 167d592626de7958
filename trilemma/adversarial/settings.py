"""Settings of the adversarial family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from trilemma.adversarial.losses import LOSSES, LossName
from trilemma.core.model import ModelConfig, OptimizerConfig
from trilemma.core.spec import DataSpec

Architecture = Literal["mlp", "residual", "dcgan", "biggan", "stylegan2", "stylegan3"]
STYLE: tuple[Architecture, ...] = ("stylegan2", "stylegan3")
"""Architectures with a mapping network."""

MEDIUM_DIMS = 1024
"""Of at most so many they get networks that are narrow enough for a CPU."""
SMALL_DIMS = 256
"""Pictures and signals of at most so many numbers bear larger steps."""


class GANConfig(ModelConfig):
    """Settings of a generator and a discriminator; the defaults are R3GAN's."""

    loss: LossName = Field("relativistic", description=", ".join(LOSSES))
    architecture: Architecture = Field(
        "residual",
        description="mlp, residual, dcgan, biggan, stylegan2 or stylegan3; for points and tables fully connected "
        "layers, modulated ones with stylegan2 and stylegan3",
    )
    z_dim: int = Field(64, ge=1, description="dimensions of the latent z")
    width: int = Field(64, ge=1, description="channels at full resolution, or hidden units of fully connected layers")
    depth: int | None = Field(
        None, ge=0, description="mlp, residual: residual blocks, in all or per resolution; 1 by default"
    )
    w_dim: int | None = Field(None, ge=1, description="style: dimensions of w; z_dim by default")
    mapping_depth: int | None = Field(None, ge=1, description="style: layers of the mapping network, 2 by default")
    output: Literal["skip", "residual"] | None = Field(
        None, description="stylegan2: a picture from each resolution, summed (skip, the default), or from the last one"
    )
    rotation: bool | None = Field(
        None, description="stylegan3: 1x1 kernels and radial filters, equivariant to rotations, too; false by default"
    )
    condition_dim: int = Field(32, ge=1, description="length of the generator's embedding of the condition")
    batch_norm: bool | None = Field(
        None, description="dcgan: batch normalisation in the discriminator; true by default"
    )
    minibatch_std: bool | None = Field(
        None, description="style: the discriminator sees the spread of its batch; true by default"
    )
    spectral_norm: Literal["none", "discriminator", "both"] = Field(
        "none", description="whose weights are divided by their largest singular value"
    )
    r1: float = Field(0.0, ge=0, description="weight gamma of gamma/2 E |grad D(x)|^2 on real x, at the start")
    r2: float = Field(0.0, ge=0, description="the same on generated x")
    gradient_penalty: float = Field(0.0, ge=0, description="weight of E (|grad D| - 1)^2 between real and generated x")
    consistency: float = Field(0.0, ge=0, description="weight of E (D(x) - D(augmented x))^2")
    clip: float | None = Field(None, gt=0, description="bound of the discriminator's weights, after each step")
    path_length: float = Field(0.0, ge=0, description="style: weight of the path-length regulariser")
    penalty_every: int = Field(
        1, ge=1, description="steps between penalties of the discriminator, which then weigh more"
    )
    path_every: int | None = Field(
        None, ge=1, description="style: the same for the path-length regulariser, 4 by default"
    )
    final_penalty: float = Field(
        1.0, ge=0, description="penalties at the end of the budget over those at its start; a cosine between"
    )
    style_mixing: float = Field(0.0, ge=0, le=1, description="style: share of examples made of two w")
    augment: Literal["none", "fixed", "adaptive"] = Field(
        "none", description="augmentation of what the discriminator sees: of rising strength, or by its overfitting"
    )
    augment_strength: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="probability of each transform: at the end if fixed (0.3), at most if adaptive (0.8)",
    )
    augment_speed: float | None = Field(
        None, gt=0, description="adaptive: share of the budget in which the strength can go from 0 to 1, 0.2 by default"
    )
    augmentations: tuple[str, ...] | None = Field(
        None, description="transforms; null: those that the kind of data and the training examples allow"
    )
    turns_d: int = Field(1, ge=1, description="steps of the discriminator per training step")
    turns_g: int = Field(1, ge=1, description="steps of the generator per training step")
    generator: OptimizerConfig = OptimizerConfig(lr=1e-3, betas=(0.0, 0.95))
    discriminator: OptimizerConfig = OptimizerConfig(lr=1e-3, betas=(0.0, 0.95))

    @property
    def penalized(self) -> bool:
        """Whether gradients of D with respect to its input enter its loss."""
        return bool(self.r1 or self.r2 or self.gradient_penalty)

    @model_validator(mode="after")
    def _consistent(self) -> GANConfig:
        arch, style = self.architecture, self.architecture in STYLE
        of_style = ("w_dim", "mapping_depth", "minibatch_std", "path_length", "path_every", "style_mixing")
        without_effect = [
            *((name, "stylegan2 or stylegan3") for name in of_style if getattr(self, name) and not style),
            *([("output", "stylegan2")] if self.output and arch != "stylegan2" else []),
            *([("rotation", "stylegan3")] if self.rotation and arch != "stylegan3" else []),
            *([("batch_norm", "dcgan")] if self.batch_norm is not None and arch != "dcgan" else []),
            *([("depth", "mlp or residual")] if self.depth is not None and arch not in ("mlp", "residual") else []),
        ]
        for name, able in without_effect:
            raise ValueError(f"{name} has no effect with architecture={arch}: it is of {able}")
        if self.path_every is not None and not self.path_length:
            raise ValueError("path_every has no effect with path_length=0")
        if not (self.penalized or self.consistency):
            for name, value, default in (
                ("penalty_every", self.penalty_every, 1),
                ("final_penalty", self.final_penalty, 1.0),
            ):
                if value != default:
                    raise ValueError(f"{name} has no effect without r1, r2, gradient_penalty or consistency")
        if self.augment == "none" and self.augment_strength is not None:
            raise ValueError("augment_strength has no effect with augment=none")
        if self.augment != "adaptive" and self.augment_speed is not None:
            raise ValueError(f"augment_speed has no effect with augment={self.augment}")
        if self.augment == "none" and not self.consistency and self.augmentations is not None:
            raise ValueError("augmentations have no effect with augment=none and consistency=0")
        if self.spectral_norm != "none" and arch in (*STYLE, "residual"):
            raise ValueError(f"spectral_norm is of mlp, dcgan and biggan; {arch} scales its own weights")
        if self.penalized and arch == "dcgan" and self.batch_norm is not False:
            raise ValueError("penalties on gradients are taken per example, which batch_norm mixes: batch_norm=false")
        return self


def sizes(spec: DataSpec, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by the size of the data, the loss and the architecture."""
    arch: Architecture = settings.get("architecture", "residual")
    loss = settings.get("loss", "relativistic")
    flat = spec.kind in ("points", "table")
    small = flat or spec.dims <= SMALL_DIMS
    found = _rates(arch, flat=flat, small=small)
    if loss == "relativistic":
        gamma = 0.2 if flat else 1.0  # the pairing game circles for ever without its penalties
        found |= {"r1": gamma, "r2": gamma}
        if settings.get("r1", gamma) or settings.get("r2", gamma):
            found["final_penalty"] = 0.1
    elif loss == "wasserstein" and "clip" not in settings:
        found["gradient_penalty"] = 1.0 if flat else 10.0  # without a bound of its slopes a critic grows for ever
    elif arch in STYLE:
        found |= {"r1": 0.1 if flat else 1.0}
        if settings.get("r1", 1.0):
            found["penalty_every"] = 4
    if flat:
        found |= {"z_dim": max(2, min(64, spec.dims)), "width": 64}
        return found | ({"depth": 3} if arch in ("mlp", "residual") else {})
    if arch == "stylegan2" and max(spec.shape[1:]) > 32:
        found["style_mixing"] = 0.5  # smaller pictures have no coarse and fine (Karras et al. 2020, arXiv:2006.06676)
    if arch == "mlp":
        return found | {"z_dim": 16 if small else 64, "width": 128 if small else 256, "depth": 2}
    if small:
        return found | {"z_dim": 16, "width": 32 if arch in ("dcgan", "stylegan2") else 16}
    if arch == "residual" and spec.dims <= MEDIUM_DIMS:
        # At twice the width a CPU takes 20 steps in 40 seconds on 28 x 28, as penalties differentiate twice.
        rate = {"lr": 3e-3, "betas": (0.0, 0.95)}
        return found | {"width": 16, "generator": rate, "discriminator": rate}
    return found | {"width": 32 if spec.dims <= MEDIUM_DIMS else 64}


def _rates(arch: Architecture, *, flat: bool, small: bool) -> dict[str, Any]:
    """Learning rates and betas of both players, for some thousand steps; ours."""
    g = d = 5e-3 if arch == "residual" else 2e-3
    beta2 = 0.9 if small else 0.95
    if not small:
        g = d = 1e-3
    if arch in STYLE:
        # Relative to weights of size 1 (equalised learning rate), the same steps are smaller than elsewhere.
        g = d = 1e-2 if small and not flat else 5e-3
        beta2 = 0.99
    elif arch == "biggan" and not flat:
        g, d, beta2 = (4e-3, 1e-3, 0.999) if small else (2e-3, 5e-4, 0.999)
    return {"generator": {"lr": g, "betas": (0.0, beta2)}, "discriminator": {"lr": d, "betas": (0.0, beta2)}}
