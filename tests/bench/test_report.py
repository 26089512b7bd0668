"""Numbers as they are printed and kept."""

from __future__ import annotations

import json

import pytest

from msa_backend.bench import plot, report
from msa_backend.bench.cases import Case
from msa_backend.bench.counts import Rates, Work
from msa_backend.bench.locality import Neighbours
from msa_backend.bench.runner import CaseResults, Result

RATES = Rates(bandwidth=4e12, copy=4e12, flops=8e14, fp8_flops=16e14)
OURS = Result(
    "ours", {"select": 0.001, "attend": 0.002, "total": 0.003}, 0.0, 2e-3, [Work(8 * 10**11, 1), Work(0, 4 * 10**9)]
)
DENSE = Result("fa3", {"total": 0.0075}, None, 1e-3, [Work(24 * 10**11, 1)])
BROKEN = Result("vllm", trouble="failed: RuntimeError: out of memory")
FOUND = [
    CaseResults(Case("prefill", 8192, new_tokens=8192), [OURS, BROKEN, DENSE], Neighbours(4, 21.94, 63.5), 2),
    CaseResults(Case("decode", 2**20), [OURS, DENSE], None, 1, sharing=2.625),
]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4415, "441.5"), (0.00174, "1.740"), (15.5e-6, "0.0155"), (2e-6, "0.0020"), (None, "-")]
)
def test_milliseconds_have_four_digits(seconds: float | None, text: str) -> None:
    assert report.milliseconds(seconds) == text


def test_a_ratio_is_how_many_times_ours_theirs_takes() -> None:
    assert report.ratio(0.0075, 0.003) == "2.50x"
    assert report.ratio(None, 0.003) == report.ratio(0.003, None) == "-"


def test_rates_take_the_unit_that_fits() -> None:
    assert report.per_second(4.27e12, "B") == "4.27 TB/s"
    assert report.per_second(9.2e10, "B") == "92 GB/s"


def test_of_the_ceiling_is_the_sum_of_the_floors_over_the_time() -> None:
    assert report.of_ceiling(OURS, RATES) == pytest.approx((0.001 + 0.001) / 0.003)
    assert report.of_ceiling(DENSE, RATES) == pytest.approx(0.003 / 0.0075)


def test_a_block_has_a_line_for_each_implementation_also_for_one_without_times() -> None:
    title, head, ours, broken, dense = report.block(FOUND[0], RATES)
    assert "8,192 new @ 8,192" in title and "calibrated" in title
    assert "4 consecutive tokens choose 21.9 distinct blocks of 63.5" in title
    assert "of ceiling" in head
    assert next(report.block(FOUND[1], RATES)).endswith("1 set of inputs; 2.6 sequences share a page")
    assert " ".join(ours.split()) == "ours - - 1.000 2.000 3.000 1.00x 267 TFLOP/s 67% 0, 2e-03"
    assert "out of memory" in broken
    assert "2.50x" in dense and "7.500" in dense


def test_the_summary_has_every_case_and_every_baseline() -> None:
    head, prefill, decode = report.summary(FOUND, RATES)
    assert " ".join(head.split()) == "total, ms ours of ceiling vllm fa3"
    assert " ".join(prefill.split()).endswith("calibrated 3.000 67% - - 7.500 2.50x")
    assert " ".join(decode.split()).endswith("bf16 3.000 67% - - 7.500 2.50x")


def test_the_record_is_json_with_milliseconds() -> None:
    kept = json.loads(json.dumps(report.record(FOUND, RATES, {"device": "none"}, {"sglang": "not there"})))
    assert kept["cases"][0]["results"]["ours"]["ms"]["total"] == pytest.approx(3.0)
    assert kept["cases"][0]["results"]["vllm"] == {"trouble": BROKEN.trouble}
    assert kept["cases"][1]["context"] == 2**20
    assert kept["absent"] == {"sglang": "not there"}


def test_a_record_read_back_draws_the_same_lines() -> None:
    kept = json.loads(json.dumps(report.record(FOUND, RATES, {}, {})))
    found = report.read(kept)
    assert [(case.case, case.neighbours, case.sharing) for case in found] == [
        (case.case, case.neighbours, case.sharing) for case in FOUND
    ]
    again, lines = plot.lines(found), plot.lines(FOUND)
    assert {mode: set(of_mode) for mode, of_mode in again.items()} == {mode: set(m) for mode, m in lines.items()}
    assert again["prefill"]["fa3", "64/4"] == [(8192, pytest.approx(7.5))]


def test_lines_of_the_plot_join_cases_that_differ_in_context_alone() -> None:
    cases = [
        Case("prefill", 8192, new_tokens=8192),
        Case("prefill", 4096, new_tokens=4096),
        Case("prefill", 16384, new_tokens=100),
        Case("decode", 2**20, batch=2, fp8_index=True),
    ]
    found = [CaseResults(case, [OURS, BROKEN], None, 1) for case in cases]
    assert plot.lines(found) == {
        "prefill": {
            ("ours", "64/4"): [(4096, 3.0), (8192, 3.0)],
            ("ours", "64/4 100 new"): [(16384, 3.0)],
        },
        "decode": {("ours", "64/4 x 2 fp8 index"): [(2**20, 3.0)]},
    }
