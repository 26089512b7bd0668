"""Memory beyond inputs and output is bounded, however long the context."""

from __future__ import annotations

from ..memory import growth, measured

# A chunk of 2,048 tokens after 128K, in the shape of the released model. One dense score matrix of it has
# 64 * 2048 * 133120 elements, 70 GB of fp32; the index scores alone, for every key, 4.4 GB.
SCRIPT = """
import resource
import torch
from msa_backend.kernels import api

torch.set_num_threads(1)
query_len, context_len = 2048, 131072
num_pages = (context_len + query_len) // 128

def normal(*shape):
    return torch.empty(shape, dtype=torch.bfloat16).normal_()

def int32(*values):
    return torch.tensor(values, dtype=torch.int32)

q, index_q = normal(query_len, 64, 128), normal(query_len, 4, 128)
k_pages, v_pages = normal(num_pages, 4, 128, 256).chunk(2, dim=-1)
index_k_pages = normal(num_pages, 128, 128)
block_table = torch.arange(num_pages, dtype=torch.int32)[None]
caches = api.LayerCaches(k_pages, v_pages, index_k_pages)
batch = api.Batch(int32(0, query_len), int32(context_len + query_len), block_table, query_len, context_len + query_len)

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
api.attend(q, index_q, caches, batch, api.Selection(topk=16), 128**-0.5)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@measured
def test_chunk_after_128k():
    assert growth(SCRIPT) < 512 * 2**20
