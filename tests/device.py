"""Where the engines under test run, and in which precision: asked of the environment here and nowhere else.

``MSA_TEST_DEVICE`` is the device, ``cpu`` unless set, and ``MSA_TEST_DTYPE`` the dtype of weights, activations and
caches: ``float32`` on a CPU, ``bfloat16`` elsewhere, because the engines' attention on a GPU has no fp32.
"""

from __future__ import annotations

import os

DEVICE = os.environ.get("MSA_TEST_DEVICE", "cpu")
DTYPE = os.environ.get("MSA_TEST_DTYPE", "float32" if DEVICE == "cpu" else "bfloat16")
