"""The commands. Each imports what it needs when it runs, so that --help is instant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from trilemma.cli.arguments import data_settings, file_condition, is_finished, label_condition, load_source, report_run
from trilemma.cli.demo import demo

LENGTHS = ("steps", "images", "epochs", "budget")
"""The settings of a recipe's training for which --steps and --budget stand in."""

app = typer.Typer(
    name="trilemma",
    help="Train, sample, score and honestly compare every family of deep generative model on your own data.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="--debug, anywhere, shows the traceback of an error.",
)

# Optional[...] because typer reads annotations when it runs, also on Python 3.11 with postponed evaluation.
Data = Annotated[str, typer.Argument(help="A built-in name, a folder of pictures, a file, or hf://owner/name.")]
RunPath = Annotated[Path, typer.Argument(help="A run folder (or a saved model).", metavar="RUN")]
Settings = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Model settings (hidden=256), training settings (train.batch_size=64), data settings (data.size=32).",
    ),
]
DataSettings = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Data settings: size=32, label=COLUMN, given=[A,B], types.zip=categorical."
    ),
]
Features = Annotated[
    str,
    typer.Option("--features", help="default, inception[:FILE.safetensors] or dinov2:FILE.safetensors."),
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Decides every random draw.")]


@app.command()
def compare(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA|RUN|REPORT", help="Data to train on; or a finished run or comparison, and more of them."
        ),
    ],
    settings: Settings = None,
    models: Annotated[Optional[str], typer.Option("--models", help="Comma-separated names; see `models`.")] = None,  # noqa: UP045
    budget: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--budget", help="Training time of each model, such as 30s or 5min; 60s by default."),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Training runs of each model.")] = 1,
    out: Annotated[Optional[Path], typer.Option("--out", help="Folder; compare-DATA by default.")] = None,  # noqa: UP045
    features: Features = "default",
    cluster: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--cluster", help="Train on a Ray cluster at this address; local starts one."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a strong model of each family on DATA for the same time; print a leaderboard, write report.html.

    Settings of one model are written vae.latent_dim=8; data settings data.size=32. Started again with the same
    folder, an interrupted comparison goes on where it stopped.

    With finished runs or comparisons in the place of DATA (RUN [RUN ...]), these are put side by side without
    training again.
    """
    from trilemma.cli.output import print_json
    from trilemma.comparison import compare as run_comparison
    from trilemma.comparison.compare import DEFAULT_BUDGET, compare_runs
    from trilemma.core.config import parse_overrides
    from trilemma.core.errors import UsageError

    if is_finished(data):
        for option, value in (
            ("--models", models),
            ("--cluster", cluster),
            ("--budget", budget),
            ("--seeds", seeds if seeds > 1 else None),
        ):
            if value is not None:
                raise UsageError(f"{option} has no effect on runs that are finished already")
        report = compare_runs([data, *(settings or [])], out=out, features=features)
    else:
        overrides = parse_overrides(settings or [])
        loaded = load_source(data, overrides.pop("data", {}))
        for name, value in overrides.items():
            if not isinstance(value, dict):
                raise UsageError(f"setting {name!r}: in a comparison, write whose it is, for example vae.{name}=...")
        names = None if models is None else [m.strip() for m in models.split(",") if m.strip()]
        report = run_comparison(
            loaded,
            names,
            budget=budget or DEFAULT_BUDGET,
            seeds=seeds,
            out=out,
            settings=overrides,
            features=features,
            cluster=cluster,
        )
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        report.print()
        print(f"report: {Path(report.folder) / 'report.html'}")
    if all(row.status != "ok" for row in report.rows if row.family != "reference"):
        raise typer.Exit(1)


@app.command()
def train(
    model: Annotated[str, typer.Argument(help="A name from `trilemma models`, or a recipe (FILE.yaml).")],
    data: Data,
    settings: Settings = None,
    steps: Annotated[Optional[int], typer.Option("--steps", min=1, help="Optimisation steps.")] = None,  # noqa: UP045
    budget: Annotated[Optional[str], typer.Option("--budget", help="Training time, such as 30s or 10min.")] = None,  # noqa: UP045
    seed: Seed = 0,
    out: Annotated[Optional[Path], typer.Option("--out", help="The run folder; runs/MODEL-DATA by default.")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """Train MODEL on DATA and leave a run folder."""
    from trilemma.core.config import merge, parse_overrides, validate
    from trilemma.core.errors import UsageError
    from trilemma.core.registry import create, find
    from trilemma.data.given import check_use
    from trilemma.engine import TrainConfig
    from trilemma.engine import train as fit
    from trilemma.engine.recipe import is_recipe, read_recipe

    overrides = parse_overrides(settings or [])
    if is_recipe(model):
        recipe = read_recipe(model)
        model = recipe.model
        own = {k: v for k, v in recipe.train.items() if not (k in LENGTHS and (steps or budget))}
        overrides = merge({**recipe.settings, "train": own}, overrides)
    find(model)  # an unknown name is said before data are loaded
    loaded = load_source(data, overrides.pop("data", {}))
    training = overrides.pop("train", {})
    if not isinstance(training, dict):
        raise UsageError("training settings are written train.KEY=VALUE, for example train.batch_size=64")
    for reserved in ("name", "spec"):
        if reserved in overrides:
            raise UsageError(f"model {model}: unknown setting {reserved!r}; `trilemma info {model}` lists the settings")
    validate(TrainConfig, training, "train")  # an unknown key is said here, before it can meet an argument of train
    for key, value in (("steps", steps), ("budget", budget), ("seed", seed or None)):
        if value is not None:
            if key in training:
                raise UsageError(f"{key} is given twice: --{key} and train.{key}")
            training[key] = value
    created = create(model, loaded.spec, **overrides)
    check_use(loaded.spec, created.condition)
    run = fit(created, loaded, out=out, **training)
    report_run(run, as_json)


@app.command()
def resume(run: RunPath, as_json: Json = False) -> None:
    """Go on with an interrupted or killed RUN from its newest good checkpoint."""
    from trilemma.engine import resume as go_on

    report_run(go_on(run), as_json)


@app.command()
def sample(
    run: RunPath,
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Sampler settings, such as steps=50; see `trilemma info MODEL`."),
    ] = None,
    n: Annotated[Optional[int], typer.Option("-n", min=1, help="How many; 64, or one per condition.")] = None,  # noqa: UP045
    label: Annotated[Optional[str], typer.Option("--label", help="A class, where the model is conditional.")] = None,  # noqa: UP045
    condition: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--condition", help="FILE.npy, .npz, or .csv of columns conditioned on: one for all, or N."),
    ] = None,
    seed: Seed = 0,
    out: Annotated[Optional[Path], typer.Option("--out", help="FILE.png, .npz, .npy or .csv.")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """Draw samples from RUN in the units of its data."""
    from trilemma.cli.output import print_json
    from trilemma.core.config import parse_overrides
    from trilemma.data.examples import MANY
    from trilemma.data.render import check_suffix, write_samples
    from trilemma.engine import load
    from trilemma.engine.runtime import choose_device

    model = load(run).to(choose_device("auto"))
    suffix = ".csv" if model.spec.kind == "table" else ".png"
    given = label if condition is None else condition.stem
    if out is not None:
        check_suffix(out)
    if condition is None:
        n = n or MANY
        c = label_condition(model, label, n)
    else:
        c = file_condition(model, condition, label, n)
        n = len(c)
    path = out or run / f"samples-n{n}-seed{seed}{'' if given is None else f'-{given}'}{suffix}"
    x = model.sample(n, c, generator=seed, **parse_overrides(settings or []))
    write_samples(x, model.spec, path, c)
    if as_json:
        file = None if condition is None else str(condition)
        described = {"file": str(path), "n": n, "seed": seed, "label": label, "condition": file}
        print_json(described | {"shape": list(x.shape)})
    else:
        print(f"{n} samples: {path}")


@app.command()
def score(
    run: RunPath,
    data: Data,
    settings: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Data settings (size=32) and score.KEY=VALUE of the likelihood (score.method=ode).",
        ),
    ] = None,
    out: Annotated[Optional[Path], typer.Option("--out", help="FILE.csv with one line per example.")] = None,  # noqa: UP045
    alarm: Annotated[
        float, typer.Option("--alarm", min=0.0, max=1.0, help="An example with a p-value up to this is unusual.")
    ] = 0.01,
    held_out: Annotated[
        int, typer.Option("--held-out", min=0, help="At most so many held-out examples to rank among; 0 for none.")
    ] = 5000,
    as_json: Json = False,
) -> None:
    """The log-likelihood of every example of DATA under RUN, and how unusual each is.

    A p-value is the share of the run's held-out examples that are as unlikely; "typicality" counts those as far from
    the median, too likely ones included. A row of a table with a value that its column never had in training has
    probability zero; what has no likelihood (not a number) has no rank. Both are listed with the reason.
    """
    from trilemma.cli.output import print_json
    from trilemma.cli.score import describe_scores, rank_scores, score_examples, show_scores
    from trilemma.core.config import parse_overrides
    from trilemma.core.errors import UsageError
    from trilemma.data.examples import load_examples, write_scores
    from trilemma.engine import load
    from trilemma.engine.runtime import choose_device

    if out is not None and out.suffix != ".csv":
        raise UsageError(f"cannot write scores to {out.name}: the suffix must be .csv")
    model = load(run).to(choose_device("auto"))
    overrides = parse_overrides(settings or [])
    scoring = overrides.pop("score", {})
    if not isinstance(scoring, dict):
        raise UsageError("settings of the likelihood are written score.KEY=VALUE, for example score.method=ode")
    examples = load_examples(data, model.spec, True, **data_settings(overrides, load_examples))
    scores, seconds = score_examples(model, examples, scoring)
    ranked = rank_scores(run, model, scores, scoring, data, alarm, held_out, seconds)
    if out is not None:
        write_scores(scores, model.spec, examples.names, out, ranked.columns(examples))
    if as_json:
        print_json(describe_scores(scores, model.spec, ranked, examples))
    else:
        show_scores(scores, model.spec, ranked, examples)
        if out is not None:
            print(f"scores: {out}")


@app.command()
def evaluate(
    run: RunPath,
    data: Annotated[Optional[str], typer.Argument(help="The run's own data by default.")] = None,  # noqa: UP045
    settings: DataSettings = None,
    seed: Seed = 0,
    features: Features = "default",
    as_json: Json = False,
) -> None:
    """Measure RUN's samples and likelihood against held-out data; the numbers also go to RUN/scores.json."""
    from trilemma.cli.output import print_json, print_table
    from trilemma.comparison.evaluate import evaluate_run
    from trilemma.comparison.report import format_cell
    from trilemma.core.config import parse_overrides
    from trilemma.core.errors import UsageError
    from trilemma.core.spec import Batch
    from trilemma.data.examples import load_examples
    from trilemma.engine import Run
    from trilemma.metrics.catalogue import METRICS

    trained = Run(run)
    examples = None
    if data is not None:
        read = load_examples(data, trained.spec, **data_settings(parse_overrides(settings or []), load_examples))
        examples = Batch(read.x, read.condition)
    elif settings:
        raise UsageError("data settings have no effect without DATA: the run's own data are loaded as they were")
    metrics, copying = evaluate_run(trained, examples=examples, seed=seed, features=features)
    if as_json:
        found = {"p_value": copying.p_value, "share": copying.share, "verdict": copying.caveat()}
        print_json({name: e.model_dump(mode="json") for name, e in metrics.items()} | {"copying": found})
    else:
        rows = [[METRICS[k].title, format_cell(k, e), METRICS[k].meaning] for k, e in metrics.items()]
        print_table(["metric", "value", "meaning"], rows)
        print(f"nearest neighbours (p = {copying.p_value:.2g}): {copying.caveat()}")


@app.command()
def show(
    run: RunPath,
    settings: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[KEY=VALUE]...", help="n=8, sampler=NAME, steps=N, guidance=SCALE."),
    ] = None,
    seed: Seed = 0,
    out: Annotated[Optional[Path], typer.Option("--out", help="Folder; RUN/pictures by default.")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """Draw how RUN makes its samples: noising, kernel, reverse chain, score; diffusion models only."""
    from trilemma.cli.output import print_json
    from trilemma.core.config import parse_overrides
    from trilemma.engine import Run
    from trilemma.engine.pictures import write_pictures

    files = [str(path) for path in write_pictures(Run(run), out, seed=seed, **parse_overrides(settings or []))]
    if as_json:
        print_json({"files": files, "seed": seed})
    else:
        print("\n".join(files))


@app.command()
def check(
    data: Data,
    settings: DataSettings = None,
    list_bad: Annotated[bool, typer.Option("--list-bad", help="List every file or row that was not used.")] = False,
    as_json: Json = False,
) -> None:
    """Look at DATA as a model would see them: types, splits, duplicates, what could not be used."""
    from trilemma.cli.output import print_json
    from trilemma.cli.show import show_data
    from trilemma.core.config import parse_overrides
    from trilemma.data import describe_data

    loaded = load_source(data, parse_overrides(settings or []))
    description = describe_data(loaded)
    if list_bad or as_json:
        description["skipped_files"] = [{"where": s.where, "reason": s.reason} for s in loaded.report.skipped]
    if as_json:
        print_json(description)
    else:
        show_data(description)


@app.command()
def models(as_json: Json = False) -> None:
    """List the models: name, family, what each can do, and its paper."""
    from trilemma.cli.output import print_json, print_table
    from trilemma.core.registry import entries

    records = [entry.as_dict() for entry in entries().values()]
    if as_json:
        print_json(records)
        return
    rows = [
        [r["name"], r["family"], ", ".join(r["abilities"]), ", ".join(r["data_kinds"]), r["paper"]] for r in records
    ]
    print_table(["model", "family", "can", "data", "paper"], rows)


@app.command()
def info(
    target: Annotated[str, typer.Argument(metavar="RUN|DATA|MODEL", help="A run folder, data, or a model's name.")],
    as_json: Json = False,
) -> None:
    """What is in a run folder, a data set, or what settings a model has."""
    from trilemma.cli.output import print_json, print_pairs
    from trilemma.cli.show import describe_model, describe_run, show_data
    from trilemma.core.registry import entries
    from trilemma.data import describe_data
    from trilemma.engine import Run

    if (Path(target) / "config.yaml").is_file():
        description = describe_run(Run(target))
    elif target in entries():
        description = describe_model(entries()[target])
    else:
        description = describe_data(load_source(target, {}))
        if not as_json:
            show_data(description)
            return
    if as_json:
        print_json(description)
    else:
        print_pairs(description)


@app.command()
def export(
    run: RunPath,
    out: Annotated[Path, typer.Option("--out", help="A new folder.")],
    form: Annotated[str, typer.Option("--format", help="safetensors, torch (torch.export) or onnx.")] = "safetensors",
    as_json: Json = False,
) -> None:
    """Write RUN's model for use elsewhere; what is written is read back and compared with the model."""
    from trilemma.cli.output import print_json
    from trilemma.engine.export import export_model

    result = export_model(run, out, form)
    if as_json:
        print_json(result)
    else:
        print("\n".join(f"{key}: {value}" for key, value in result.items()))


app.command()(demo)
