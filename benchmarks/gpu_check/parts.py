"""Everything that can be asked for, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gpu_check import fleet, models, on_sglang, on_vllm, several_gpus, tests
from gpu_check.host import Host
from gpu_check.job import Job, needed

PARTS: dict[str, Callable[[Host], list[Job]]] = {
    "vllm:kernels": tests.kernels,
    "vllm:memcheck": tests.memcheck,
    "vllm:caches": on_vllm.caches,
    "vllm:mxfp8": on_vllm.mxfp8,
    "vllm:fp8": on_vllm.fp8,
    "vllm:mtp": on_vllm.mtp,
    "vllm:eagle3": on_vllm.eagle3,
    "vllm:suite": tests.suite,
    "vllm:server": tests.server,
    "vllm:fleet-parts": fleet.parts,
    "vllm:serve": on_vllm.serve,
    "vllm:fleet": fleet.fleet,
    "vllm-x2:ranks": several_gpus.ranks,
    "vllm-x2:other-ways": several_gpus.other_ways,
    "vllm-x2:scoring": several_gpus.scoring,
    "vllm-x2:serve": several_gpus.serve,
    "sglang:truth": on_sglang.truth,
    "sglang:fp8": on_sglang.fp8,
    "sglang:equal": on_sglang.equal,
    "sglang:suite": tests.suite_sglang,
    "sglang:server": tests.server_sglang,
    "sglang:quick": on_sglang.quick,
    "sglang:profile": on_sglang.profile,
    "sglang:full": on_sglang.full,
}


def chosen(words: Sequence[str], host: Host) -> list[Job]:
    """The jobs asked for, after those that write their models.

    Args:
        words: engines, parts or jobs: "vllm", "vllm-x2", "vllm:mtp", "sglang-full-ours".

    Raises:
        ValueError: one is none of them; it says which there are.
    """
    of_parts = {name: make(host) for name, make in PARTS.items()}
    every = {job.name: job for jobs in (models.jobs(host), *of_parts.values()) for job in jobs}
    wanted: list[Job] = []
    for word in words:
        found = [job for name, jobs in of_parts.items() if word in (name, name.partition(":")[0]) for job in jobs]
        if word in every:
            found = [every[word]]
        if not found:
            raise ValueError(
                f"there is no part {word!r}; take vllm, vllm-x2 (two GPUs), sglang or some of {', '.join(PARTS)}"
            )
        wanted += found
    # What others wait for comes first.
    return sorted(needed(wanted, every), key=lambda job: job.part != "models")
