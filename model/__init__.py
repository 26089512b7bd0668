"""MiniMax-M3 for each engine. What the engines share is in ``config``, ``weights`` and ``reference parts`` only."""
