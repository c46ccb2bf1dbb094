"""FSDP and FSDP2 over the drop-in's 4-bit layers, on two gloo processes: sharding changes no output."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.integrations.dropin.harness import environment

SCRIPT = Path(__file__).parent / "dropin" / "fsdp.py"


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("how", ["fsdp1", "fsdp2"])
def test_sharded_layers_equal_whole_ones(how: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), port, how],
            env=environment(shim=True),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    logs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(logs)[-6000:]
    assert all(log.rstrip().endswith("done") for log in logs)
