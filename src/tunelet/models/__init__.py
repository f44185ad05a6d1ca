"""Models: load, save, device choice, attention, loss head, adapters."""

import os
import sys

# OpenMP's threads spin while they wait for each other. Where another program takes a core, even a browser, the spinning
# costs more than sleeping: training beside one busy process ran 4 times slower with it. Read once, when torch is
# loaded.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
