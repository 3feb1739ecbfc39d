"""Subspaces and trust regions that keep the retain set where it is."""
