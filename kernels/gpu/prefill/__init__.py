"""Attention of long prompts, KV outer: built for steps in which many tokens select each block."""
