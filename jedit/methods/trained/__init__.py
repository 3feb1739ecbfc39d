"""Methods that train: each returns a `TrainingMethod`."""
