"""`evaluate RUN`: the same measurements as a comparison makes, for one finished run."""

from __future__ import annotations

from dataclasses import replace

from trilemma.comparison.compare import make_extractor
from trilemma.comparison.worker import MAX_SAMPLES, SCORED
from trilemma.core.errors import UsageError
from trilemma.core.spec import Batch
from trilemma.core.storage import replace_file, to_json
from trilemma.data import Dataset
from trilemma.data.dataset import TensorSplit
from trilemma.engine import Run
from trilemma.engine.runtime import choose_device
from trilemma.metrics import Estimate, pixel_pca
from trilemma.metrics.catalogue import METRICS, plain
from trilemma.metrics.evaluate import Evaluator, mean_log_likelihood
from trilemma.metrics.memorization import NeighbourTest

INVERTED = 256
"""Examples whose round trip is taken."""


def evaluate_run(
    run: Run,
    data: Dataset | None = None,
    examples: Batch | None = None,
    *,
    seed: int = 0,
    features: str = "default",
) -> tuple[dict[str, Estimate], NeighbourTest]:
    """Samples against held-out data, the held-out likelihood, and the test for copies.

    The numbers are also written to RUN/scores.json.

    Arguments:
        data: what the run was trained on; by default loaded from where it came from. Features are fitted on its
            training split, and copies are looked for there.
        examples: real examples of the same kind to measure against, instead of the held-out ones of `data`.
        seed: of the samples.
        features: see `compare`.

    Raises:
        UsageError: the data are of another spec, or were in memory and are not given.
    """
    if data is None:
        data = run.load_data()
    if data.spec != run.spec:
        raise UsageError(f"{run.path} models {run.spec.describe()}, the data are {data.spec.describe()}")
    if examples is not None:
        data = replace(data, test=TensorSplit(examples.x, examples.condition))
    model = run.model().to(choose_device("auto"))
    extractor, second = make_extractor(features, data), pixel_pca(data.train, data.spec)
    n = min(len(data.test), MAX_SAMPLES)
    evaluator = Evaluator(data, extractor, second, n)
    test = data.test.head(max(n, SCORED))
    condition = test.condition if model.condition is not None else None
    generated = model.sample(n, None if condition is None else condition[:n], generator=seed).cpu()
    measured = evaluator.measure(generated)
    metrics = evaluator.describe(measured.metrics)
    if "log_prob" in model.abilities():
        scored = None if condition is None else condition[:SCORED]
        metrics["log_likelihood"] = mean_log_likelihood(model.log_prob(test.x[:SCORED], scored), data.spec)
    if model.bijective:
        scored = None if condition is None else condition[:INVERTED]
        worst = float(model.round_trip(test.x[:INVERTED], scored).max())
        metrics["round_trip"] = plain("round_trip", worst, f"largest of {len(test.x[:INVERTED])} examples")
    metrics = {name: metrics[name] for name in METRICS if name in metrics}
    split = "test" if examples is None else "examples given"
    scores = {"data": data.fingerprint, "split": split, "seed": seed, "extractor": extractor.id}
    scores |= {"metrics": {name: e.model_dump(mode="json") for name, e in metrics.items()}}
    scores["copying"] = {"share": measured.copying.share, "p_value": measured.copying.p_value}
    replace_file(run.path / "scores.json", to_json(scores))
    return metrics, measured.copying
