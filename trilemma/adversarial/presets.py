"""The adversarial models of the literature as choices of parts.

`r3gan` is the defaults of the settings and the most stable. Learning rates are ours, for runs of some thousand steps,
and scaled to the budget by the engine's schedule; what a row leaves out, rates and the weights of penalties, follows
from the size of the data (`settings.sizes`). On points and tables all presets have fully connected networks, modulated
ones in style generators.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Preset(NamedTuple):
    """A name, its paper, and the settings that make `GAN` that paper's."""

    name: str
    paper: str
    settings: Mapping[str, Any]


def _adam(lr: float, beta1: float, beta2: float, *, lr_d: float | None = None) -> dict[str, Any]:
    g, d = ({"lr": rate, "betas": (beta1, beta2)} for rate in (lr, lr_d or lr))
    return {"generator": g, "discriminator": d}


_DCGAN = {"architecture": "dcgan", **_adam(1e-3, 0.5, 0.999)}
_BIGGAN = {"architecture": "biggan", "loss": "hinge"}
_STYLEGAN2 = {"architecture": "stylegan2", "loss": "non-saturating"}

PRESETS = (
    Preset(
        "gan",
        "Goodfellow et al. 2014, arXiv:1406.2661",
        {"architecture": "mlp", "loss": "minimax", **_adam(1e-3, 0.5, 0.999)},
    ),
    Preset(
        "ns-gan",
        "Goodfellow et al. 2014, arXiv:1406.2661",
        {"architecture": "mlp", "loss": "non-saturating", **_adam(5e-4, 0.5, 0.999)},
    ),
    Preset("dcgan", "Radford et al. 2016, arXiv:1511.06434", {**_DCGAN, "loss": "non-saturating"}),
    Preset("lsgan", "Mao et al. 2017, arXiv:1611.04076", {**_DCGAN, "loss": "least-squares"}),
    # The paper's bound of 0.01 and rate of 5e-5 want many more steps.
    Preset(
        "wgan",
        "Arjovsky et al. 2017, arXiv:1701.07875",
        {"architecture": "dcgan", "loss": "wasserstein", "clip": 0.1, "turns_d": 5, **_adam(1e-3, 0.0, 0.9)},
    ),
    # Its penalty is that of `sizes`.
    Preset(
        "wgan-gp",
        "Gulrajani et al. 2017, arXiv:1704.00028",
        {"architecture": "residual", "loss": "wasserstein", "turns_d": 5},
    ),
    Preset(
        "hinge-gan",
        "Lim & Ye 2017, arXiv:1705.02894; Miyato et al. 2018, arXiv:1802.05957",
        {**_BIGGAN, "spectral_norm": "discriminator"},
    ),
    Preset(
        "sngan",
        "Miyato et al. 2018, arXiv:1802.05957; Miyato & Koyama 2018, arXiv:1802.05637",
        {**_BIGGAN, "spectral_norm": "discriminator", "turns_d": 5, **_adam(4e-3, 0.0, 0.9, lr_d=5e-4)},
    ),
    Preset(
        "biggan",
        "Brock et al. 2019, arXiv:1809.11096",
        {**_BIGGAN, "spectral_norm": "both", "turns_d": 2},
    ),
    # The mean path length starts at 0, and a stronger pull to it costs short runs their variety.
    Preset("stylegan2", "Karras et al. 2020, arXiv:1912.04958", {**_STYLEGAN2, "path_length": 0.1}),
    Preset("stylegan2-ada", "Karras et al. 2020, arXiv:2006.06676", {**_STYLEGAN2, "augment": "adaptive"}),
    # With augmentation, as its authors train on small data; without it the discriminator learns digits by heart.
    Preset(
        "stylegan3",
        "Karras et al. 2021, arXiv:2106.12423",
        {**_STYLEGAN2, "architecture": "stylegan3", "augment": "adaptive"},
    ),
    Preset("r3gan", "Huang et al. 2024, arXiv:2501.05441", {}),
)
