"""The page of a comparison: complete, escaped, without requests, readable on a phone, in light and dark."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trilemma.comparison.figures import Looks
from trilemma.comparison.page import format_bounds, picture, render
from trilemma.comparison.report import Advice, CurvePoint, Moment, Neighbours, Pair, Report, Row
from trilemma.data.render import PALETTE
from trilemma.metrics import Estimate
from trilemma.metrics.catalogue import METRICS

EVIL = "kde<script>alert(1)</script> $x$ -->"
CHROMIUM = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium or chromium-browser on this machine")


def number(name: str, value: float, se: float | None = None, **more: Any) -> Estimate:
    info = METRICS[name]
    made: dict[str, Any] = {
        "value": value,
        "se": se,
        "ci": None if se is None else (value - 1.96 * se, value + 1.96 * se),
        "n": {"generated": 2000, "reference": 2000} if info.of_samples else 10,
        "unit": info.unit,
        "higher_is_better": info.better == "higher",
        "extractor": "random-features" if info.of_samples else None,
        "method": "grouped delete-block jackknife" if info.of_samples else "median of 10",
    }
    return Estimate(**(made | more))


def of_samples(quality: float, coverage: float, frechet: float) -> dict[str, Estimate]:
    overall = 2.0 * quality * coverage / (quality + coverage)
    return {
        "overall": number("overall", overall, 0.012),
        "clipped_density": number("clipped_density", quality, 0.015),
        "clipped_coverage": number("clipped_coverage", coverage, 0.02),
        "frechet": number("frechet", frechet, 0.03 * frechet),
        "precision": number("precision", quality * 0.98, 0.01),
        "recall": number("recall", coverage * 0.97, 0.01),
    }


def of_cost(rate: float, latency: float, evaluations: int, seconds: float) -> dict[str, Estimate]:
    return {
        "samples_per_second": number("samples_per_second", rate, quartiles=(0.9 * rate, 1.1 * rate)),
        "latency": number("latency", latency, quartiles=(0.9 * latency, 1.1 * latency)),
        "evaluations": number("evaluations", evaluations),
        "training_seconds": number("training_seconds", seconds),
        "parameters": number("parameters", 1.2e6),
    }


def likelihood(value: float, kind: str) -> dict[str, Estimate]:
    return {"log_likelihood": number("log_likelihood", value, 0.013, unit="nats/dim", kind=kind)}


def write_pictures(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("real", "kde", "ddpm", "near-train", "near-test"):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{name}.png")


def neighbours(shift: int, p_value: float, verdict: str) -> Neighbours:
    shape = np.exp(-(((np.arange(24) - 12.0) / 4.0) ** 2)) * 200.0
    return Neighbours(
        train="near-train.png",
        test="near-test.png",
        edges=[0.25 * i for i in range(25)],
        generated=np.roll(shape, -shift).astype(int).tolist(),
        held_out=shape.astype(int).tolist(),
        share=0.5 + 0.04 * shift,
        expected=0.5,
        p_value=p_value,
        verdict=verdict,
    )


def example_rows() -> list[Row]:
    kde = Row(
        model=EVIL, family="classical", status="ok", seeds=[0],
        metrics=of_samples(0.97, 0.78, 3.1) | of_cost(2.1e6, 8e-4, 1, 0.4) | likelihood(-1.234, "exact"),
        skill={"frechet": number("frechet", 0.93, 0.02)},
        alarms=["Memorization: 81% of its closest samples are nearest to training examples (p = 2e-06)."],
        neighbours=neighbours(7, 2e-6, "It copies training data"), samples="kde.png",
    )  # fmt: skip
    curve = [
        CurvePoint(knob="steps", setting=s, default=s == 100, metrics={
            **{k: v for k, v in of_samples(q, c, f).items() if k.startswith("clipped")},
            "latency": number("latency", 0.002 * s), "evaluations": number("evaluations", s),
        })
        for s, q, c, f in ((10, 0.41, 0.62, 14), (30, 0.7, 0.8, 8), (100, 0.853, 0.868, 4.27), (300, 0.86, 0.88, 4.2))
    ]  # fmt: skip
    ddpm = Row(
        model="ddpm", family="diffusion", status="ok", seeds=[0],
        metrics=of_samples(0.853, 0.868, 4.27) | of_cost(310.0, 0.21, 100, 61.2) | likelihood(-1.31, "lower_bound"),
        skill={"frechet": number("frechet", 0.89, 0.02)}, curve=curve,
        other={"frechet": number("frechet", 5.6, 0.2)}, other_weights="last",
        history=[
            Moment(seconds=t, step=10 * t, frechet=number("frechet", 4.0 + 90.0 * math.exp(-t / 9.0), 0.4))
            for t in (4, 8, 15, 30, 60)
        ],
        neighbours=neighbours(0, 0.43, "No sign of copying; fewer than 3% of copies could not be seen"),
        samples="ddpm.png",
    )  # fmt: skip
    vae = Row(
        model="vae", family="autoencoder", status="ok", seeds=[0],
        metrics=of_samples(0.34, 0.61, 21.0) | of_cost(9.5e4, 9e-4, 1, 60.3) | likelihood(-1.62, "lower_bound"),
        skill={"frechet": number("frechet", -0.2, 0.02)},
        history=[
            Moment(seconds=t, step=90 * t, frechet=number("frechet", 20.0 + 60.0 * math.exp(-t / 5.0), 0.6))
            for t in (4, 8, 15, 30, 60)
        ],
        neighbours=neighbours(1, 0.2, "No sign of copying"), samples="missing.png",
    )  # fmt: skip
    failed = Row(
        model="nsf", family="flow", status="failed", reason="the loss became NaN at step 12; lower the learning rate",
        seeds=[0], metrics={},
    )  # fmt: skip
    return [kde, ddpm, vae, failed]


def example_report(folder: Path) -> Report:
    """A ceiling, a floor, four models: one that copies and has an evil name, one with everything, one failed."""
    write_pictures(folder)
    rows = example_rows()
    ceiling = Row(model="ceiling", family="reference", status="ok", seeds=[], metrics=of_samples(0.998, 1.003, 1.87))
    floor = Row(model="floor", family="reference", status="ok", seeds=[0],
                metrics=of_samples(0.06, 0.11, 130.0) | of_cost(4e6, 2e-4, 1, 0.1))  # fmt: skip
    pairs = [
        Pair(metric="frechet", a=EVIL, b="ddpm", difference=number("frechet", -1.17, 0.2), better=EVIL),
        Pair(metric="frechet", a=EVIL, b="vae", difference=number("frechet", -17.9, 0.5), better=EVIL),
        Pair(metric="frechet", a="ddpm", b="vae", difference=number("frechet", -16.73, 0.5), better="ddpm"),
        Pair(metric="recall", a="ddpm", b="vae", difference=number("recall", 0.02, 0.03), better=None),
    ]  # fmt: skip
    return Report(
        data={"name": "moons", "description": "a table of 2 numeric columns", "fingerprint": "4f1c" * 16,
              "splits": {"train": 8000, "validation": 1000, "test": 2000}, "notes": ["3 duplicates stay"]},
        settings={"budget": "60 s", "seeds": [0], "samples": 2000},
        extractor={"id": "random-features", "description": "a random convolution, 256 numbers", "dim": 256},
        second={"id": "pca", "description": "principal components, 16 numbers", "dim": 16},
        environment={"processor": "a processor", "cores": 2, "gpu": [], "python": "3.11", "packages": {"torch": "2"}},
        rows=[ceiling, *rows, floor], pairs=pairs, pareto={EVIL: 0.93, "ddpm": 0.985, "vae": 0.0},
        notes=["These features are blind to colour."],
        disagreements=["quality: vae beats ddpm, but in principal components ddpm beats vae."],
        advice=[
            Advice(purpose="best samples", model="ddpm", reasons=["Its samples are nearest to held-out data"],
                   doubts=["One training run each: another seed could change the order", f"{EVIL} is left out"]),
            Advice(purpose="fastest", model=EVIL, reasons=["2.1e+06 samples per second."], doubts=[]),
            Advice(purpose="density and anomaly detection", model=EVIL, reasons=["The best likelihood."], doubts=[]),
            Advice(purpose="latent editing", model=None, reasons=["No model encodes and decodes."], doubts=[]),
        ],
        real_samples="real.png", folder=str(folder),
    )  # fmt: skip


class Page(HTMLParser):
    """All tags with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    handle_startendtag = handle_starttag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_page_asks_for_nothing_and_escapes_names(tmp_path: Path) -> None:
    text = render(example_report(tmp_path))
    page = Page(text)
    for _, attributes in page.tags:
        for name in ("src", "href"):
            target = attributes.get(name) or "#"
            assert target.startswith(("data:", "#")), target
    assert all(target.startswith(("#", "data:")) for target in re.findall(r"url\(['\"]?([^)]*)", text))
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert "<script" not in text
    assert not page.all("script")
    assert EVIL in page.text  # in the table, letter by letter
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | {a["href"] for a in page.all("use")}
    assert {str(name).removeprefix("#") for name in used} <= set(ids)


def test_figures_say_what_they_show(tmp_path: Path) -> None:
    page = Page(render(example_report(tmp_path)))
    assert len(page.all("figure")) == len(page.all("img")) + len(page.all("svg")) == 9 + 8
    assert all(image.get("alt") for image in page.all("img"))
    assert all(svg.get("role") == "img" and len(svg.get("aria-label") or "") > 40 for svg in page.all("svg"))
    spoken = " ".join(str(svg["aria-label"]) for svg in page.all("svg"))
    for words in ("ddpm 0.853 (0.824 to 0.882)", "quality 0.41 at 10", f"Pareto front: ddpm, {EVIL}.", "4.11 at 60 s"):
        assert words in spoken, words


def test_numbers_intervals_and_verdicts_stand_in_the_page(tmp_path: Path) -> None:
    text = Page(render(example_report(tmp_path))).text
    for shown in (
        "0.853 ± 0.015", "0.824 to 0.882", "≥ −1.310 ± 0.013", "2.1M", "skill 0.89", "skill −0.20",
        "failed: the loss became NaN at step 12", "It copies training data.", "nearest to held-out data.",
        "These features are blind", "principal components ddpm beats vae", "5.60 ± 0.20", "−1.17 ± 0.20", "no model",
    ):  # fmt: skip
        assert shown in text, shown


def test_equal_reports_give_equal_pages(tmp_path: Path) -> None:
    assert render(example_report(tmp_path)) == render(example_report(tmp_path))


def test_report_with_a_single_bare_row_renders(tmp_path: Path) -> None:
    full = example_report(tmp_path)
    bare = {
        "data": {"name": "d"},
        "settings": {"budget": "1 s", "samples": 10},
        "environment": {},
        "extractor": {"id": "x"},
    }
    for metrics in (
        {}, {"clipped_density": number("clipped_density", math.nan, math.nan)}, of_cost(0.0, 0.0, 1, 0.0),
        {name: number(name, 0.5) for name in METRICS}, of_samples(0.5, 0.5, 0.0),
    ):  # fmt: skip
        row = Row(model="vae", family="autoencoder", status="ok", seeds=[], metrics=metrics)
        assert "vae" in Page(render(full.model_validate({**bare, "rows": [row]}))).text


def test_pictures_come_from_the_report_only(tmp_path: Path) -> None:
    inside, outside = tmp_path / "report", tmp_path / "secret.png"
    inside.mkdir()
    write_pictures(inside)
    outside.write_bytes(b"secret")
    (inside / "link.png").symlink_to(outside)
    assert (picture(inside, "real.png") or "").startswith("data:image/png;base64,")
    assert [picture(inside, p) for p in (None, "none.png", "../secret.png", str(outside), "link.png")] == [None] * 5


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2.2."""
    parts = [int(colour[i : i + 2], 16) / 255.0 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_colours_read_on_white_and_on_dark() -> None:
    for colour in PALETTE:
        for ground in ("#f4f6f8", "#1d2228"):
            light, dark = sorted((luminance(colour), luminance(ground)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 3.0, (colour, ground)


def test_a_model_keeps_its_colour_when_the_order_changes(tmp_path: Path) -> None:
    report = example_report(tmp_path)
    turned = report.model_copy(update={"rows": report.rows[::-1]})
    assert [Looks(report).colour(m) for m in ("ddpm", "vae")] == [Looks(turned).colour(m) for m in ("ddpm", "vae")]


def test_intervals_are_as_long_as_their_width_allows() -> None:
    assert format_bounds("frechet", number("frechet", 12.3, 0.5)) == "11.32 to 13.28"
    assert format_bounds("latency", number("latency", 0.002, quartiles=(0.0018, 0.0022))) == "1.8 to 2.2 ms"
    assert (
        format_bounds("samples_per_second", number("samples_per_second", 9.0, quartiles=(900.0, 1100.0)))
        == "900 to 1.1k"
    )
    assert format_bounds("frechet", number("frechet", 1.0)) == ""


def chromium(tmp_path: Path, file: Path, *switches: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr",
               f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", *switches,
               file.as_uri()]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def phone(tmp_path: Path, page: str) -> Path:
    """The page in a frame of 360 pixels, because a window cannot be that narrow; the page says how wide it would be."""
    say = "<script>parent.postMessage([document.documentElement.scrollWidth, document.body.scrollHeight], '*')</script>"
    (tmp_path / "copy.html").write_text(page.replace("</body>", f"{say}</body>"))
    frame = tmp_path / "phone.html"
    frame.write_text(
        "<!doctype html><meta name=color-scheme content='light dark'><body style='margin:0'><p id=width hidden></p>"
        "<script>onmessage = e => document.getElementById('width').textContent = e.data.join(' ')</script>"
        "<iframe src=copy.html style='width:360px;height:16000px;border:0'></iframe>"
    )
    return frame


def asked_by(page: Path, tmp_path: Path) -> set[str]:
    """What a page made the browser load; the browser's own business has no origin."""
    log = tmp_path / "net.json"
    done = chromium(tmp_path, page, f"--log-net-log={log}", "--dump-dom")
    assert "</html>" in done.stdout
    assert "CONSOLE" not in done.stderr, done.stderr
    record = json.loads(log.read_text())
    kind = record["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    starts = [event["params"] for event in record["events"] if event["type"] == kind and "url" in event["params"]]
    return {p["url"] for p in starts if p["initiator"] != "not an origin" and not p["url"].startswith("data:")}


@needs_chromium
def test_browser_makes_no_request_and_logs_no_error(tmp_path: Path) -> None:
    page, caught = tmp_path / "report.html", tmp_path / "caught.html"
    example_report(tmp_path).save(page)
    assert asked_by(page, tmp_path) == set()
    caught.write_text("<html><link rel=prefetch href='http://127.0.0.1:9/x'></html>")  # the log does show requests
    assert asked_by(caught, tmp_path) == {"http://127.0.0.1:9/x"}


@needs_chromium
def test_page_fits_a_phone_and_knows_light_and_dark(tmp_path: Path) -> None:
    page = render(example_report(tmp_path))
    frame = phone(tmp_path, page)
    found = re.search(r'id="width" hidden="">(\d+) (\d+)<', chromium(tmp_path, frame, "--dump-dom").stdout)
    assert found is not None
    assert int(found[1]) <= 360
    (tmp_path / "report.html").write_text(page)
    for name, scheme in (("light", ()), ("dark", ("--force-dark-mode",))):
        for width, file in ((360, frame), (1280, tmp_path / "report.html")):
            target = tmp_path / f"{name}-{width}.png"
            chromium(tmp_path, file, f"--screenshot={target}", f"--window-size={max(width, 500)},3000", *scheme)
            pixel = Image.open(target).convert("L").getpixel((2, 2))
            assert isinstance(pixel, int)
            assert pixel > 250 if name == "light" else pixel < 40, (name, width, pixel)


def test_style_covers_both_schemes(tmp_path: Path) -> None:
    text = html.unescape(render(example_report(tmp_path)))
    assert "prefers-color-scheme: dark" in text
    assert "color-scheme: light dark" in text
