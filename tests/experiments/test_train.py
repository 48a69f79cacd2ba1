"""A run: one trace for all levers, curves that know only scale / temperature, and a folder that is never half right."""

import dataclasses
import errno
import json
import struct

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tensorboardX.proto.event_pb2 import Event

from attention import Performer
from attention.exact import Exact
from attention.linear.couplings import gaussian_rows
from attention.method import UnsupportedError
from experiments import files
from experiments.config import Optimizer, Run
from experiments.data import training_batches
from experiments.files import append_json_lines, read_json_lines
from experiments.levers import levers
from experiments.log import NonFiniteError, Pending
from experiments.metrics import first_nonfinite, named_leaves
from experiments.optimizer import descent, unit_schedule
from experiments.steps import DRAWS, make_evaluate, make_init, make_step
from experiments.train import main, train

UNIT = float(jnp.finfo(jnp.float32).eps) / 2


class Programs:
    """The compiled functions of a run."""

    def __init__(self, run):
        self.run, self.init, self.step = run, jax.jit(make_init(run)), jax.jit(make_step(run))

    def curve(self, numbers, steps=5):
        """The state after some steps, and their losses."""
        state, batches, losses = self.init(numbers), training_batches(self.run), []
        for _ in range(steps):
            state, metrics = self.step(state, next(batches), numbers)
            losses.append(np.asarray(metrics["loss"]))
        return state, np.stack(losses)


def test_all_points_of_a_method_share_one_trace(tiny):
    chex.clear_trace_counter()
    run = tiny()
    init = jax.jit(chex.assert_max_traces(make_init(run), n=1))
    step = jax.jit(chex.assert_max_traces(make_step(run), n=1), donate_argnums=0)
    evaluate = jax.jit(chex.assert_max_traces(make_evaluate(run), n=1))
    batch, losses = next(training_batches(run)), []
    points = [
        dataclasses.replace(run, scale=scale, temperature=temperature, seed=seed, optimizer=optimizer)
        for scale in (None, 0.7)
        for temperature in (0.5, 4)
        for seed in (0, 7)
        for optimizer in (run.optimizer, dataclasses.replace(run.optimizer, learning_rate=1e-3))
    ]
    for point in points:
        numbers = levers(point)
        state, metrics = step(init(numbers), batch, numbers)
        state, metrics = step(state, batch, numbers)
        losses.append(float(evaluate(state, batch, numbers)["loss"]))
        assert metrics["learning_rate"].shape == metrics["grad_norm"].shape == ()
    assert len(set(losses)) == len(points)  # and yet every lever moves something


def test_exact_training_knows_only_the_ratio_of_scale_and_temperature(tiny):
    programs = Programs(tiny())
    for first, second in (((0.25, 1.0), (0.5, 2.0)), ((None, 2.0), (0.25, 1.0)), ((0.3, 0.5), (0.6, 1.0))):
        points = [levers(tiny(scale=scale, temperature=temperature)) for scale, temperature in (first, second)]
        (one, losses), (other, same) = map(programs.curve, points)
        np.testing.assert_array_equal(losses, same)
        jax.tree.map(np.testing.assert_array_equal, one.parameters, other.parameters)
    _, different = programs.curve(levers(tiny(scale=0.25)))
    assert not np.array_equal(losses, different)


def test_a_population_under_vmap_is_its_members(tiny):
    run = tiny()
    programs = Programs(run)
    points = [levers(tiny(seed=seed, temperature=temperature)) for seed, temperature in ((0, 1.0), (3, 0.5))]
    population = jax.tree.map(lambda *x: jnp.stack(x), *points)
    batches = training_batches(run)
    pair = [next(batches), next(batches)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *pair)
    step = jax.vmap(make_step(run))
    states, metrics = jax.jit(step)(jax.jit(jax.vmap(make_init(run)))(population), stacked, population)
    for i, (point, batch) in enumerate(zip(points, pair, strict=True)):
        _, alone = programs.step(programs.init(point), batch, point)
        # Batched products sum in another order. The loss is a mean of numbers near log(256), each the end of
        # inner products of at most D H mlp = 16 + 4 + 24 + context 16 terms a layer.
        np.testing.assert_allclose(metrics["loss"][i], alone["loss"], rtol=2 * (60 + 16) * UNIT)
    assert states.step.tolist() == [1, 1]


def test_constants_are_redrawn_by_seed_and_step_alone(tiny):
    """In a population: its own draws for every seed, new ones at steps 0, 2 and 4, in one program."""
    run = tiny(attention=Performer(features=8, coupling="iid"), redraw_every=2)
    points = [levers(tiny(seed=seed)) for seed in (0, 3)]
    population = jax.tree.map(lambda *x: jnp.stack(x), *points)
    batch = next(training_batches(run))
    pair, found = jax.tree.map(lambda x: np.stack([x, x]), batch), []
    state = jax.jit(jax.vmap(make_init(run)))(population)
    chex.clear_trace_counter()
    step = jax.jit(jax.vmap(chex.assert_max_traces(make_step(run), n=1)))
    for _ in range(5):
        state, _ = step(state, pair, population)
        found += jax.tree.leaves(state.constants)
    for now, projections in enumerate(found):
        for seed, projection in zip((0, 3), projections, strict=True):
            layer = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), DRAWS), 0)
            drawn = gaussian_rows("iid", jax.random.fold_in(layer, now // 2), (8, 4))
            # The same bits, through a logarithm and a root that other programs may round otherwise.
            np.testing.assert_allclose(projection, drawn, rtol=16 * UNIT, atol=16 * UNIT)
        np.testing.assert_array_equal(projections, found[now // 2 * 2])
    assert len({x.tobytes() for x in map(np.asarray, found)}) == 3


def test_a_method_without_constants_is_not_redrawn(tiny):
    with pytest.raises(
        ValueError, match=r"redraw_every is 5: expected 0, .*: Exact\(\); methods that can: .*Performer"
    ):
        make_step(tiny(redraw_every=5))
    with pytest.raises(ValueError, match="redraw_every is -1"):
        make_step(tiny(redraw_every=-1))
    with pytest.raises(UnsupportedError, match="Exact has no constants that are redrawn: methods that can: Performer"):
        Exact().redrawn(Exact().init(None, num_heads=1, head_dim=4), jax.random.key(0), step=0, every=1)


def test_micro_batches_give_the_gradient_of_the_batch(tiny):
    run = tiny()
    split = tiny(optimizer={"accumulate": 4})
    numbers, batch = levers(run), next(training_batches(run))
    (_, whole), (_, parts) = (
        jax.jit(make_step(r))(jax.jit(make_init(r))(numbers), batch, numbers) for r in (run, split)
    )
    for name in ("loss", "grad_norm"):
        # Means over 64 terms in another order, 64 u each, after products as long as in the test above.
        np.testing.assert_allclose(whole[name], parts[name], rtol=2 * (64 + 2 * 76) * UNIT)


def test_the_update_is_adamw_with_decay_of_matrices_alone(tiny):
    config = tiny().optimizer
    parameters = {"matrix": jnp.ones((2, 3)), "gain": jnp.ones(3)}
    gradients = jax.tree.map(lambda x: 3.0 * x, parameters)
    ours = descent(config)
    updates, _ = ours.update(gradients, ours.init(parameters), parameters)
    # By hand, at the first step: clipped to norm 1, then the bias-corrected moments are g and g^2, so g/|g| = 1.
    np.testing.assert_allclose(updates["gain"], -np.ones(3), rtol=1e-6)
    np.testing.assert_allclose(updates["matrix"], -np.ones((2, 3)) * (1 + config.weight_decay), rtol=1e-6)
    peer = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(0.5, config.b1, config.b2, weight_decay=config.weight_decay, mask={"matrix": True, "gain": False}),
    )
    peer_updates, _ = peer.update(gradients, peer.init(parameters), parameters)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(0.5 * a, b, rtol=4 * UNIT), updates, peer_updates)


def test_the_schedule_rises_to_its_peak_and_ends_at_its_share():
    config = Optimizer(warmup_steps=4, final_share=0.1)
    rates = [float(unit_schedule(config, 12, jnp.int32(step))) for step in range(12)]
    np.testing.assert_allclose(rates[:4], [0.25, 0.5, 0.75, 1.0], rtol=4 * UNIT)
    assert rates[3:] == sorted(rates[3:], reverse=True)
    np.testing.assert_allclose(rates[7], 0.55, rtol=1e-6)  # half the cosine
    np.testing.assert_allclose(rates[-1], 0.1, rtol=1e-5)


def test_a_run_learns_and_leaves_a_whole_folder(tiny):
    run = tiny(steps=60)
    result = train(run)
    folder = run.folder / run.name
    records = read_json_lines(folder / "metrics.jsonl")
    steps, evaluations = ([r for r in records if name in r] for name in ("loss", "validation_loss"))
    assert [r["step"] for r in steps] == list(range(1, 61))
    assert [r["step"] for r in evaluations] == [10, 20, 30, 40, 50, 60]
    assert all(set(r) == {"step", "loss", "grad_norm", "learning_rate"} for r in steps)
    assert steps[0]["loss"] == pytest.approx(np.log(256), rel=0.02)  # knows nothing: the head starts near 0
    assert result["validation_loss"] < np.log(20)  # the text has fewer than 20 different bytes
    assert result["bits_per_byte"] == result["validation_loss"] / np.log(2)
    assert result == json.loads((folder / "result.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    assert config["config"]["attention"] == "Exact()"
    assert len(config["corpus"]["hash"]) == 64
    assert config["resolved"] == ["Exact()"]
    assert {"versions", "backend", "device"} <= set(config)
    assert sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.is_dir()) == [49, 56, 60]
    assert np.shape(evaluations[-1]["entropy"]) == (1, 4)


def events(folder):
    """The scalars of TensorBoard's event files: length, its checksum, an event, its checksum, and so on."""
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            yield from (((value.tag, event.step), value.simple_value) for value in event.summary.value)
            at += 16 + length


def test_tensorboard_shows_what_the_metrics_say(tiny):
    run = tiny()
    result = train(run)
    shown = dict(events(run.folder / run.name / "tensorboard"))
    assert shown["loss", 30] == pytest.approx(result["loss"], rel=UNIT)
    assert shown["validation_loss", 30] == pytest.approx(result["validation_loss"], rel=2 * UNIT)
    for name in ("entropy", "sink_mass"):  # written in 7 digits, half a unit of which is below 2^-20
        assert shown[f"{name}/layer0/head3", 30] == pytest.approx(result[name][0][3], rel=2.0**-20)


def test_a_finished_run_is_reported_and_not_run_again(tiny):
    run = tiny()
    result = train(run)
    files = {path: path.read_bytes() for path in (run.folder / run.name).rglob("*") if path.is_file()}
    assert train(run) == result
    assert files == {path: path.read_bytes() for path in (run.folder / run.name).rglob("*") if path.is_file()}


def test_another_configuration_is_refused_by_the_names_of_its_fields(tiny):
    first = train(tiny())
    other = tiny(seed=2, optimizer={"learning_rate": 0.02})  # the same program
    with pytest.raises(
        ValueError, match=r"config.optimizer.learning_rate was 0.01, is now 0.02; config.seed was 0, is now 2"
    ):
        train(other)
    assert train(other, overwrite=True)["loss"] != first["loss"]
    assert [path.name for path in other.folder.iterdir()] == ["run"]


def test_another_text_is_refused(tiny, tmp_path):
    source = tmp_path / "text"
    source.mkdir()
    (source / "a").write_bytes(bytes(range(256)) * 20)
    run = tiny(data={"source": str(source)})
    train(run)
    (source / "a").write_bytes(bytes(range(256)) * 21)
    from experiments import data

    data._read.cache_clear()  # as in a new process
    with pytest.raises(ValueError, match=r"corpus.bytes was 5120, is now 5376; corpus.hash was"):
        train(run)


def test_a_folder_of_something_else_is_left_alone(tiny):
    run = tiny()
    path = run.folder / run.name
    path.mkdir(parents=True)
    (path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="not the folder of a run"):
            train(run, overwrite=overwrite)
    assert [p.name for p in path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "a..b", "/tmp", "a b", "a\n", "ä", "a\\b"])
def test_a_name_that_leaves_the_folder_is_refused(tiny, name):
    run = tiny(name=name)
    with pytest.raises(ValueError, match="name is"):
        train(run)
    assert not run.folder.exists()


class Deaf(Exact, register=False):
    """Refuses causal masks."""

    capabilities = dataclasses.replace(Exact.capabilities, causal=False)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"model": {"heads": 3}}, ValueError, "model.width is 16: expected a multiple of heads = 3"),
        ({"model": {"kv_heads": 3}}, ValueError, "model.heads is 4: expected a multiple of kv_heads = 3"),
        ({"model": {"heads": 16, "kv_heads": 16}}, ValueError, "even size for rotary positions, not 1"),
        ({"model": {"layers": 0}}, ValueError, "model.layers is 0"),
        ({"model": {"context": 10**6}}, ValueError, "expected at least context"),
        ({"data": {"source": "no/such"}}, FileNotFoundError, "data.source is 'no/such'"),
        ({"data": {"validation_share": 1.0}}, ValueError, "data.validation_share is 1.0"),
        ({"optimizer": {"accumulate": 3}}, ValueError, "data.batch is 4: expected a multiple of"),
        ({"optimizer": {"warmup_steps": 30}}, ValueError, "optimizer.warmup_steps is 30"),
        ({"optimizer": {"learning_rate": float("nan")}}, ValueError, "optimizer.learning_rate is nan"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0"),
        ({"temperature": float("nan")}, ValueError, "temperature is nan"),
        ({"scale": float("inf")}, ValueError, "scale is inf"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"attention": Deaf()}, UnsupportedError, "Deaf does not take is_causal"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_a_file_is_written(tiny, fields, error, message):
    run = tiny(**fields)
    with pytest.raises(error, match=message):
        train(run)
    assert not run.folder.exists()


def test_a_number_that_stops_being_finite_stops_the_run_by_name_before_it_is_saved(tiny):
    # After a step of 1e30 / 3 the parameters are finite and their squares are not.
    run = tiny(optimizer={"learning_rate": 1e30}, checkpoint_every=1)
    with pytest.raises(NonFiniteError, match=r"step 2: (loss|gradient norm|(parameter|gradient of) \S+) is") as caught:
        train(run)
    folder = run.folder / run.name
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["1"]
    assert [record["step"] for record in read_json_lines(folder / "metrics.jsonl")] == [1]
    assert not (folder / "result.json").exists()
    with pytest.raises(NonFiniteError) as again:  # from the checkpoint: the same step, the same tensor
        train(run)
    assert str(again.value) == str(caught.value)


def test_the_tensor_that_overflows_first_is_named(tiny):
    """Each kind of tensor in its turn, on the function that finds it."""
    tensors = {
        "loss": jnp.ones(()),
        "gradient of a": jnp.ones(3),
        "gradient norm": jnp.ones(()),
        "parameter a": jnp.ones(3),
    }
    assert int(first_nonfinite(tensors)) == -1
    for index, name in enumerate(tensors):
        for bad in (jnp.nan, jnp.inf, -jnp.inf):
            broken = {
                n: x.at[..., -1:].set(bad) if x.ndim else jnp.asarray(bad) for n, x in tensors.items() if n == name
            }
            assert int(first_nonfinite({**tensors, **broken})) == index
    pending = Pending(list(tensors))
    pending.add(3, {"loss": jnp.ones(()), "nonfinite": jnp.int32(1)})
    with pytest.raises(NonFiniteError, match="step 3: gradient of a is not finite"):
        pending.fetch()


def full_after(count):
    """A stand-in for os.fsync on a disk that is full from the `count`-th call on."""
    calls = iter(range(10**9))

    def fsync(descriptor):
        if next(calls) >= count:
            raise OSError(errno.ENOSPC, "No space left on device")

    return fsync


def test_a_full_disk_is_said_and_leaves_what_was_whole(tiny, reference, monkeypatch):
    run = tiny()
    folder = run.folder / run.name
    for count in (0, 9):  # while the first file is written, and between two checkpoints
        with monkeypatch.context() as patch:
            patch.setattr(files.os, "fsync", full_after(count))
            with pytest.raises(OSError, match=r"no space left while writing to .*run; .* start again") as caught:
                train(run)
        assert caught.value.errno == errno.ENOSPC
        assert not (folder / "result.json").exists()
        assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp")]
    assert list((folder / "checkpoints").iterdir())
    assert train(run)["step"] == 30
    lines = (folder / "metrics.jsonl").read_bytes()
    assert lines == (reference.folder / reference.name / "metrics.jsonl").read_bytes()


def test_an_append_is_whole_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "log"
    append_json_lines(path, [{"step": 1}])
    monkeypatch.setattr(files.os, "fsync", full_after(0))
    with pytest.raises(OSError, match="No space"):
        append_json_lines(path, [{"step": 2}, {"step": 3}])
    assert read_json_lines(path) == [{"step": 1}]


def test_the_command_line_says_what_is_wrong_in_one_line(tiny, capsys):
    folder = str(tiny().folder)
    for arguments, message in (
        (["attention:exactt"], "unknown method 'exactt': did you mean 'exact'?"),
        (["--name", ".."], "name is '..'"),
        (["--model.layer-methods", "Exact", "Exac"], "unknown method 'exac': did you mean 'exact'?"),
    ):
        assert main(["--folder", folder, *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1
    for arguments, message in ((["--stepz", "3"], "--steps"), (["--model.position", "rotary"], "--model.positions")):
        with pytest.raises(SystemExit) as stopped:
            main(["--folder", folder, *arguments])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert not tiny().folder.exists()


def test_help_describes_every_field(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for part, prefix in ((Run, ""), (Run.model, "model."), (Run.data, "data."), (Run.optimizer, "optimizer.")):
        for field in dataclasses.fields(part):
            if not dataclasses.is_dataclass(field.default) and field.name != "attention":
                assert f"--{prefix}{field.name.replace('_', '-')}" in text


def test_names_of_parameters_are_paths(tiny):
    run = tiny()
    names = list(named_leaves(jax.eval_shape(make_init(run), levers(run)).parameters))
    assert "blocks/0/attention/query/kernel" in names
    assert len(names) == len(set(names))
