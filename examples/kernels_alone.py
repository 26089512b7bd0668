"""MSA without an engine: choose 16 blocks of a sequence of 8,192 tokens for its last 4, and attend to them."""

import torch

from msa_backend.kernels import api as msa

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
tokens, new, heads, kv_heads, dim = 8192, 4, 64, 4, 128

make = {"dtype": dtype, "device": device}
pages = tokens // 128  # a page is a block: 128 tokens
caches = msa.LayerCaches(
    k_pages=torch.randn(pages, kv_heads, 128, dim, **make),
    v_pages=torch.randn(pages, kv_heads, 128, dim, **make),
    index_k_pages=torch.randn(pages, 128, dim, **make),
)
batch = msa.Batch(
    cu_seqlens_q=torch.tensor([0, new], dtype=torch.int32, device=device),
    seq_lens=torch.tensor([tokens], dtype=torch.int32, device=device),
    block_table=torch.arange(pages, dtype=torch.int32, device=device)[None],
    max_query_len=new,
    max_seq_len=tokens,
)
q = torch.randn(new, heads, dim, **make)
index_q = torch.randn(new, kv_heads, dim, **make)

blocks = msa.select_blocks(index_q, caches, batch, msa.Selection(topk=16))
out = msa.sparse_attention(q, caches, blocks, batch, scale=dim**-0.5)
print(f"blocks of the last token, group 0: {blocks[0, -1].tolist()}")
print(f"output: {tuple(out.shape)}")
