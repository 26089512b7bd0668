"""The names by which engines and users know what this package registers."""

BACKEND_NAME = "MSA"
"""What ``--attention-backend`` is given, in the case vLLM keeps names in; users may write either."""

SGLANG_BACKEND_NAME = BACKEND_NAME.lower()
"""The same in the case SGLang keeps names in, which is the only one it takes."""

PARSER_NAME = "msa_minimax_m3"
"""What ``--reasoning-parser`` and ``--tool-call-parser`` are given."""

TEXT_ARCHITECTURE = "MiniMaxM3SparseForCausalLM"
"""Text only, in the original form."""

IMAGE_ARCHITECTURE = "MiniMaxM3SparseForConditionalGeneration"
"""With a vision tower, in both forms."""

M3_ARCHITECTURES = (
    TEXT_ARCHITECTURE,
    "MiniMaxM3VLForCausalLM",  # text only, transformers form
    IMAGE_ARCHITECTURE,
)
