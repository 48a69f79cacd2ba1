"""Experiments on attention, run from a checkout: training, sweeps, benchmarks and their reports."""
