"""MiniMax Sparse Attention (MSA) and MiniMax-M3 for stock inference engines.

Importing this package loads no engine and no torch, so that the plugin costs nothing in the
processes that do not serve a model.
"""

__version__ = "0.1.0"
