"""MiniMax-M3 through transformers, with MSA's kernels as its attention; no engine.

    python examples/in_a_notebook.py [MODEL]

MODEL is the tiny checkpoint that `msa-backend tiny tiny-m3` writes unless another is named.
"""

import sys

from transformers import AutoTokenizer, MiniMaxM3SparseForConditionalGeneration

from msa_backend.transformers import register

folder = sys.argv[1] if len(sys.argv) > 1 else "tiny-m3"
register()
model = MiniMaxM3SparseForConditionalGeneration.from_pretrained(folder, attn_implementation="msa")
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=20, pad_token_id=0)[0]))
