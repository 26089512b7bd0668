"""MiniMax-M3. ``config``, ``weights`` and ``checkpoint`` are shared; each engine's model class has a folder."""
