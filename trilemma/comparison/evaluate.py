"""`evaluate RUN`: the same measurements as a comparison makes, for one finished run."""

from __future__ import annotations

from trilemma.comparison.worker import MAX_SAMPLES, SCORED
from trilemma.core.errors import UsageError
from trilemma.core.storage import replace_file, to_json
from trilemma.data import Dataset
from trilemma.engine import Run
from trilemma.engine.runtime import choose_device
from trilemma.metrics import Estimate, evaluate_samples, fit_extractor, mean_log_likelihood


def evaluate_run(run: Run, data: Dataset | None = None, *, seed: int = 0) -> dict[str, Estimate]:
    """Samples against held-out data in features fitted on the training split, and the held-out likelihood.

    The numbers are also written to RUN/scores.json.

    Arguments:
        data: what to measure against; by default the run's own data, loaded from where they came from.
        seed: of the samples.

    Raises:
        UsageError: the data are of another spec, or were in memory and are not given.
    """
    if data is None:
        data = run.load_data()
    if data.spec != run.spec:
        raise UsageError(f"{run.path} models {run.spec.describe()}, the data are {data.spec.describe()}")
    model = run.model().to(choose_device("auto"))
    test = data.test.head(MAX_SAMPLES)
    extractor = fit_extractor(data.train, data.spec, seed=0)
    condition = test.condition if model.condition is not None else None
    generated = model.sample(len(test.x), condition, generator=seed).cpu()
    metrics = evaluate_samples(generated, test.x, extractor)
    if "log_prob" in model.abilities():
        scored = None if condition is None else condition[:SCORED]
        metrics["log_likelihood"] = mean_log_likelihood(model.log_prob(test.x[:SCORED], scored), data.spec)
    scores = {"data": data.fingerprint, "split": "test", "seed": seed, "extractor": extractor.id}
    scores |= {"metrics": {name: e.model_dump(mode="json") for name, e in metrics.items()}}
    replace_file(run.path / "scores.json", to_json(scores))
    return metrics
