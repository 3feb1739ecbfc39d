"""The TOFU benchmark: its sets, models, evaluation, attacks and presets."""
