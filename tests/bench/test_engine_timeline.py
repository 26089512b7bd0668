"""A profile's kernels go to the steps whose host code launched them, and are counted and timed there."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from engine import timeline


def annotation(start: float, length: float, name: str) -> dict[str, Any]:
    return {"ph": "X", "cat": "user_annotation", "name": name, "ts": start, "dur": length}


def launch(start: float, correlation: int, category: str = "cuda_runtime") -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": "launch", "ts": start, "dur": 5, "args": {"correlation": correlation}}


def work(start: float, length: float, correlation: int, name: str, category: str = "kernel") -> dict[str, Any]:
    return {
        "ph": "X", "cat": category, "name": name, "ts": start, "dur": length, "args": {"correlation": correlation},
    }  # fmt: skip


DECODE = "execute_context_0(0)_generation_2(2)"
# A graph of three kernels a decode step, each step's last one running when the next step has begun on the host; a
# prompt step whose kernels are launched one by one, by the runtime and by the driver.
TRACE = [
    {"ph": "M", "name": "process_name", "args": {"name": "python"}},
    launch(90, 1),
    work(95, 3, 1, "before"),
    annotation(100, 50, DECODE),
    annotation(110, 20, "an inner annotation"),
    launch(120, 2),
    work(130, 10, 2, "_attend_rows"),
    work(140, 10, 2, "_attend_rows"),
    work(205, 20, 2, "nvjet_tst_64x8"),
    annotation(200, 60, DECODE),
    launch(220, 3),
    work(230, 10, 3, "_attend_rows"),
    work(235, 10, 3, "_attend_rows"),  # overlaps the last one by 5
    work(250, 20, 3, "nvjet_tst_64x8"),
    work(280, 5, 3, "Memcpy DtoH", "gpu_memcpy"),
    annotation(300, 50, DECODE),
    launch(320, 4),
    work(330, 10, 4, "_attend_rows"),
    annotation(400, 90, "execute_context_1(171)_generation_0(0)"),
    launch(410, 5),
    launch(420, 6, "cuda_driver"),
    work(520, 30, 6, "_score"),
    work(510, 10, 5, "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float> >(int)"),
]


def test_steps_and_their_kernels() -> None:
    first, second, third, prompt = timeline.steps(TRACE)
    assert [kernel.name for kernel in first.kernels] == ["_attend_rows", "_attend_rows", "nvjet_tst_64x8"]
    assert (first.decodes, first.prompts, first.period, first.host) == (2, 0, 100, 50)
    assert first.gpu == first.busy == 40
    assert second.gpu == 40 and second.busy == 40 - 5 + 5 and len(second.copies) == 1
    assert len(third.kernels) == 1
    assert (first.span, first.idle) == (125, 60)
    assert (prompt.span, prompt.idle) == (150, 110)
    assert (prompt.prompts, prompt.prompt_tokens, prompt.period) == (1, 171, None)
    assert [kernel.name for kernel in prompt.kernels][1] == "_score"


def test_the_order_of_events_does_not_matter() -> None:
    assert timeline.steps(reversed(TRACE)) == timeline.steps(TRACE)


def test_only_whole_steps_of_the_batch_count() -> None:
    found = timeline.steps(TRACE)
    assert timeline.decoding(found, 2) == [found[1]]
    assert timeline.decoding(found, 3) == []
    assert timeline.reading(found) == [found[3]]
    assert timeline.reading(found[:3]) == []


def test_summary_is_a_mean_a_step() -> None:
    numbers = timeline.summary(timeline.steps(TRACE)[:2])
    assert numbers["steps"] == 2 and numbers["kernels"] == 3 and numbers["copies"] == 0.5
    assert numbers["gpu_ms"] == pytest.approx(0.040) and numbers["busy_ms"] == pytest.approx(0.040)
    assert numbers["idle_ms"] == pytest.approx(0.060) and numbers["period_ms"] == pytest.approx(0.100)
    assert numbers["by_name"]["_attend_rows"] == {"count": 2, "ms": pytest.approx(0.020)}
    with pytest.raises(ValueError, match="none of the steps"):
        timeline.summary([])


@pytest.mark.parametrize("packed", [False, True])
def test_reads_a_file(tmp_path: Path, packed: bool) -> None:
    data = json.dumps({"traceEvents": TRACE}).encode()
    file = tmp_path / ("a.pt.trace.json.gz" if packed else "a.pt.trace.json")
    file.write_bytes(gzip.compress(data) if packed else data)
    assert timeline.read(file) == timeline.steps(TRACE)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("_norm_rope_write", "_norm_rope_write"),
        ("nvjet_tst_128x64_64x6_2x1_v_bz_TNT", "nvjet_tst_128x64_64x6_2x1_v_bz_TNT"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, std::array<char*,"
            " 3ul> >(int, at::native::CUDAFunctor_add<float>, std::array<char*, 3ul>)",
            "vectorized_elementwise_kernel[CUDAFunctor_add]",
        ),
        (
            "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)"
            "::{lambda()#3}::operator()() const::{lambda()#7}>(int)",
            "unrolled_elementwise_kernel[direct_copy_kernel_cuda]",
        ),
        (
            "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float, float, float"
            ", float>, unsigned int, float, 4, 4> >(at::native::ReduceOp<float, at::native::MeanOps<float> >)",
            "reduce_kernel[MeanOps]",
        ),
        (
            "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<flash::CollectiveMainloop"
            "FwdSm90<2> > > >(flash::FlashAttnFwdSm90<int>::Params)",
            "device_kernel[FlashAttnFwdSm90]",
        ),
        ("std::enable_if<!(false), void>::type internal::gemvx::kernel<int, float>(int)", "gemvx::kernel"),
        ("void vllm::moe::(anonymous namespace)::topk_gating<float, 4>(float const*)", "topk_gating"),
    ],
)
def test_short_names(name: str, short: str) -> None:
    assert timeline.short_name(name) == short
