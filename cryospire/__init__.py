"""CryoSPIRE: heterogeneous single-particle cryo-EM by a part-aware Gaussian mixture."""

import os

__version__ = "0.1.0"

# Threads of GNU OpenMP that have done their share soon give their core up; it reads this once, before torch starts.  By default they
# spin: where others compute on the machine too, a thread waits for a core that is only waited on.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
