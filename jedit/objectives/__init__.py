"""Forget and retain losses, one file each."""
