"""Unlearning of image classifiers by the field's protocol."""
