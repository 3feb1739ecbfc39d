"""The README's claims, one script each: `python -m tests.bench.claims.NAME` runs it over its seeds.

Each writes its numbers to out/claims/NAME.json, and its figure, where it has one, beside them.
"""
