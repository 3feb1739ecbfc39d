"""Curvatures on a mesh of devices: which device holds and decomposes what."""
