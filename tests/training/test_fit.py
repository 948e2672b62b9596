import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from blob_world import blob_cache, make_cache
from train_blobs import CONFIG, MODEL, STEPS, train

from worldloom.core.errors import CheckpointError, ConfigError, TrainingError
from worldloom.core.hardware import use_threads
from worldloom.data import POSITIONS, turn_pictures
from worldloom.models import JEPAConfig, load_model, load_tensors
from worldloom.models.encoders import VectorMLP
from worldloom.models.losses import LOSSES
from worldloom.training import RunFolder, Segment, TrainingConfig, fit, held_out_losses, loop, saved_steps

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def cache():
    return blob_cache(episodes=10)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> RunFolder:
    path = tmp_path_factory.mktemp("unbroken") / "run"
    train(path)
    return RunFolder.open(path)


def start(path: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    return subprocess.Popen([sys.executable, str(HERE / "train_blobs.py"), str(path), *arguments], env=environment)


def wait_for_step(path: Path, step: int, process: "subprocess.Popen[bytes]") -> None:
    for _ in range(6000):
        assert process.poll() is None, "the training ended too soon"
        if path.exists() and any(line["step"] >= step for line in RunFolder(path).metrics()):
            return
        time.sleep(0.005)
    raise AssertionError("the training did not get so far")


def steps_of(run: RunFolder) -> list[tuple[float, float]]:
    return [(line["step"], line["loss"]) for line in run.metrics() if "loss" in line]


def assert_same_result(run: RunFolder, other: RunFolder) -> None:
    first, second = (
        load_tensors(part.checkpoint_directory / f"step-{STEPS:08d}", kind="training-state") for part in (run, other)
    )
    assert first[0].keys() == second[0].keys()
    assert any(key.startswith("optimizer/") for key in first[0])
    assert any("target" in key for key in first[0])
    for key, tensor in first[0].items():
        assert torch.equal(tensor, second[0][key]), key
    assert load_model(run.model_directory).spec == load_model(other.model_directory).spec


def test_killed_at_a_random_step_and_resumed_it_ends_as_if_unbroken(unbroken, tmp_path) -> None:
    path = tmp_path / "run"
    process = start(path)
    try:
        wait_for_step(path, random.choice([5, 10, 15, 25, 35]), process)
        time.sleep(random.uniform(0, 0.05))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    run = RunFolder.open(path)
    assert not run.model_directory.exists()
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9')  # as if killed in the middle of a line
    train(path, resume=True)
    assert_same_result(unbroken, run)
    steps = [step for step, _ in steps_of(run)]
    assert steps == sorted(set(steps)) == [step for step, _ in steps_of(unbroken)]


def test_the_last_two_checkpoints_are_kept_and_a_damaged_one_is_passed_over(unbroken, tmp_path, caplog) -> None:
    assert saved_steps(unbroken) == [56, 60]
    path = tmp_path / "run"
    process = start(path)
    wait_for_step(path, 25, process)
    process.kill()
    process.wait()
    run = RunFolder.open(path)
    newest = saved_steps(run)[-1]
    (damaged,) = run.checkpoint_directory.glob(f"step-{newest:08d}-*.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    train(path, resume=True)
    assert "skipping a damaged checkpoint" in caplog.text
    assert_same_result(unbroken, run)
    for path in run.checkpoint_directory.iterdir():
        path.write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="format"):
        train(run.path, resume=True)


def test_ctrl_c_writes_a_checkpoint_and_says_how_to_go_on(unbroken, tmp_path) -> None:
    path = tmp_path / "run"

    def interrupt() -> None:
        while not (path.exists() and RunFolder(path).metrics()):
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step \d+ of 60; resume"):
        train(path)
    thread.join()
    assert saved_steps(RunFolder.open(path))[-1] < STEPS
    train(path, resume=True)
    assert_same_result(unbroken, RunFolder.open(path))


def test_resuming_a_finished_run_gives_the_same_model(unbroken) -> None:
    before = load_model(unbroken.model_directory).spec.fingerprint
    train(unbroken.path, resume=True)
    assert load_model(unbroken.model_directory).spec.fingerprint == before


def test_resuming_with_another_setting_or_other_data_is_refused(unbroken, cache) -> None:
    def resume(config=CONFIG, model=MODEL, data=cache) -> None:
        fit(config, model, data, unbroken, resume=True)

    with pytest.raises(CheckpointError, match="training.learning_rate was 0.002, is 0.1"):
        resume(CONFIG.override(["learning_rate=0.1"]))
    with pytest.raises(CheckpointError, match="model.latent_dim was 8, is 4"):
        resume(model=MODEL.override(["latent_dim=4"]))
    other = replace(cache, fingerprint="other")
    with pytest.raises(CheckpointError, match="its settings or data changed: data"):
        resume(data=other)


def test_a_run_holds_figures_shares_of_time_and_diagnostics(unbroken) -> None:
    lines = unbroken.metrics()
    training = [line for line in lines if "loss" in line]
    assert training[-1]["step"] == STEPS
    assert {"loss/prediction", "loss/sigreg", "gradient_norm", "learning_rate", "frames_per_second"} <= training[
        -1
    ].keys()
    shares = [value for name, value in training[-1].items() if name.startswith("time/")]
    assert 0.5 < sum(shares) <= 1.0
    assert unbroken.diagnostics()["step"] == STEPS
    assert unbroken.diagnostics()["figures"]["effective_rank"] > 1
    assert list((unbroken.path / "tensorboard").iterdir())
    weighted = sum(loss.weight * training[0][f"loss/{name}"] for name, loss in CONFIG.losses.items())
    assert training[0]["loss"] == pytest.approx(weighted, rel=1e-4)


def test_the_trained_model_carries_no_loss_and_no_target(unbroken) -> None:
    names = load_model(unbroken.model_directory).state_dict().keys()
    assert {name.split(".")[0] for name in names} == {"encoder", "norm", "predictor", "normalise_actions"}


def poisoned(cache, monkeypatch):
    """Make the batch of step 9 hold an action that is not finite."""
    from worldloom.data import WindowSampler

    calls = []
    at = WindowSampler.at

    def spoil(self, numbers):
        windows = at(self, numbers)
        calls.append(numbers)
        if len(calls) == 10:
            windows.actions[0, 0, 0] = math.inf
        return windows

    monkeypatch.setattr(WindowSampler, "at", spoil)


def test_a_loss_that_is_not_finite_stops_and_names_step_and_loss(cache, tmp_path, monkeypatch) -> None:
    poisoned(cache, monkeypatch)
    run = RunFolder.create(tmp_path / "run", {}, {})
    with pytest.raises(TrainingError, match=r"stopped at step 9: .*loss/inverse-dynamics = (inf|nan)") as error:
        fit(CONFIG, MODEL, cache, run)
    assert "learning_rate" in str(error.value)
    assert saved_steps(run) == [7]
    tensors, _ = load_tensors(run.checkpoint_directory / "step-00000007", kind="training-state")
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_two_trainings_do_not_share_a_folder(cache, tmp_path) -> None:
    run = RunFolder.create(tmp_path / "run", {}, {})
    with RunFolder.open(run.path).lock(), pytest.raises(TrainingError, match="another process is training"):
        fit(CONFIG, MODEL, cache, run)


def test_a_new_training_does_not_mix_with_an_old_one(cache, unbroken) -> None:
    with pytest.raises(TrainingError, match="already has checkpoints; resume"):
        fit(CONFIG, MODEL, cache, unbroken)


def test_held_out_episodes_too_short_for_a_window_stop_nothing(cache, tmp_path, caplog) -> None:
    _, held_out = cache.split(CONFIG.validation_share, CONFIG.seed)
    lengths = cache.lengths.copy()
    lengths[held_out] = CONFIG.horizon * MODEL.block - 1
    run = RunFolder.create(tmp_path / "run", {}, {})
    fit(CONFIG.override(["steps=2"]), MODEL, replace(cache, lengths=lengths), run)
    assert "none of the 2 held-out episodes is long enough for a window" in caplog.text
    steps = CONFIG.horizon * MODEL.block
    assert f"of 10 episodes 2 are shorter than a window of {steps} steps and are not trained on" in caplog.text
    assert run.diagnostics()["figures"]


def test_several_devices_need_torchrun(cache, tmp_path) -> None:
    run = RunFolder.create(tmp_path / "run", {}, {})
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node 2"):
        fit(CONFIG.override(["devices=2"]), MODEL, cache, run)


def hidden_velocity_cache():
    """Return a point mass pushed by its actions, of which only the position is observed."""
    random_numbers = np.random.default_rng(0)
    actions = random_numbers.uniform(-1, 1, (60, 41, 2)).astype(np.float32)
    velocity = np.zeros_like(actions)
    for t in range(40):
        velocity[:, t + 1] = 0.9 * velocity[:, t] + 0.1 * actions[:, t]
    position = np.concatenate([np.zeros((60, 1, 2)), velocity[:, 1:].cumsum(1)], axis=1).astype(np.float32)
    actions[:, -1] = 0
    return make_cache(
        vector=position.reshape(-1, 2),
        actions=actions.reshape(-1, 2),
        labels={"velocity": velocity.reshape(-1, 2)},
        episodes=60,
        steps=40,
    )


@pytest.mark.parametrize("context", [1, 3])
def test_history_knows_the_velocity_that_no_frame_shows_and_its_lack_raises_an_alarm(context, tmp_path) -> None:
    config = TrainingConfig(
        steps=250, batch=32, horizon=4, validation_windows=64, validation_share=0.2, threads=1, checkpoint_every=1000
    ).override(["losses.inverse-dynamics.frames=3"])
    run = RunFolder.create(tmp_path / "run", {}, {})
    model = JEPAConfig(encoder=VectorMLP(hidden=(32,)), latent_dim=16, block=1, context=context)
    fit(config, model, hidden_velocity_cache(), run)
    figures, alarms = run.diagnostics()["figures"], run.diagnostics()["alarms"]
    if context == 3:
        assert alarms == []
        assert figures["probe/velocity/r2"] > 0.7
        assert figures["inverse_dynamics"] < 0.5
    else:
        assert "raise the model's context" in alarms[0]["remedy"]
        assert figures["probe/velocity/r2"] < 0.3


def test_every_loss_trains(cache, tmp_path) -> None:
    losses = {name: {"name": name, "weight": 0.1} for name in LOSSES}
    config = CONFIG.override([f"losses={json.dumps(losses)}", "steps=3", "checkpoint_every=100"])
    run = RunFolder.create(tmp_path / "run", {}, {})
    fit(config, MODEL, cache, run)
    assert {f"loss/{name}" for name in LOSSES} <= run.metrics()[0].keys()


def in_stretches(path: Path, cache, ends: list[int], base=lambda run: {}) -> RunFolder:
    """Train in several calls, each from where the one before ended."""
    run = RunFolder.create(path, {}, {})
    for begin, end in zip([0, *ends], ends, strict=False):
        stretch = Segment(begin=begin, end=end, base=base(run) if begin else {})
        fit(CONFIG, MODEL, cache, run, resume=begin > 0, stretch=stretch)
    return run


def test_stretches_without_a_base_end_as_one_training(unbroken, cache, tmp_path) -> None:
    assert_same_result(unbroken, in_stretches(tmp_path / "run", cache, [25, STEPS]))


def test_a_base_takes_the_place_of_what_it_names_and_of_nothing_else(cache, tmp_path) -> None:
    run = in_stretches(tmp_path / "run", cache, [20])
    before = load_model(run.model_directory).state_dict()
    base = {name: torch.full_like(x, 0.01) for name, x in before.items() if name.startswith("predictor.")}
    fit(CONFIG, MODEL, cache, run, resume=True, stretch=Segment(begin=20, end=20, base=base))
    after = load_model(run.model_directory).state_dict()
    for name, tensor in after.items():
        assert torch.equal(tensor, base.get(name, before[name])), name


def test_a_stretch_that_was_killed_goes_on_and_does_not_take_its_base_twice(cache, tmp_path) -> None:
    def base(run: RunFolder) -> dict[str, torch.Tensor]:
        state = load_model(run.model_directory).state_dict()
        return {name: 0.5 * x for name, x in state.items() if name.startswith("predictor.")}

    whole = in_stretches(tmp_path / "whole", cache, [20, STEPS], base)
    broken = in_stretches(tmp_path / "broken", cache, [20])
    given = base(broken)
    fit(CONFIG, MODEL, cache, broken, resume=True, stretch=Segment(begin=20, end=41, base=given))  # ... and killed
    fit(CONFIG, MODEL, cache, broken, resume=True, stretch=Segment(begin=20, end=STEPS, base=given))
    assert_same_result(whole, broken)


def test_what_a_stretch_fixes_does_not_move_and_the_rest_does(cache, tmp_path) -> None:
    run = in_stretches(tmp_path / "run", cache, [20])
    before = load_model(run.model_directory).state_dict()
    fixed = [name for name in before if name.startswith("predictor.")]
    fit(CONFIG, MODEL, cache, run, resume=True, stretch=Segment(begin=20, end=25, base={}, fixed=fixed))
    after = load_model(run.model_directory).state_dict()
    moving = [name for name in before if name.startswith("encoder.") and "weight" in name]
    assert all(torch.equal(after[name], before[name]) for name in fixed)
    assert not any(torch.equal(after[name], before[name]) for name in moving)
    fit(CONFIG, MODEL, cache, run, resume=True, stretch=Segment(begin=25, end=30, base={}))
    again = load_model(run.model_directory).state_dict()
    assert not any(torch.equal(again[name], after[name]) for name in fixed)


def test_a_stretch_trains_at_the_rate_of_the_steps_that_it_states(cache, tmp_path) -> None:
    run = in_stretches(tmp_path / "run", cache, [10])
    fit(CONFIG, MODEL, cache, run, resume=True, stretch=Segment(begin=10, end=14, base={}, at=STEPS - 4))
    fit(CONFIG, MODEL, cache, run, resume=True, stretch=Segment(begin=14, end=16, base={}))
    fit(
        CONFIG, MODEL, cache, run, resume=True, stretch=Segment(begin=16, end=24, base={}, at=STEPS, schedule=STEPS + 8)
    )
    ends = {row["step"]: row["learning_rate"] for row in run.metrics() if "learning_rate" in row}
    assert ends[14] == pytest.approx(CONFIG.learning_rate_at(STEPS - 1))
    assert ends[16] == pytest.approx(CONFIG.learning_rate_at(15))
    longer = CONFIG.model_copy(update={"steps": STEPS + 8})
    assert ends[24] == pytest.approx(longer.learning_rate_at(STEPS + 7))
    assert ends[24] > 0 == CONFIG.learning_rate_at(STEPS + 7)


def test_a_stretch_that_begins_elsewhere_or_another_models_base_is_refused(cache, tmp_path) -> None:
    run = in_stretches(tmp_path / "run", cache, [20])
    for stretch, message in (
        (Segment(begin=30, end=40, base={}), "is at step 20"),
        (Segment(begin=20, end=40, base={"predictor.nothing": torch.zeros(2)}), "predictor.nothing"),
        (Segment(begin=20, end=40, base={"norm.running_mean": torch.zeros(2)}), "has shape"),
    ):
        with pytest.raises(CheckpointError, match=message):
            fit(CONFIG, MODEL, cache, run, resume=True, stretch=stretch)


def test_held_out_losses_tell_a_good_base_from_a_spoiled_one_and_leave_the_run_alone(cache, tmp_path) -> None:
    run = in_stretches(tmp_path / "run", cache, [20, STEPS])
    own = {n: x for n, x in load_model(run.model_directory).state_dict().items() if n.startswith("predictor.")}
    kept = {path: path.read_bytes() for path in run.checkpoint_directory.iterdir()}
    good, spoiled = (
        held_out_losses(CONFIG, MODEL, cache, run, {name: factor * x for name, x in own.items()}) for factor in (1, -5)
    )
    assert good == held_out_losses(CONFIG, MODEL, cache, run, {})
    assert good["prediction"] < spoiled["prediction"]
    assert good["total"] < spoiled["total"]
    assert kept == {path: path.read_bytes() for path in run.checkpoint_directory.iterdir()}


@pytest.mark.parametrize("chosen", [1, 2])
def test_a_run_measures_its_threads_records_them_and_resumes_with_them(cache, tmp_path, monkeypatch, chosen) -> None:
    steps, measured = 100, []
    free = CONFIG.override(["threads=0", f"steps={steps}", "checkpoint_every=50"])

    def measure(work):
        measured.append(work())
        return {1: 1.0, 2: 2.0 if chosen == 1 else 0.5}

    def threads_in_training(run, config, **options):
        seen = []
        log = run.log
        monkeypatch.setattr(run, "log", lambda *given: (seen.append(torch.get_num_threads()), log(*given)))
        fit(config, MODEL, cache, run, **options)
        return set(seen)

    monkeypatch.setattr(loop, "time_threads", measure)
    with use_threads(2):
        ours = RunFolder.create(tmp_path / "ours", {}, {})
        assert threads_in_training(ours, free) == {chosen}
        assert ours.threads == chosen
        fixed = RunFolder.create(tmp_path / "fixed", {}, {})
        assert threads_in_training(fixed, free.override([f"threads={chosen}"])) == {chosen}
        # Measuring changes nothing: the parameters are those of a run with this number from the start.
        first, second = (
            load_tensors(run.checkpoint_directory / f"step-{steps:08d}", kind="training-state")[0]
            for run in (ours, fixed)
        )
        assert all(torch.equal(first[name], second[name]) for name in first)

        monkeypatch.setattr(loop, "time_threads", lambda work: pytest.fail("a resumed run measured"))
        broken = RunFolder.create(tmp_path / "broken", {}, ours.provenance)
        segment = Segment(begin=0, end=50, base={})
        fit(free.override(["threads=2"]), MODEL, cache, broken, stretch=segment)
        longer = Segment(begin=0, end=steps, base={})
        assert threads_in_training(broken, free, resume=True, stretch=longer) == {chosen}
    assert len(measured) == 1


def test_a_training_that_becomes_much_slower_says_so_once(caplog) -> None:
    pace = loop._Pace()
    with use_threads(2):
        for step, seconds in enumerate([3.0, 1.0, 1.0, 2.5, 1.0, 2.5, 2.5, 2.5, 2.5, 1.0, 3.0, 3.0, 3.0]):
            pace.check(step, seconds)
    assert [record.args[0] for record in caplog.records] == [7, 12]
    assert "resume with --threads 1" in caplog.text


def test_with_a_symmetry_every_window_is_shown_in_a_position_of_its_own(cache, tmp_path, monkeypatch) -> None:
    seen = []
    whole = loop.Learner.forward

    def forward(learner, pixels, vector, actions, step):
        seen.append((pixels.numpy().copy(), actions.numpy().copy()))
        return whole(learner, pixels, vector, actions, step)

    monkeypatch.setattr(loop.Learner, "forward", forward)
    plain = CONFIG.override(["steps=2", "target=null"])
    turning = plain.override(['symmetry={"vectors": [[0, 1]]}'])
    for name, config in {"plain": plain, "turning": turning}.items():
        fit(config, MODEL, cache, RunFolder.create(tmp_path / name, {}, {}))
    assert turning.symmetry is not None
    met = set()
    for (pixels, actions), (turned, led) in zip(seen[:2], seen[2:], strict=True):
        for row in range(len(pixels)):
            views = turn_pictures(np.repeat(pixels[row : row + 1], POSITIONS, axis=0), np.arange(POSITIONS))
            (position,) = [place for place, view in enumerate(views) if np.array_equal(view, turned[row])]
            single = actions[row].reshape(-1, 2)
            expected = turning.symmetry.turn_actions(single, np.full(len(single), position))
            assert np.array_equal(led[row].reshape(-1, 2), expected)
            met.add(position)
    assert len(met) >= 4  # of 16 windows


def test_a_symmetry_that_does_not_fit_the_data_is_refused(cache, tmp_path) -> None:
    wrong = CONFIG.override(['symmetry={"spins": [2]}'])
    with pytest.raises(ConfigError, match="component 2 of the action, but actions have 2 values"):
        fit(wrong, MODEL, cache, RunFolder.create(tmp_path / "run", {}, {}))
