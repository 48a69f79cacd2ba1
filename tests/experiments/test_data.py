"""The corpus, its hash and its split; batches that depend on the seed alone and can be resumed."""

import dataclasses
import hashlib

import numpy as np
import pytest

from experiments.config import Run
from experiments.data import corpus, splits, training_batches, training_dataset, validation_batches


def test_the_standard_library_is_read_whole_sorted_and_without_its_tests():
    whole = corpus("stdlib")
    assert whole.tokens.dtype == np.uint8
    assert len(whole.tokens) > 5_000_000
    assert whole.files > 300
    text = whole.tokens.tobytes()
    assert text.index(b"Record of phased-in incompatible language changes") < text.index(b"class ZipFile")
    assert b"class CmdLineTest(unittest.TestCase)" not in text  # test/test_cmd_line.py
    assert corpus("stdlib") is whole  # once a process


def test_a_folder_is_its_files_in_order_of_their_paths(tmp_path):
    for name, content in (("b.txt", b"second"), ("a/z.txt", b"first"), (".hidden", b"no"), (".git/x", b"no")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    read = corpus(str(tmp_path))
    assert read.tokens.tobytes() == b"firstsecond"
    assert read.files == 2
    assert read.hash == hashlib.sha256(b"a/z.txt\x005\x00firstb.txt\x006\x00second").hexdigest()


@pytest.mark.parametrize(("first", "second"), [("one", "on" + "e!"), ("name", "name2")])
def test_the_hash_tells_contents_and_paths_apart(tmp_path, first, second):
    hashes = set()
    for place, name, content in (("p", "f", first), ("q", "f", second), ("r", second, first)):
        (tmp_path / place).mkdir()
        (tmp_path / place / name).write_text(content)
        hashes.add(corpus(str(tmp_path / place)).hash)
    assert len(hashes) == 3


def test_the_split_has_every_byte_once(tiny, text):
    sides = splits(tiny())
    assert np.concatenate(sides).tobytes() == text.read_bytes()
    assert len(sides.validation) == int(0.2 * len(text.read_bytes()))


def test_an_epoch_reads_every_training_window_once(tiny):
    run = tiny(data={"batch": 1})
    dataset, training = training_dataset(run), splits(run).training
    windows = (len(training) - 1) // 16
    epoch = [dataset[i]["tokens"][0] for i in range(windows)]
    expected = [training[16 * i : 16 * i + 17] for i in range(windows)]
    assert sorted(map(bytes, epoch)) == sorted(map(bytes, expected))
    assert list(map(bytes, epoch)) != list(map(bytes, expected))
    following = [dataset[windows + i]["tokens"][0] for i in range(windows)]
    assert list(map(bytes, following)) != list(map(bytes, epoch))  # shuffled anew


def test_batches_depend_on_the_seed_alone(tiny):
    def first(run):
        batches = training_batches(run)
        return np.stack([next(batches)["tokens"] for _ in range(5)])

    run = tiny()
    batch = first(run)
    assert batch.shape == (5, 4, 17)
    np.testing.assert_array_equal(batch, first(tiny(name="other", scale=3.0, temperature=0.5)))
    assert not np.array_equal(batch, first(tiny(seed=1)))
    held_out = validation_batches(run)
    np.testing.assert_equal(held_out, validation_batches(tiny(seed=1)))
    assert [batch["tokens"].shape for batch in held_out] == [(4, 17)] * 2


def test_held_out_batches_come_from_the_held_out_text(tiny):
    run = tiny()
    held_out = splits(run).validation.tobytes()
    windows = [bytes(row) for batch in validation_batches(run) for row in batch["tokens"]]
    assert all(window in held_out for window in windows)
    assert held_out.startswith(windows[0])
    assert held_out.endswith(windows[-1])


def test_an_iterator_goes_on_where_its_state_was_taken(tiny):
    batches = training_batches(tiny())
    for _ in range(3):
        next(batches)
    state = batches.get_state()
    expected = [next(batches)["tokens"] for _ in range(4)]
    resumed = training_batches(tiny())
    resumed.set_state(state)
    np.testing.assert_array_equal([next(resumed)["tokens"] for _ in range(4)], expected)


def with_source(source, **model):
    run = Run()
    return dataclasses.replace(
        run,
        data=dataclasses.replace(run.data, source=str(source), validation_share=0.25),
        model=dataclasses.replace(run.model, **model),
    )


def test_a_missing_corpus_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere'.*no such file"):
        corpus(str(tmp_path / "nowhere"))


def test_an_empty_corpus_is_named(tmp_path):
    (tmp_path / "empty.txt").touch()
    for source in (tmp_path, tmp_path / "empty.txt"):
        with pytest.raises(ValueError, match="1 files and not one byte"):
            corpus(str(source))


@pytest.mark.parametrize(
    ("size", "context", "side"), [(400, 100, "held-out"), (400, 300, "training"), (403, 100, "held-out")]
)
def test_a_corpus_shorter_than_the_context_is_named_with_its_numbers(tmp_path, size, context, side):
    path = tmp_path / "short.txt"
    path.write_bytes(bytes(size))
    with pytest.raises(ValueError, match=rf"short.txt', of {size} bytes: its {side} part .* = {context + 1};"):
        splits(with_source(path, context=context))


def test_a_corpus_of_just_the_context_is_enough(tmp_path):
    path = tmp_path / "short.txt"
    path.write_bytes(bytes(404))
    run = with_source(path, context=100)
    assert next(training_batches(run))["tokens"].shape == (8, 101)
    assert validation_batches(run)[0]["tokens"].shape == (8, 101)
