"""The MiniMax-M3 text model for vLLM, built from vLLM's own layers around ``MSAAttention``."""
