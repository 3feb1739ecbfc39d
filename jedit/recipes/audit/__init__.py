"""The audit of an edited model's folder, however it came to be: five questions, stated rules."""

from jedit.recipes.audit.parts import Settings
from jedit.recipes.audit.run import audit

__all__ = ["Settings", "audit"]
