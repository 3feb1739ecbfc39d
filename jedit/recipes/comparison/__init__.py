"""The comparison engine: every method on one task, judged alike."""
