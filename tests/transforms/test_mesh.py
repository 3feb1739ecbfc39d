"""The contract table's transforms on a mesh of devices, in a process with four of them."""

import json
import os
import subprocess
import sys

from tests.conftest import ROOT
from tests.test_contract import TRANSFORMS


def test_sharded_updates_are_the_same_and_stay_sharded():
    flags = "--xla_force_host_platform_device_count=4"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "0", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "tests.transforms.mesh"]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    kinds = ("Auto", "Explicit")
    assert list(found) == [f"{row.name}, {kind}" for kind in kinds for row in TRANSFORMS]
    for name, seen in found.items():
        assert seen["difference"] < 1e-5, name
        assert seen["updates"], f"{name}: the updates are sharded in another way than they came"
        assert seen["state"], f"{name}: the state moves between devices from step to step"
        assert seen["programs"] <= 2, name
