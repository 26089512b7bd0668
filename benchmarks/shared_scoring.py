"""What sharing the scoring of blocks among tensor-parallel ranks saves, and what it costs.

    python benchmarks/shared_scoring.py                                   # one GPU: each rank's work, no exchange
    torchrun --nproc-per-node 2 benchmarks/shared_scoring.py              # two: with the exchanges
    python benchmarks/shared_scoring.py --device cpu --cases decode:4096 --ranks 2     # does it run?

Selection of one sparse layer of the released model, bf16, by a rank: *alone* all blocks for its own index heads;
*share* every ranks-th block for all four, and *merge* the choice for its own. Decode as replays of a CUDA graph that
was captured for its own context. With several processes the ranks are these, and *shared* is all of it, both exchanges
included, as `msa_backend.sharing` does it; the slowest rank counts. In this repository's folder set PYTHONSAFEPATH=1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from msa_backend.bench.cases import Case
from msa_backend.bench.inputs import Inputs, make_cache, make_inputs
from msa_backend.kernels import api
from msa_backend.kernels.api import Selection, Share
from msa_backend.sharing import SharedScoring

CASES = "decode:131072,decode:524288,decode:1048576,prefill:131072,prefill:524288"
NEW = {"decode": 1, "prefill": 8192}
# Numbers that do not depend on what a rank measures: an exchange takes part in as many calls on all of them.
IN_GRAPH, REPEATS = 20, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=CASES, help="mode:context, ...; modes are decode and prefill; %(default)s")
    parser.add_argument("--ranks", default="2,4,8", help="where one process plays a rank; %(default)s")
    parser.add_argument("--fp8-index", action="store_true", help="index keys and queries in e4m3")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()

    world = int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device(options.device, int(os.environ.get("LOCAL_RANK", "0")) if options.device == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rows = []
    for text in options.cases.split(","):
        mode, context = text.split(":")
        case = Case(mode, int(context), new_tokens=min(NEW[mode], int(context)), fp8_index=options.fp8_index)
        inputs = make_inputs(case, make_cache(case, device, seed=0), seed=0)
        for ranks in [world] if world > 1 else [int(n) for n in options.ranks.split(",")]:
            row = {"case": case.title, "ranks": ranks} | _measure(inputs, ranks)
            if world == 1 or dist.get_rank() == 0:
                rows.append(row)
                print(_line(row), flush=True)
        del inputs
    if rows and options.json:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        about = {
            "command": " ".join(["benchmarks/shared_scoring.py", *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": f"{world} x {name}",
            "versions": {"torch": torch.__version__},
        }
        options.json.write_text(json.dumps(about | {"unit": "us", "rows": rows}, indent=1) + "\n")
    if world > 1:
        dist.destroy_process_group()


def _measure(inputs: Inputs, ranks: int) -> dict[str, float]:
    """Microseconds of each part, of the slowest rank."""
    index_q = inputs.index_q if inputs.index_q_fp8 is None else inputs.index_q_fp8
    heads = index_q.shape[1]
    own = max(1, heads // ranks)
    selection = Selection(inputs.case.topk)
    rank = dist.get_rank() if dist.is_initialized() else 0
    mine = index_q[:, rank * heads // ranks :][:, :own].contiguous()
    share = Share(rank, ranks)
    # A batch of its own for each part: what is worked out of one stays with it, as between the layers of a step.
    batches = [replace(inputs.batch) for _ in range(4)]

    candidates = api.select_candidates(index_q, inputs.caches, batches[1], selection, share)
    gathered = torch.stack([candidates] * ranks)[:, :, :own]
    parts: dict[str, Callable[[], Tensor]] = {
        "alone": lambda: api.select_blocks(mine, inputs.caches, batches[0], selection),
        "share": lambda: api.select_candidates(index_q, inputs.caches, batches[1], selection, share),
        "merge": lambda: api.merge_candidates(gathered, batches[2], selection),
    }
    if dist.is_initialized():
        sharing = SharedScoring(rank, ranks, max(1, ranks // heads), 1, _gather)
        parts["shared"] = lambda: sharing.select_blocks(mine, inputs.caches, batches[3], selection)
    found = {}
    for name, call in parts.items():
        seconds = torch.tensor([_seconds(call, inputs)], device=inputs.q.device)
        if dist.is_initialized():
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
        found[name] = round(float(seconds) * 1e6, 1)
    return found


def _seconds(call: Callable[[], Tensor], inputs: Inputs) -> float:
    for _ in range(3):
        call()
    if not inputs.q.is_cuda:
        times = [time.perf_counter()]
        for _ in range(REPEATS):
            call()
            times.append(time.perf_counter())
        return median(end - start for start, end in zip(times, times[1:], strict=False))
    run: Callable[[], object] = call
    calls = 1
    if inputs.case.in_graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(IN_GRAPH):
                call()
        run, calls = graph.replay, IN_GRAPH
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    run()
    for event in events[:-1]:
        event.record()
        run()
    events[-1].record()
    torch.cuda.synchronize()
    return median(a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)) / 1e3 / calls


def _gather(x: Tensor) -> Tensor:
    found = x.new_empty(dist.get_world_size(), *x.shape)
    dist.all_gather_into_tensor(found.view(torch.float32).flatten(), x.view(torch.float32).flatten())
    return found


def _line(row: dict[str, object]) -> str:
    times = "  ".join(f"{name} {value:>9,}" for name, value in row.items() if name not in ("case", "ranks"))
    return f"{row['case']:<48} {row['ranks']} ranks, us:  {times}"


if __name__ == "__main__":
    main()
