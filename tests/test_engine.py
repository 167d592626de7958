"""The training loop against hand-written answers: gradients, averages, schedules, order, failures."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.toy_models import Gaussian, TinyGAN, gaussian_points
from trilemma.check import QUICK, Subject, check_resumes, example_data, same_state
from trilemma.core.config import validate
from trilemma.core.errors import BudgetError, CheckpointError, DivergedError, TrilemmaError, UsageError
from trilemma.core.model import Objective, OptimizerConfig, Step
from trilemma.core.noise import Noise
from trilemma.core.registry import create
from trilemma.core.spec import DataSpec
from trilemma.engine import Run, TrainConfig, load, resume, train
from trilemma.engine.batches import BatchOrder
from trilemma.engine.checkpoint import (
    flatten_optimizers,
    latest_checkpoint,
    list_checkpoints,
    read_checkpoint,
    restore_optimizers,
)
from trilemma.engine.config import parse_duration
from trilemma.engine.run import read_lines
from trilemma.engine.runtime import available_cores, choose_device, choose_threads, count_work

DATA = gaussian_points()


def fit(out: Path, model: Any = None, **settings: Any) -> tuple[Any, Run]:
    model = model or Gaussian(DATA.spec, name="toy-gaussian")
    return model, train(model, DATA, out=out, **{**QUICK, **settings})


def test_maximum_likelihood_reaches_the_closed_form(tmp_path: Path) -> None:
    """The optimum of a diagonal Gaussian in standardized space is N(0, I), so log_prob is the data's own Gaussian's."""
    model, _ = fit(tmp_path / "run", steps=400, batch_size=256, validations=0, checkpoint_steps=None)
    assert torch.allclose(model.mu, torch.zeros(2), atol=0.02)
    assert torch.allclose(model.log_std, torch.zeros(2), atol=0.02)
    x = DATA.train.head(10**6).x.double()
    mean, std = x.mean(0), x.std(0, correction=0)
    exact = (-0.5 * ((x - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)).sum(1)
    score = model.log_prob(x.float())
    assert score.kind == "exact"
    assert score.mean().value.item() == pytest.approx(exact.mean().item(), abs=2e-3)


def test_batches_are_permutations_that_run_across_epochs() -> None:
    order = BatchOrder(10, 4, seed=3)
    drawn = torch.cat([order[k] for k in range(5)])
    assert sorted(drawn[:10].tolist()) == sorted(drawn[10:].tolist()) == list(range(10))
    assert drawn[:10].tolist() != drawn[10:].tolist()
    assert torch.equal(BatchOrder(10, 4, seed=3)[4], order[4])
    assert len(BatchOrder(3, 8, seed=0)[0]) == 8


def test_learning_rate_schedule() -> None:
    config = TrainConfig(steps=10, warmup=0.1, final_lr=0.05)
    assert config.learning_rate(0.05) == pytest.approx(0.5)
    assert config.learning_rate(0.1) == pytest.approx(1.0)
    assert config.learning_rate(0.55) == pytest.approx(0.05 + 0.95 * 0.5)
    assert config.learning_rate(1.0) == pytest.approx(0.05)
    assert TrainConfig(steps=10, warmup=0.0, schedule="constant").learning_rate(0.7) == 1.0


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30), ("10min", 600), ("1h30m", 5400), ("90", 90), ("1.5m", 90)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "10 parsecs", "-3s", "0s"])
def test_bad_durations(text: str) -> None:
    with pytest.raises(UsageError, match=r"duration|budget"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({"images": 100}, 7), ({"epochs": 2}, math.ceil(2 * len(DATA.train) / 16)), ({"steps": 3}, 3)],
)
def test_budgets_in_images_epochs_and_steps(tmp_path: Path, settings: dict[str, Any], steps: int) -> None:
    _, run = fit(tmp_path / "run", **{"steps": None, **settings})
    assert run.status["step"] == steps


def test_time_budget_ends_in_time_and_annealed(tmp_path: Path) -> None:
    _, run = fit(tmp_path / "run", steps=None, budget="0.5s", checkpoint_steps=None)
    assert 0.5 <= run.status["elapsed"] < 2.0
    last = [r for r in run.metrics() if r["kind"] == "train"][-1]
    assert last["nll/lr"] < 0.05 * 0.05  # the peak is 0.05, the last step's rate is within 5% of the end of the cosine


def test_conflicting_and_unknown_settings(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give one of steps"):
        fit(tmp_path / "a", budget="1s")
    with pytest.raises(UsageError, match="did you mean 'batch_size'"):
        fit(tmp_path / "b", batchsize=3)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "file").touch()
    with pytest.raises(UsageError, match="not empty"):
        fit(tmp_path / "c")


def test_accumulated_gradients_equal_the_mean_over_the_shards(tmp_path: Path) -> None:
    """Two micro-batches give the mean of the two shards' gradients, each with its own noise: Adam's first moment."""
    _, run = fit(tmp_path / "run", steps=1, batch_size=16, micro_batch_size=8, clip=None)
    moments = read_checkpoint(run.checkpoints / "step-00000001").optimizer
    model = Gaussian(DATA.spec, name="toy-gaussian")
    model.initialize(seed=0)
    read_checkpoint(run.checkpoints / "step-00000000").restore(model)
    indices = BatchOrder(len(DATA.train), 16, 0)[0]
    losses = [
        model.loss(DATA.train.batch(indices[8 * s : 8 * s + 8]), Step(Noise(0, "train", 0, s, n=8, block=8)))[0]
        for s in range(2)
    ]
    expected = torch.autograd.grad(0.5 * (losses[0] + losses[1]), list(model.parameters()))
    for index, gradient in enumerate(expected):
        assert torch.allclose(moments[f"nll/{index}/exp_avg"], 0.1 * gradient, rtol=1e-5, atol=1e-8)


def test_objectives_move_only_their_own_parameters(tmp_path: Path) -> None:
    """With a generator whose learning rate is zero in effect, only the critic moves, twice per step."""
    seen: list[tuple[str, bool, bool]] = []

    class Spy(TinyGAN):
        def critic_loss(self, batch: Any, step: Any) -> Any:
            seen.append(("critic", self.critic[0].weight.requires_grad, self.generator.weight.requires_grad))
            return super().critic_loss(batch, step)

        def generator_loss(self, batch: Any, step: Any) -> Any:
            seen.append(("generator", self.critic[0].weight.requires_grad, self.generator.weight.requires_grad))
            return super().generator_loss(batch, step)

    fit(tmp_path / "run", Spy(DATA.spec, name="toy-gan"), steps=2, threads=1)
    assert seen == 2 * [("critic", True, False), ("critic", True, False), ("generator", False, True)]


def test_moving_average_of_the_weights(tmp_path: Path) -> None:
    """Against the recursion e <- e + (1 - d_t)(w - e), d_t = min(d, (1 + t) / (10 + t))."""
    _, run = fit(tmp_path / "run", steps=6, ema=0.6, checkpoint_steps=1, keep=20)
    states = [read_checkpoint(path) for path in list_checkpoints(run.checkpoints)]
    average = states[0].model["mu"].double()
    for t, state in enumerate(states[1:], start=1):
        average = average + (1 - min(0.6, (1 + t) / (10 + t))) * (state.model["mu"].double() - average)
        assert state.ema is not None
        assert torch.allclose(state.ema["mu"].double(), average, atol=1e-6)


def test_half_life_of_the_average_in_examples() -> None:
    """After h examples the weight of the past is a half; at first h is a fraction of what has been seen."""
    config = validate(TrainConfig, {"ema_half_life": 640, "batch_size": 64}, "train")
    assert math.prod(config.ema_decay(step) for step in range(1, 11)) == pytest.approx(0.5)
    ramped = validate(TrainConfig, {"ema_half_life": 640, "ema_ramp": 0.1, "batch_size": 64}, "train")
    assert ramped.ema_decay(20) == pytest.approx(0.5 ** (1 / 2))  # half-life: a tenth of 20 steps
    assert ramped.ema_decay(100) == ramped.ema_decay(1000) == pytest.approx(config.ema_decay(1))
    for settings in ({"ema": 0.9, "ema_half_life": 640}, {"ema_ramp": 0.1}):
        with pytest.raises(UsageError, match="ema"):
            validate(TrainConfig, settings, "train")


def test_betas_move_by_a_cosine_and_gradient_descent_is_the_formula() -> None:
    config = OptimizerConfig(betas=(0.5, 0.9), final_beta2=0.99)
    assert [config.betas_at(p) for p in (0.0, 0.5, 1.0)] == [
        (0.5, 0.9), (0.5, pytest.approx(0.945)), (0.5, pytest.approx(0.99))
    ]  # fmt: skip
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    descent = OptimizerConfig(method="sgd", lr=0.1, betas=(0.5, 0.9)).make([weight])
    for gradient in (1.0, 1.0):
        weight.grad = torch.tensor([gradient])
        descent.step()
    assert weight.item() == pytest.approx(1.0 - 0.1 - 0.1 * 1.5)


def test_gradient_descent_resumes_bit_for_bit(tmp_path: Path) -> None:
    model = create("r3gan", DataSpec(kind="points", shape=(2,)), width=8, generator={"method": "sgd", "lr": 0.1})
    check_resumes(Subject(model, example_data(model.spec), tmp_path))


def test_the_last_weights_of_a_gan_are_the_result_and_the_best_are_kept(tmp_path: Path) -> None:
    data = gaussian_points()
    model = create("r3gan", data.spec, width=8)
    run = model.fit(data, steps=16, out=tmp_path / "run", previews=0, validations=8, show=False)
    assert same_state(run.model("last"), model)
    distances = {r["step"]: r["held_out_loss"] for r in run.metrics() if r["kind"] == "validation"}
    assert len(distances) == 8
    assert run.status["best_step"] == min(distances, key=lambda step: distances[step])
    assert "in best/" in (run.path / "card.md").read_text()


def test_best_weights_are_kept_and_patience_stops(tmp_path: Path) -> None:
    class Worsening(Gaussian):
        def loss(self, batch: Any, step: Any) -> Any:
            loss, logs = super().loss(batch, step)
            return (loss if self.training else loss.detach() * 0 + step.index), logs

    model, run = fit(tmp_path / "run", Worsening(DATA.spec, name="toy-gaussian"), steps=40, validations=20, patience=3)
    assert run.status["step"] == 8  # validations at 2, 4, 6, 8; the first was best
    assert run.status["best_step"] == 2
    assert same_state(model, load(run.checkpoints / "step-00000002"))
    assert [e["event"] for e in run.events()] == ["early_stop"]
    assert same_state(run.model("best"), model)
    assert not same_state(run.model("last"), model)


class Poisoned(Gaussian):
    """Makes the loss, or only the gradient, NaN at the given steps."""

    at: tuple[int, ...] = ()
    where = "loss"

    def loss(self, batch: Any, step: Any) -> Any:
        loss, logs = super().loss(batch, step)
        if self.training and self.at and step.index == self.at[0]:
            type(self).at = self.at[1:]
            no_value_but_an_infinite_slope = (self.mu - self.mu.detach()).abs().sqrt().sum()
            loss = loss * math.nan if self.where == "loss" else loss + no_value_but_an_infinite_slope
        return loss, logs


def test_a_non_finite_validation_loss_is_never_the_best(tmp_path: Path) -> None:
    class Shaky(Gaussian):
        def loss(self, batch: Any, step: Any) -> Any:
            loss, logs = super().loss(batch, step)
            return (loss if self.training or step.index > 2 else loss * math.nan), logs

    _, run = fit(tmp_path / "run", Shaky(DATA.spec, name="toy-gaussian"), steps=8, validations=4)
    assert math.isfinite(run.status["best_loss"])
    assert run.status["best_step"] > 2
    assert [e["event"] for e in run.events()] == ["validation_not_finite"]


def test_a_rollback_keeps_the_best_weights_of_its_checkpoint(tmp_path: Path) -> None:
    """Best at 4 (checkpoint 4), better at 6, non-finite at 7: the run goes back to 4 and must still have its best."""

    class Scripted(Poisoned):
        at = (7,)

        def loss(self, batch: Any, step: Any) -> Any:
            loss, logs = super().loss(batch, step)
            script = {2: 3.0, 4: 2.0, 6: 1.0 if type(self).at else 5.0, 8: 5.0}
            return (loss if self.training else loss.detach() * 0 + script[step.index]), logs

    model = Scripted(DATA.spec, name="toy-gaussian")
    model, run = fit(tmp_path / "run", model, steps=8, validations=4, checkpoint_steps=4, threads=1)
    assert run.status["best_step"] == 4
    assert same_state(model, load(run.checkpoints / "step-00000004"))


def test_a_budget_shorter_than_setting_up_is_an_error(tmp_path: Path) -> None:
    class Slow(Gaussian):
        def prepare(self, train: Any, noise: Any) -> None:
            super().prepare(train, noise)
            time.sleep(0.2)

    with pytest.raises(BudgetError, match="setting up took"):
        fit(tmp_path / "run", Slow(DATA.spec, name="toy-gaussian"), steps=None, budget=0.1)


def test_restored_moments_have_the_layout_of_their_weights() -> None:
    """Fused optimisers pair elements by memory, so a channels-last weight needs channels-last moments."""
    conv = torch.nn.Conv2d(3, 4, 3)
    conv.weight.data = conv.weight.data.to(memory_format=torch.channels_last)
    made = {"a": torch.optim.Adam(conv.parameters(), fused=True)}
    conv(torch.randn(2, 3, 8, 8)).square().sum().backward()
    made["a"].step()
    flat = {k: v.contiguous().clone() for k, v in flatten_optimizers(made).items()}
    again = {"a": torch.optim.Adam(conv.parameters(), fused=True)}
    restore_optimizers(again, flat)
    moment = again["a"].state[conv.weight]["exp_avg"]
    assert moment.stride() == conv.weight.stride()
    assert torch.equal(moment, made["a"].state[conv.weight]["exp_avg"])


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_non_finite_number_rolls_back_once(tmp_path: Path, where: str) -> None:
    model = type("P", (Poisoned,), {"at": (7,), "where": where})(DATA.spec, name="toy-gaussian")
    _, run = fit(tmp_path / "run", model, steps=10, checkpoint_steps=4, threads=1)
    assert run.status["state"] == "finished"
    (event,) = run.events()
    assert event["event"] == "rollback"
    assert event["from_step"] == 7
    assert event["step"] == 4
    assert where in event["message"]
    state = latest_checkpoint(run.checkpoints)[0].state  # type: ignore[union-attr]
    assert (state.step, state.lr_scale, state.rollbacks) == (10, 0.5, 1)


def test_a_second_non_finite_number_stops_with_a_clear_error(tmp_path: Path) -> None:
    model = type("P", (Poisoned,), {"at": (3, 3)})(DATA.spec, name="toy-gaussian")
    with pytest.raises(DivergedError, match="the loss of 'nll' is not finite at step 3, for the second time"):
        fit(tmp_path / "run", model, steps=10, threads=1)
    run = Run(tmp_path / "run")
    assert [e["event"] for e in run.events()] == ["rollback", "diverged"]
    assert run.status["state"] == "failed"
    assert run.model().fitted  # the checkpoint before it is intact


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_batch(tmp_path: Path) -> None:
    class Hungry(Gaussian):
        sizes: list[int] = []  # noqa: RUF012

        def loss(self, batch: Any, step: Any) -> Any:
            if self.training and len(batch.x) > 4:
                raise torch.OutOfMemoryError("pretended")
            if self.training:
                self.sizes.append(len(batch.x))
            return super().loss(batch, step)

    _, run = fit(tmp_path / "run", Hungry(DATA.spec, name="toy-gaussian"), steps=3, threads=1, validations=0)
    assert Hungry.sizes == [4] * 12
    assert [e["event"] for e in run.events()] == ["out_of_memory", "out_of_memory"]
    reference, _ = fit(tmp_path / "reference", steps=3, micro_batch_size=4, threads=1, validations=0)
    assert same_state(run.model(), reference)


def test_out_of_memory_with_one_example_is_an_error(tmp_path: Path) -> None:
    class Starving(Gaussian):
        def loss(self, batch: Any, step: Any) -> Any:
            raise torch.OutOfMemoryError("pretended")

    with pytest.raises(TrilemmaError, match="cannot be halved"):
        fit(tmp_path / "run", Starving(DATA.spec, name="toy-gaussian"), threads=1)


def test_resume_refuses_other_data_and_leaves_finished_runs(tmp_path: Path) -> None:
    _, run = fit(tmp_path / "run")
    assert resume(run, DATA).status["step"] == 4
    (run.path / "status.json").unlink()
    with pytest.raises(UsageError, match="content hash differs"):
        resume(run, gaussian_points(seed=1), show=False)
    with pytest.raises(UsageError, match="in memory"):
        resume(run, show=False)


def test_damaged_checkpoints_are_skipped_with_a_word(tmp_path: Path) -> None:
    _, whole = fit(tmp_path / "whole", steps=6, keep=10)
    _, run = fit(tmp_path / "run", steps=6, keep=10)
    (run.path / "status.json").unlink()
    newest = list_checkpoints(run.checkpoints)[-1]
    data = bytearray((newest / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "model.safetensors").write_bytes(bytes(data))
    resume(run, DATA, show=False)
    skipped = [e for e in run.events() if e["event"] == "checkpoint_skipped"]
    assert skipped
    assert "SHA-256" in skipped[0]["message"]
    assert same_state(run.model(), whole.model())


def test_a_manifest_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    model, _ = fit(tmp_path / "run")
    model.save(tmp_path / "saved")
    manifest = tmp_path / "saved" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"model.safetensors"', '"../saved/model.safetensors"'))
    with pytest.raises(CheckpointError, match="outside its folder"):
        load(tmp_path / "saved")


def test_logs_survive_a_line_cut_short(tmp_path: Path) -> None:
    _, run = fit(tmp_path / "run")
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "ki')
    run.log({"step": 100, "kind": "train"})
    assert [r["step"] for r in read_lines(run.path / "metrics.jsonl")][-1] == 100
    assert all(r["step"] != 99 for r in run.metrics())


def test_saving_over_something_is_refused(tmp_path: Path) -> None:
    model, _ = fit(tmp_path / "run")
    model.save(tmp_path / "saved")
    with pytest.raises(CheckpointError, match="exists already"):
        model.save(tmp_path / "saved")


def test_objectives_are_checked() -> None:
    with pytest.raises(AssertionError, match="no parameters"):
        Objective("x", (), lambda batch, step: torch.zeros(()))


def test_bfloat16_autocast_trains_float32_weights(tmp_path: Path) -> None:
    """The first loss agrees to bfloat16's 8 bits with that in float32; weights and optimiser stay float32."""
    first = {}
    for precision in ("fp32", "bf16"):
        model, run = fit(tmp_path / precision, TinyGAN(DATA.spec, name="toy-gan"), precision=precision, validations=0)
        first[precision] = next(r for r in run.metrics() if r["kind"] == "train")["generator/loss"]
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert {t.dtype for t in latest_checkpoint(run.checkpoints)[0].optimizer.values()} == {torch.float32}  # type: ignore[union-attr]
    assert first["bf16"] == pytest.approx(first["fp32"], rel=0.02)
    assert first["bf16"] != first["fp32"]


@pytest.mark.slow
def test_compiled_networks_compute_the_same(tmp_path: Path) -> None:
    losses = {}
    for compiled in (False, True):
        model = create("vae", DATA.spec, width=16, depth=1)
        _, run = fit(tmp_path / str(compiled), model, compile=compiled, validations=0, steps=3)
        losses[compiled] = [r["elbo/loss"] for r in run.metrics() if r["kind"] == "train"]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)


def test_devices_are_chosen_and_refused() -> None:
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(UsageError, match=r"unknown device 'tpu9'; here are: .*cpu"):
        choose_device("tpu9")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="'cuda' is not available"):
            choose_device("cuda")


def test_threads_follow_the_work_and_not_the_clock() -> None:
    small, large = torch.ones(8, 8), torch.ones(1024, 1024)
    assert count_work(lambda: small @ small) == (1, 2 * 8**3)
    assert choose_threads(lambda: small @ small) == 1
    assert choose_threads(lambda: large @ large) == available_cores()


def test_previews_are_samples_at_fixed_noise(tmp_path: Path) -> None:
    _, run = fit(tmp_path / "run", steps=16, previews=3)
    names = sorted(p.name for p in (run.path / "samples").iterdir())
    assert names == ["final.png", "step-00000002.png", "step-00000004.png", "step-00000008.png"]


def test_snapshots_are_the_weights_of_their_step_and_change_nothing(tmp_path: Path) -> None:
    """Halves and quarters of the budget; a run that is cut off at the quarter holds the same weights there."""
    settings = {"steps": 16, "validations": 0, "checkpoint_steps": 4}
    _, run = fit(tmp_path / "run", snapshots=2, **settings)
    kept = sorted(p.name for p in run.snapshots.iterdir())
    assert kept == ["step-00000004", "step-00000008"]
    records = [r for r in run.metrics() if r["kind"] == "snapshot"]
    assert [r["step"] for r in records] == [4, 8]
    assert 0.0 < records[0]["seconds"] <= records[1]["seconds"]
    model = Gaussian(DATA.spec, name="toy-gaussian")
    model.initialize(0)
    read_checkpoint(run.checkpoints / "step-00000004").restore(model, averaged=True)
    assert torch.equal(load(run.snapshots / "step-00000004").mu, model.mu)
    other, _ = fit(tmp_path / "other", **settings)
    assert same_state(load(run.path), other)
