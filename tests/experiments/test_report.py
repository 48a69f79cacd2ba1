import math

from experiments import report
from experiments.config import Run, to_dict

LAYERS, HEADS, STEPS = 2, 2, (0, 10, 20)


def made_up_results(offsets=None, seeds=(0, 1)):
    """A sweep over scale x temperature x seed whose loss is |log2 beta| / 10 + the program's offset."""
    offsets = offsets or {"Exact()": 2.0, "Half()": 2.02}
    results = {
        "format": report.FORMAT,
        "name": "made-up",
        "preset": "made_up",
        "description": "A made-up sweep.",
        "command": "python -m experiments.sweep made_up",
        "planned": len(offsets) * 6 * len(seeds),
        "population": "loop",
        "config": to_dict(Run()),
        "axes": {"scale": [0.25, 0.5], "temperature": [0.5, 1.0, 2.0], "seed": list(seeds)},
        "environment": {"versions": {"jax": "0"}, "device": {"platform": "cpu", "kind": "cpu", "count": 1}},
        "corpus": {"name": "stdlib", "sha256": "0" * 64, "unigram_entropy": 3.1},
        "programs": {},
        "points": [],
    }
    for number, (label, offset) in enumerate(offsets.items()):
        results["programs"][f"p{number}"] = {
            "label": label,
            "reference": label == "Exact()",
            "config": to_dict(Run()),
            "corpus": results["corpus"],
            "parameters": 1000,
            "timings": {"setup_seconds": 9.5, "compile_seconds": 1.5 + number, "cached": False},
            "memory": {"temporary_bytes": 2**20 * (number + 1), "argument_bytes": 2**20, "output_bytes": 0},
            "cost": {"flops": 1e9, "bytes_accessed": 1e8},
        }
        for scale in (0.25, 0.5):
            for temperature in (0.5, 1.0, 2.0):
                results["points"] += [made_up_point(f"p{number}", offset, scale, temperature, seed) for seed in seeds]
    return results


def made_up_point(program, offset, scale, temperature, seed):
    beta = scale / temperature
    losses = [5 / (1 + step) + offset + abs(math.log2(beta)) / 10 + seed / 100 for step in STEPS]
    evaluations = [
        {"step": step, "loss": loss, "bits_per_byte": loss / math.log(2), "entropy": [[3 - beta] * HEADS] * LAYERS}
        for step, loss in zip(STEPS, losses, strict=True)
    ]
    return {
        "id": f"{program}-{scale}-{temperature}-{seed}",
        "program": program,
        "axes": {"scale": scale, "temperature": temperature, "seed": seed},
        "scale": scale,
        "temperature": temperature,
        "beta": beta,
        "learning_rate": 1e-3,
        "seed": seed,
        "losses": losses,
        "evaluations": evaluations,
        "diverged_at": None,
        "timings": {"seconds": 1.0, "seconds_per_step": 0.01},
    }
