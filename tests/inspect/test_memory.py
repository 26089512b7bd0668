"""Memory beyond the model and its cache is bounded, however long the context."""

from __future__ import annotations

from ..memory import growth, measured

# The last 128 tokens of 64K, in the shape of the released model's group. The dense attention of them alone has
# 16 * 128 * 65536 elements, 537 MB of fp32, and that of the whole context 275 GB.
SCRIPT = """
import resource
import torch
from msa_backend.transformers import dense
from msa_backend.inspect.forward import Seen
from msa_backend.inspect.measure import Measures
from msa_backend.inspect.plan import Plan
from msa_backend.kernels.selection import Selection

torch.set_num_threads(1)
tokens, new = 65536, 128
q, k = torch.randn(16, new, 128), torch.randn(1, tokens, 128)
index_q, index_k = torch.randn(1, new, 128), torch.randn(tokens, 128)
block_ids = torch.arange(16, dtype=torch.int32).expand(1, new, 16).contiguous()
queries = tuple(range(tokens - new, tokens))
sweep = tuple((size, Selection(topk)) for size in (64, 128) for topk in (8, 16))
measures = Measures(Plan(tokens, (0,), 128, Selection(16), None, queries, sweep), 1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
measures.observe(0, Seen(q, k, index_q, index_k, block_ids, 128**-0.5))
dense.attention(q, k, k, torch.arange(tokens - new, tokens), 128**-0.5)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@measured
def test_queries_after_64k():
    assert growth(SCRIPT) < 360 * 2**20
