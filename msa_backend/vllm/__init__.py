"""The vLLM adapter: backend, metadata, attention layer."""
