"""The markers in MiniMax-M3's text that a chat template writes and a parser finds."""

ROLE = "]~b]"
"""Begins a message; the name of its role follows."""

THINK_START, THINK_END = "<mm:think>", "</mm:think>"
"""Around a thought, which comes before the answer. The end alone says that there is none."""

NAMESPACE = "]<]minimax[>["
"""Before each tag of a tool call and of its arguments."""
