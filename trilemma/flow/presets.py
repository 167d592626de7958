"""The flows of the literature as choices of parts.

`nsf` is the defaults of the settings: on tables and small pictures it is the best of them. On tables all of them begin
with the margins (`trilemma.flow.marginal`), which no paper has; marginals=0 leaves them out. Learning rates are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from trilemma.core.model import GenerativeModel
from trilemma.flow.continuous import FFJORD
from trilemma.flow.model import Flow, VariationalFlow
from trilemma.flow.tabak_turner import TabakTurner


class Preset(NamedTuple):
    """A name, its paper, and the settings that make `model` that paper's."""

    name: str
    paper: str
    settings: Mapping[str, Any]
    model: type[GenerativeModel] = Flow


_SWAP = {"mixing": "none"}
"""Couplings swap halves by themselves."""

_RESIDUAL = {"layer": "residual", "mixing": "none", "steps": 8, "depth": 2, "optimizer": {"lr": 1e-2}}

PRESETS = (
    Preset(
        "linear-flow",
        "Kingma & Dhariwal 2018, arXiv:1807.03039",
        {"layer": "none", "steps": 1, "optimizer": {"lr": 1e-2}},
    ),
    Preset("planar", "Rezende & Mohamed 2015, arXiv:1505.05770", {**_SWAP, "layer": "planar", "steps": 16}),
    Preset("nice", "Dinh et al. 2015, arXiv:1410.8516", {**_SWAP, "elementwise": "additive", "norm": "last"}),
    Preset("realnvp", "Dinh et al. 2017, arXiv:1605.08803", {**_SWAP, "elementwise": "affine", "checkerboard": True}),
    Preset("glow", "Kingma & Dhariwal 2018, arXiv:1807.03039", {"elementwise": "affine"}),
    Preset(
        "maf",
        "Papamakarios et al. 2017, arXiv:1705.07057",
        {"layer": "autoregressive", "elementwise": "affine", "mixing": "reverse"},
    ),
    Preset(
        "iaf",
        "Kingma et al. 2016, arXiv:1606.04934",
        {"layer": "autoregressive", "elementwise": "affine", "mixing": "reverse", "inverted": True, "norm": "none"},
    ),
    Preset("nsf", "Durkan et al. 2019, arXiv:1906.04032", {}),
    Preset(
        "naf",
        "Huang et al. 2018, arXiv:1804.00779",
        {
            "layer": "autoregressive",
            "elementwise": "monotone",
            "mixing": "reverse",
            "steps": 3,
            "optimizer": {"lr": 5e-3},
        },
    ),
    Preset("flow++", "Ho et al. 2019, arXiv:1902.00275", {"elementwise": "logistic-mixture"}, VariationalFlow),
    Preset("i-resnet", "Behrmann et al. 2019, arXiv:1811.00995", {**_RESIDUAL, "series": "truncated", "terms": 10}),
    Preset("residual-flow", "Chen et al. 2019, arXiv:1906.02735", {**_RESIDUAL, "series": "roulette"}),
    Preset(
        "mintnet",
        "Song et al. 2019, arXiv:1907.07945",
        {"layer": "masked-convolution", "mixing": "none", "width": 8, "optimizer": {"lr": 1e-2}},
    ),
    Preset("ffjord", "Grathwohl et al. 2019, arXiv:1810.01367; Lipman et al. 2023, arXiv:2210.02747", {}, FFJORD),
    Preset("tabak-turner", "Tabak & Turner 2013, CPAM 66", {}, TabakTurner),
    Preset(
        "tarflow",
        "Zhai et al. 2024, arXiv:2412.06329",
        {
            "layer": "transformer",
            "steps": 4,
            "depth": 2,
            "noise": 0.05,
            "optimizer": {"lr": 1e-3},
        },
    ),
)
