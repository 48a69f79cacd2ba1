"""What a model attends with, saved and read back."""

import dataclasses

import numpy as np
import pytest
import safetensors.numpy

import attention
from experiments.capture import captured, main
from experiments.data import validation_batches
from experiments.operand_files import Layer, concatenated, load, save
from experiments.saved import load as load_run


def test_what_is_read_is_attended_to_as_the_model_did(reference, tmp_path):
    """With no scale and temperature beside it, whatever those of the run are."""
    saved = load_run(reference.folder / reference.name)
    saved = saved._replace(run=dataclasses.replace(saved.run, scale=0.7, evaluate_temperature=2.5))
    tokens = validation_batches(saved.run)[0]["tokens"][:2, :-1]
    layers = captured(saved, tokens)
    save(tmp_path / "run.safetensors", layers, "a run")
    (read,) = load(tmp_path / "run.safetensors")
    assert (read.name, read.causal) == ("a run", True)
    options = {"method": attention.Chunked(), "is_causal": True}
    found = attention.dot_product_attention(read.query, read.key, read.value, **options)
    (layer,) = layers
    operands = layer.query, layer.key, layer.value
    expected = attention.dot_product_attention(*operands, scale=0.7, temperature=2.5, **options)
    # Both multiply the queries by beta, in at most 4 roundings, and round each of H products and sums of a logit:
    # logits differ by at most 2 (H + 4) u beta |q| |k|, and an output by twice that times the largest value.
    largest = np.linalg.norm(layer.query, axis=-1).max() * np.linalg.norm(layer.key, axis=-1).max() * 0.7 / 2.5
    H, u = layer.query.shape[-1], 2.0**-24
    bound = (4 * (H + 4) * largest + 4 * (len(tokens[0]) + 8)) * u * np.abs(layer.value).max()
    np.testing.assert_allclose(found, expected, atol=bound, rtol=0)


def test_a_run_is_captured_by_its_command(reference, tmp_path, capsys):
    out = tmp_path / "new" / "run.safetensors"
    command = [str(reference.folder / reference.name), "--out", str(out), "--sequences", "3", "--context", "24"]
    assert main(command) == 0
    (layer,) = load(out)
    assert layer.name == "reference after 30 steps, 24 tokens, causal"
    assert (layer.query.shape, layer.key.shape, layer.value.shape) == ((3, 24, 4, 4), (3, 24, 2, 4), (3, 24, 2, 4))
    assert str(reference.folder).encode() not in out.read_bytes()
    before = out.read_bytes()
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert out.read_bytes() == before


def test_a_soft_cap_is_refused(reference):
    saved = load_run(reference.folder / reference.name)
    capped = saved._replace(run=dataclasses.replace(saved.run, soft_cap=5.0))
    with pytest.raises(ValueError, match=r"soft_cap is 5\.0"):
        captured(capped, np.zeros((1, 16), np.uint8))


def test_layers_are_read_in_order_each_with_its_own_scale(tmp_path):
    draw = np.random.default_rng(0).standard_normal((2, 3, 1, 5, 2, 4)).astype(np.float32)
    layers = [Layer(query=q, key=k, value=v, beta=np.array([1.0, 3.0]) + depth) for depth, (q, k, v) in enumerate(draw)]
    save(tmp_path / "two", layers, "two layers")
    together = concatenated(load(tmp_path / "two"))
    np.testing.assert_array_equal(together.key, draw[:, 1, 0])
    np.testing.assert_array_equal(together.value, draw[:, 2, 0])
    # beta sqrt(4), whole numbers: no rounding.
    np.testing.assert_array_equal(together.query, draw[:, 0, 0] * np.array([[[[2], [6]]], [[[4], [8]]]], np.float32))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"not these", "no safetensors file"),
        (safetensors.numpy.save({"x": np.zeros(2)}), "of format None: expected 1"),
        (safetensors.numpy.save({"x": np.zeros(2)}, {"attention-lab": '{"format": 2}'}), "of format 2: expected 1"),
    ],
)
def test_what_is_no_file_of_operands_is_refused(content, message, tmp_path):
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "file")
