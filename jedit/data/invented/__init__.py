"""Texts that nobody wrote down: authors, their lives and books, made from a seed."""
