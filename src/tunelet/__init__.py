"""tunelet: align small language models, end to end, on the computer you already have."""

import os
import sys

__version__ = "0.1.0"

# OpenMP's threads spin while they wait for each other. Where another program takes a core, even a browser, spinning
# costs far more than sleeping: beside one busy process two spinning threads trained 858 tokens/s, two sleeping ones
# 3,801 (two cores). OpenMP reads this once, when torch is loaded, and transformers may load torch before any module of
# ours asks for it: so it is set here, which every verb and every caller passes first.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # oneDNN keeps the last 1,024 matrix products it compiled, and rows of changing length make new shapes at every
    # step: 60 steps of the demo held 1,726 MB with 1,024 of them and 1,460 MB with 128, at the same speed.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
