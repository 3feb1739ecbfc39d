"""Readers and generators of forget and retain sets."""
