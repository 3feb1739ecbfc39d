"""`--mesh`: what it is read as, and what is refused."""

import jax
import pytest

from jedit.cli.checks import UsageError
from jedit.cli.mesh import mesh_axes, mesh_of


def test_axes_and_sizes_in_their_order():
    assert mesh_axes("data=4,model=2") == {"data": 4, "model": 2}
    assert list(mesh_axes("model=2, data=1")) == ["model", "data"]
    assert mesh_axes("model=8") == {"model": 8}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is not of the form data=4,model=2"),
        ("4x2", "is not of the form"),
        ("data=-1", "is not of the form"),
        ("data=2.5", "is not of the form"),
        ("data=4,", "is not of the form"),
        ("data=" + "9" * 200, "is not of the form"),
        ("rows=4", "there is no axis rows; give data, model"),
        ("data=0,model=2", "the axis data must be at least 1"),
        ("data=2,data=2", "names the axis data twice"),
    ],
)
def test_what_is_no_mesh_is_refused(text, sentence):
    with pytest.raises(UsageError, match=sentence):
        mesh_axes(text)


def test_a_mesh_of_the_devices_that_are_there():
    mesh = mesh_of("data=1,model=1")
    assert dict(mesh.shape) == {"data": 1, "model": 1}
    number = len(jax.devices())
    with pytest.raises(UsageError, match=f"takes {2 * number} devices, and there are {number}"):
        mesh_of(f"data={2 * number}")
