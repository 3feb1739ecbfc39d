"""Editing methods: one file, one paper; each returns an `Edit` and what it found on the way."""

from jedit.methods.kfade import KfadeInfo, kfade

__all__ = ["KfadeInfo", "kfade"]
