"""A run that is killed, stopped, or finds its newest checkpoint damaged ends as if nothing had happened."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from attention import Performer
from experiments.checkpoint import Checkpoints
from experiments.data import training_batches
from experiments.files import read_json_lines
from experiments.levers import levers
from experiments.progress import View
from experiments.runtime import Interrupted
from experiments.steps import make_init
from experiments.train import main, train

ROOT = Path(__file__).parents[2]
STEPS = 600


def parameters(run):
    """All arrays of a run's last checkpoint."""
    checkpoints = Checkpoints(run.folder / run.name / "checkpoints", pytest.fail)
    state = checkpoints.restore(jax.eval_shape(make_init(run), levers(run)), training_batches(run))
    checkpoints.close()
    return state


def metrics(run):
    """The bytes of a run's loss log."""
    return (run.folder / run.name / "metrics.jsonl").read_bytes()


def assert_same_end(run, reference):
    """Bit for bit the same loss log, parameters, optimizer state and step."""
    assert metrics(run) == metrics(reference)
    jax.tree.map(np.testing.assert_array_equal, parameters(run), parameters(reference))


class At(View):
    """A view that does something once the run has passed a step."""

    def __init__(self, *args, at, action):
        super().__init__(*args)
        self._at, self._action = at, action
        self.said = []

    def step(self, step, loss):
        super().step(step, loss)
        if step >= self._at:
            self._at = float("inf")
            self._action()

    def tell(self, message):
        self.said.append(message)


def viewer(at, action, views):
    """Makes the view of a run and keeps it in `views`."""

    def make(*args):
        views.append(At(*args, at=at, action=action))
        return views[-1]

    return make


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_run_goes_on_exactly(tiny, reference, signum, code):
    run, views = tiny(), []
    with pytest.raises(Interrupted, match="after step 11 of 30, saved; start again to go on") as caught:
        train(run, view=viewer(10, lambda: os.kill(os.getpid(), signum), views))
    assert caught.value.exit_code == code
    assert read_json_lines(run.folder / "run" / "metrics.jsonl")[-1]["step"] == 11
    assert signal.getsignal(signum) is not None
    train(run, view=viewer(99, None, views))
    assert views[-1].said[0].endswith("goes on after step 11 of 30")
    assert_same_end(run, reference)


@pytest.mark.campaign
def test_redrawn_constants_are_those_of_a_run_that_never_stopped(tiny):
    """Stopped inside a period, after step 11 of periods of 4 that begin at steps 0, 4, 8, ..., 28."""
    fields = {"attention": Performer(features=8, coupling="iid"), "redraw_every": 4}
    whole, run = tiny(name="whole", **fields), tiny(**fields)
    train(whole)
    with pytest.raises(Interrupted, match="after step 11 of 30"):
        train(run, view=viewer(10, lambda: os.kill(os.getpid(), signal.SIGTERM), []))
    halfway = parameters(run).constants
    train(run)
    assert_same_end(run, whole)
    (before,), (after,) = (jax.tree.leaves(constants) for constants in (halfway, parameters(run).constants))
    assert not np.array_equal(before, after)


def damage_all(step):
    """Cuts every file of a checkpoint in half."""
    for path in step.rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)


def damage_arrays(step):
    """Removes the files that hold the arrays."""
    for path in (step / "state").rglob("d/*"):
        path.unlink()


def damage_position(step):
    """Empties the position in the data."""
    for path in (step / "data").glob("*.json"):
        os.truncate(path, 0)


def damage_digest(step):
    """Changes what the arrays should add up to."""
    path = step / "digest" / "metadata"
    path.write_text(path.read_text().replace("a", "b").replace("shb256", "sha256"))


@pytest.fixture(scope="module")
def interrupted(text, make_small, tmp_path_factory):
    """The folder of a run that was stopped after step 21."""
    run = make_small(text, tmp_path_factory.mktemp("interrupted"))()
    with pytest.raises(Interrupted):
        train(run, view=viewer(20, lambda: os.kill(os.getpid(), signal.SIGTERM), []))
    return run.folder


@pytest.mark.parametrize("damage", [damage_all, damage_arrays, damage_position, damage_digest])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tiny, reference, interrupted, damage):
    run, views = tiny(), []
    shutil.copytree(interrupted, run.folder)
    folder = run.folder / "run" / "checkpoints"
    assert sorted(int(path.name) for path in folder.iterdir()) == [7, 14, 21]
    damage(folder / "21")
    train(run, view=viewer(99, None, views))
    assert "checkpoint 21 in " in views[-1].said[0]
    assert "cannot be read" in views[-1].said[0]
    assert views[-1].said[1].endswith("goes on after step 14 of 30")
    assert_same_end(run, reference)


def test_with_no_readable_checkpoint_a_run_begins_again(tiny, reference):
    run, views = tiny(), []
    with pytest.raises(Interrupted):
        train(run, view=viewer(3, lambda: os.kill(os.getpid(), signal.SIGTERM), views))
    for step in (run.folder / "run" / "checkpoints").iterdir():
        damage_all(step)
    train(run, view=viewer(99, None, views))
    assert "cannot be read" in views[-1].said[0]
    assert views[-1].said[2].endswith("goes on after step 0 of 30")
    assert_same_end(run, reference)


def test_a_full_disk_in_a_checkpoint_leaves_the_one_before(tiny, reference, monkeypatch):
    run = tiny()
    save = Checkpoints.save

    def full(self, step, state, batches):
        if step == 14:
            raise ValueError("write failed: No space left on device [os_error_code='28']")  # as tensorstore says it
        save(self, step, state, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", full)
        with pytest.raises(OSError, match="no space left"):
            train(run)
    train(run)
    assert_same_end(run, reference)


def command(run):
    """The command line of a run with the shape of `tiny` and more steps."""
    options = {
        "name": run.name,
        "folder": run.folder,
        "steps": run.steps,
        "evaluate-every": run.evaluate_every,
        "evaluate-batches": run.evaluate_batches,
        "checkpoint-every": run.checkpoint_every,
        **{f"model.{name}": getattr(run.model, name) for name in ("layers", "width", "heads", "kv_heads", "mlp_width")},
        "model.context": run.model.context,
        "data.source": run.data.source,
        "data.batch": run.data.batch,
        "data.validation-share": run.data.validation_share,
        "optimizer.warmup-steps": run.optimizer.warmup_steps,
        "optimizer.learning-rate": run.optimizer.learning_rate,
    }
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def killed(run, lines):
    """Starts a run in a process of its own and kills it once its log has `lines` lines; whether it was still alive."""
    path = run.folder / run.name / "metrics.jsonl"
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir)}
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.train", *command(run)], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
    )
    try:
        while process.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") >= lines):
            time.sleep(0.005)
    finally:
        process.kill()
    code = process.wait()
    assert code in (0, -signal.SIGKILL)
    return code == -signal.SIGKILL


def kill_and_compare(tiny, kills, seed):
    """Kills a run at random steps, `kills` times, lets it finish, and compares it with one that never stopped."""
    fields = {"steps": STEPS, "evaluate_every": 100, "checkpoint_every": 50}
    whole, run = tiny(name="whole", **fields), tiny(name="killed", **fields)
    assert main(command(whole)) == 0
    drawn = random.Random(seed)
    landed, done = 0, 0
    while landed < kills:
        before = done
        landed += killed(run, before + drawn.randrange(1, max(2, (STEPS - 100 - before) // max(1, kills - landed))))
        done = len(read_json_lines(run.folder / run.name / "metrics.jsonl"))
        assert done < len(read_json_lines(whole.folder / whole.name / "metrics.jsonl")), "finished before it was killed"
    assert main(command(run)) == 0
    assert_same_end(run, whole)


def test_a_run_killed_twice_ends_as_one_that_never_was(tiny):
    kill_and_compare(tiny, kills=2, seed=0)


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(4))
def test_a_run_killed_many_times_ends_as_one_that_never_was(tiny, seed):
    kill_and_compare(tiny, kills=5, seed=seed)
