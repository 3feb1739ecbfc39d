"""The RWKU benchmark on a folder: its sets, evaluation and run."""
