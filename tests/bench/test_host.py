"""Host time: what is counted of it, and how it is printed."""

from __future__ import annotations

import pytest
import torch

from msa_backend.bench import baselines, host
from msa_backend.bench.baselines import ours
from msa_backend.bench.cases import PRESETS, Case
from msa_backend.bench.host import HostCase, HostResult


def test_waits_for_the_device_are_not_counted_and_come_before_its_queue_is_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, since_wait, longest = 0.0, 0, 0

    def call() -> None:
        nonlocal now, since_wait, longest
        now += 2.0 if since_wait == 0 else 0.5
        since_wait += 1
        longest = max(longest, since_wait)

    def wait() -> None:
        nonlocal now, since_wait
        now += 100.0
        since_wait = 0

    monkeypatch.setattr(host.time, "perf_counter", lambda: now)
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    seconds = host.host_seconds(call, torch.device("cuda"), budget=60)
    assert seconds == pytest.approx((2.0 + 0.5 * (host.CALLS - 1)) / host.CALLS)
    assert longest == host.CALLS
    assert since_wait == 0


def test_a_part_that_fails_leaves_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_write(*_: object) -> baselines.Layer:
        def write() -> None:
            raise AttributeError("no such\noperation")

        return baselines.Layer(write, lambda: None)

    monkeypatch.setattr(ours, "layer", no_write)
    case = next(PRESETS["small"]())
    (result,) = host.run(case, ["ours"], torch.device("cpu"), budget=0).results
    assert result.seconds.keys() == {"attend"}
    assert result.trouble == "AttributeError: no such operation"


def test_the_table_has_both_parts_and_says_what_failed() -> None:
    found = [
        HostCase(
            Case("suffix", 4096, new_tokens=171),
            [
                HostResult("ours", {"attend": 30e-6, "layer": 40e-6}),
                HostResult("vllm", {"attend": 105.4e-6}, "AttributeError: no write"),
            ],
        )
    ]
    head, attend, layer, failed = host.table(found)
    assert " ".join(head.split()) == "host time of a layer, us ours vllm to ours"
    assert " ".join(attend.split()).endswith("calibrated; select + attend 30 105 3.51x")
    assert " ".join(layer.split()).endswith("; with norm, rope and write 40 - -")
    assert failed.endswith("vllm failed: AttributeError: no write")
    assert host.record(found)[0]["host_us"]["vllm"] == {"attend": pytest.approx(105.4)}
