"""The floor of many requests counts right, and the table beside it is made from end to end."""

from tests.bench import requests
from tests.bench.request_floor import request_floor


def test_floor_of_one_matrix_by_hand():
    # 2 x 3, five positions: there and back 4*5*6, the inverses 2*5*(4 + 9), the KL as much.
    assert request_floor([(2, 3)], 5) == 120 + 130 + 130
    assert request_floor([(2, 3)], 5, rank=1) == 120 + 130 + 26
    assert request_floor([(2, 3)], 5, rank=9) == request_floor([(2, 3)], 5)
    assert request_floor([(2, 3), (3, 4)], 1, 1) == (24 + 52) + (48 + 100)


def test_the_matrices_of_the_floor_are_those_that_are_edited():
    answer = requests.prepare(requests.TOY)
    edits, info = answer(solver=requests.Solver(chunk=4))
    kernels = [e for e in edits.blocks.values() if hasattr(e, "weight")]
    found = sorted((e.weight.d_in, e.weight.d_out) for e in kernels)
    assert found == sorted(requests.TOY.matrices)
    assert all(e.left.shape[0] == requests.TOY.number for e in kernels)
    assert info.loss.shape == (requests.TOY.number,)


def test_a_toy_run_from_end_to_end(capsys):
    assert requests.main(["--toy", "--repeats", "1", "--chunks", "3", "--ranks", "2"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    cells = [float(cell) for cell in line.strip("| ").split("|")]
    assert cells[:2] == [3, 2]
    assert all(cell > 0 for cell in cells[2:5:2])
