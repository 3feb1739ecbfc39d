"""All methods, one row each: what a method is called, what it needs, how it is made, and its paper.

    row = jedit.methods.CATALOGUE["NPO"]
    material = Material(apply, params, forget, optimizer=optax.adam(1e-4))
    method = row.of(material)
    edit, info = jedit.run_method(method, apply, params, row.forget_rows(material), retain,
                             steps=100, key=key)

The command line, the comparisons of the demo and of TOFU, the tests and the table of all
methods read these rows. A new method is its file, its test, and its row in `methods.rows`.
"""

from types import MappingProxyType

from jedit.methods.row import Row
from jedit.methods.rows import closed_forms, objectives, steps

ROWS: tuple[Row, ...] = (*closed_forms.ROWS, *objectives.ROWS, *steps.ROWS)
CATALOGUE = MappingProxyType({row.name: row for row in ROWS})
