"""Presets: each module names one sweep; its docstring says how to run it, how long it takes and what it shows."""
