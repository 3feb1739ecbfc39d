"""Unlearning and editing methods, one paper each."""
