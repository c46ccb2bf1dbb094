"""DistributedDataParallel averages gradients in buckets, which `p.grad` may be views of; ranks stay equal (gloo)."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("ddp_worker.py")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_ranks_equal_each_other_and_one_process(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = {**os.environ, "PYTHONPATH": str(WORKER.parents[2]), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), "2", port, str(tmp_path)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    logs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(logs)[-4000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    for a, b in zip(first["parameters"], second["parameters"], strict=True):
        assert torch.equal(a, b)
    for key, values in first["optimizer"]["state"].items():
        for name, value in values.items():
            assert torch.equal(value, second["optimizer"]["state"][key][name]), (key, name)
    assert first["optimizer"]["state"][0]["exp_avg"].dtype == torch.uint8

    spec = importlib.util.spec_from_file_location("ddp_worker", WORKER)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    net, start = worker.model(), worker.model()
    worker.train(net, 0, 1)
    for a, b, before in zip(first["parameters"], net.parameters(), start.parameters(), strict=True):
        # The sum of two halves rounds differently from the whole, which may tip a code.
        assert (a - b).norm() < 0.01 * (b - before).norm()
