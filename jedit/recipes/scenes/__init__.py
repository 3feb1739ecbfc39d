"""Scenes: a model, what it learnt, and what of it is to be forgotten."""
