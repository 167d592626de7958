"""card.md: what a trained model is, how it was made, and what its numbers mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trilemma.core import registry
from trilemma.core.model import GenerativeModel
from trilemma.core.storage import write_bytes

if TYPE_CHECKING:
    from trilemma.engine.checkpoint import TrainState
    from trilemma.engine.run import Run


def write_card(run: Run, model: GenerativeModel, state: TrainState) -> None:
    """Write RUN/card.md."""
    write_bytes(run.path / "card.md", make_card(run, model, state).encode())


def make_model_card(model: GenerativeModel) -> str:
    """The card of a saved model of which no run is at hand."""
    entry = registry.entries().get(model.name)
    source = [] if entry is None else [f"Family: {entry.family}. Source: {entry.paper}.", ""]
    abilities = ", ".join(sorted(model.abilities()))
    return "\n".join([f"# {model.name}", "", *source, f"- Data: {model.spec.describe()}", f"- Can: {abilities}", ""])


def make_card(run: Run, model: GenerativeModel, state: TrainState) -> str:
    """The text of the card, Markdown."""
    config, data = run.config, run.data
    entry = registry.entries().get(model.name)
    lines = [f"# {model.name} on {data['name']}", ""]
    if entry is not None:
        lines += [f"Family: {entry.family}. Source: {entry.paper}.", ""]
    lines += [
        f"- Data: {model.spec.describe()}; "
        + ", ".join(f"{n} {k}" for k, n in data["splits"].items())
        + f"; content hash {data['fingerprint']}",
        f"- Can: {', '.join(sorted(model.abilities()))}",
        f"- Parameters: {sum(p.numel() for p in model.parameters()):,}",
        f"- Training: {state.step:,} steps, {state.elapsed:.1f} s, seed {config['train']['seed']}",
    ]
    distance = model.overrides("held_out_loss")
    if state.best_loss is not None and not distance:
        lines.append(f"- Weights: of step {state.best_step:,}, the least validation loss ({state.best_loss:.4g})")
    elif config["train"].get("ema_half_life"):
        lines.append(f"- Weights: moving average with a half-life of {config['train']['ema_half_life']:,.0f} examples")
    elif config["train"]["ema"]:
        lines.append(f"- Weights: moving average with decay {config['train']['ema']}")
    if state.best_loss is not None and distance:
        last = [r["held_out_loss"] for r in run.metrics() if r["kind"] == "validation"][-1]
        lines.append(
            f"- Distance of samples from held-out data: {last:.4g} with these weights, the last; least "
            f"({state.best_loss:.4g}) with those of step {state.best_step:,}, in best/"
        )
    if data["skipped"]:
        lines.append(f"- {len(data['skipped'])} files or rows of the source were not used; data.json lists them")
    lines += [f"- {note}" for note in data["notes"]]
    lines += [f"- Event: {event['message']}" for event in run.events()]
    lines += ["", "## Settings", "", "```"]
    lines += [f"{key}={value}" for key, value in config["settings"].items()]
    lines += [f"train.{key}={value}" for key, value in config["train"].items()]
    return "\n".join([*lines, "```", ""])
