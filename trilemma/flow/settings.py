"""Settings of the flow family."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from trilemma.core.model import ModelConfig, OptimizerConfig

Layer = Literal[
    "coupling",
    "autoregressive",
    "residual",
    "masked-convolution",
    "transformer",
    "planar",
    "radial",
    "sylvester",
    "none",
]
Map = Literal[
    "affine", "additive", "spline", "cubic-spline", "logistic-mixture", "bernstein", "sum-of-squares", "monotone"
]
Mixing = Literal["lu", "dense", "householder", "permutation", "reverse", "none"]

SPATIAL: tuple[Layer, ...] = ("coupling", "residual", "masked-convolution", "transformer")
"""Layers that know pictures; the others take them as flat vectors."""

WITHOUT_DEPTH: tuple[Layer, ...] = ("masked-convolution", "planar", "radial", "sylvester", "none")

DIRECT: tuple[Layer, ...] = ("coupling", "autoregressive", "radial")
"""Layers whose inverse is a formula, so that they can be turned round."""

NUMERICAL: tuple[Map, ...] = ("cubic-spline", "logistic-mixture", "bernstein", "sum-of-squares", "monotone")
"""Maps whose inverse iterates."""

BINS: dict[Map, tuple[int, int]] = {
    "spline": (2, 256),
    "cubic-spline": (2, 256),
    "bernstein": (2, 64),  # single precision does not hold the binomials of much higher degrees
    "sum-of-squares": (2, 8),  # the map grows as x^(bins + 1)
}
"""Least and most of the maps that have bounds of their own."""


class FlowConfig(ModelConfig):
    """Settings of a normalizing flow: steps of a linear map, a normalisation and a layer."""

    layer: Layer = Field(
        "coupling",
        description="coupling, autoregressive, residual, masked-convolution, transformer, "
        "planar, radial, sylvester or none",
    )
    elementwise: Map | None = Field(
        None,
        description="map of a coupling or autoregressive layer: affine, additive, spline (the default), cubic-spline, "
        "logistic-mixture, bernstein, sum-of-squares, monotone",
    )
    mixing: Mixing = Field(
        "lu", description="linear map before each layer: lu, dense, householder, permutation, reverse, none"
    )
    marginals: int | None = Field(
        None, ge=0, description="most knots of a first map to normal margins; null: 1024 for tables, else 0, none"
    )
    norm: Literal["each", "last", "none"] = Field(
        "each", description="activation normalisation: before each layer, last, or none"
    )
    inverted: bool = Field(False, description="turn the flow round: sampling is then the direct way")
    steps: int = Field(6, ge=1, description="layers; per scale where there are scales, and at least 2 there")
    multiscale: bool | None = Field(
        None, description="squeezed scales for pictures and signals; null: of more than 256 numbers"
    )
    scales: int = Field(3, ge=1, description="most scales of the multi-scale architecture")
    checkerboard: bool = Field(
        False, description="multi-scale couplings: the first half of each scale's masks are checkerboards"
    )
    bins: int | None = Field(
        None, ge=1, le=256, description="bins, components, degree or hidden units of the elementwise map; null: by size"
    )
    bound: float | None = Field(
        None, gt=0, description="splines are the identity outside [-bound, bound]; 5 by default"
    )
    width: int = Field(64, ge=1, description="hidden units or channels of each network; dimensions of sylvester")
    depth: int = Field(1, ge=0, description="residual blocks of each network")
    lipschitz: float | None = Field(None, gt=0, lt=1, description="residual: bound of each network's norm, 0.97")
    series: Literal["roulette", "truncated", "exact"] | None = Field(
        None, description="residual: how log det is summed: roulette (unbiased, the default), truncated, exact"
    )
    terms: int | None = Field(
        None, ge=1, description="residual: of the series, 20 by default; the roulette goes on beyond"
    )
    patch: int | None = Field(
        None, ge=1, description="transformer: side of a patch; null: 2 where it tiles a picture, else 1"
    )
    heads: int | None = Field(None, ge=1, description="transformer: heads of attention, 4 by default")
    noise: float = Field(
        0.0, ge=0, description="std of Gaussian noise on the training data, taken off samples by one denoising step"
    )
    dequantization: Literal["uniform", "variational"] = Field(
        "uniform", description="of pictures with levels: uniform, or variational (learned)"
    )
    context_dim: int = Field(32, ge=1, description="size of the embedding of the condition")
    optimizer: OptimizerConfig = Field(OptimizerConfig(lr=2e-3, weight_decay=0.01), description="AdamW settings")

    @model_validator(mode="after")
    def _consistent(self) -> FlowConfig:
        if self.marginals == 1:
            raise ValueError("marginals is 0, or at least 2 knots")
        of_maps = ("coupling", "autoregressive")
        splines = ("spline", "cubic-spline", "bernstein", None)
        for name, given, why in (
            (
                "elementwise",
                self.elementwise is not None and self.layer not in of_maps,
                "layer=coupling or autoregressive",
            ),
            ("bins", self.bins is not None and self.layer not in of_maps, "layer=coupling or autoregressive"),
            ("bins", self.bins is not None and self.elementwise in ("affine", "additive"), "another elementwise map"),
            (
                "bound",
                self.bound is not None and (self.layer not in of_maps or self.elementwise not in splines),
                "splines",
            ),
            ("lipschitz", self.lipschitz is not None and self.layer != "residual", "layer=residual"),
            ("series", self.series is not None and self.layer != "residual", "layer=residual"),
            ("terms", self.terms is not None and (self.layer != "residual" or self.series == "exact"), "a series"),
            ("patch", self.patch is not None and self.layer != "transformer", "layer=transformer"),
            ("heads", self.heads is not None and self.layer != "transformer", "layer=transformer"),
            ("checkerboard", self.checkerboard and self.layer != "coupling", "layer=coupling"),
            ("checkerboard", self.checkerboard and self.multiscale is False, "scales (multiscale)"),
            ("norm", self._given("norm") and self.layer == "transformer", "layers between which it could stand"),
            ("mixing", self._given("mixing") and self.layer == "transformer", "layers between which it could stand"),
            ("scales", self._given("scales") and self.multiscale is False, "scales (multiscale)"),
            ("width", self._given("width") and self.layer in ("planar", "radial", "none"), "networks"),
            ("depth", self._given("depth") and self.layer in WITHOUT_DEPTH, "networks of several blocks"),
            ("context_dim", self._given("context_dim") and not self.conditional, "conditional=true"),
        ):
            if given:
                raise ValueError(f"{name} has no effect without {why}")
        if self.multiscale and (self.layer not in SPATIAL or self.layer == "transformer"):
            raise ValueError(f"multiscale=true needs layer=coupling, residual or masked-convolution, not {self.layer}")
        if self.inverted and (self.layer not in DIRECT or self.elementwise in NUMERICAL):
            what = self.layer if self.layer not in DIRECT else f"elementwise={self.elementwise}"
            raise ValueError(f"inverted=true needs a layer that is exact both ways, not {what}")
        if self.inverted and self.norm != "none":
            raise ValueError("inverted=true has no data where its normalisations stand: give norm=none")
        if self.inverted and self.noise:
            raise ValueError("noise needs the quick direction for the density: it does not go with inverted=true")
        if self.noise and self.dequantization == "variational":
            raise ValueError("noise is for real numbers: dequantization=variational starts from integers")
        self._check_bins()
        return self

    def _given(self, name: str) -> bool:
        """Whether a setting differs from its default."""
        return bool(getattr(self, name) != type(self).model_fields[name].default)

    def _check_bins(self) -> None:
        least, most = BINS.get(self.elementwise or "spline", (1, 256))
        if self.bins is not None and not least <= self.bins <= most:
            raise ValueError(
                f"elementwise={self.elementwise or 'spline'} takes {least} to {most} bins, not {self.bins}"
            )
