"""The names by which engines and users know what this package registers."""

BACKEND_NAME = "MSA"
"""What ``--attention-backend`` is given, in the case vLLM keeps names in; users may write either."""

SGLANG_BACKEND_NAME = BACKEND_NAME.lower()
"""The same in the case SGLang keeps names in, which is the only one it takes."""

M3_ARCHITECTURES = (
    "MiniMaxM3SparseForCausalLM",  # text only, original form
    "MiniMaxM3VLForCausalLM",  # text only, transformers form
    "MiniMaxM3SparseForConditionalGeneration",  # with a vision tower, both forms
)
