"""Makes ``import builders`` work from every test folder, and keeps a worker to the threads that it is given."""

import os
import sys
from pathlib import Path

from cryospire import kernels

sys.path.insert(0, str(Path(__file__).parent))
if "OMP_NUM_THREADS" in os.environ:  # numba's pool would set OpenMP to all CPUs where a test starts it
    kernels.set_threads(int(os.environ["OMP_NUM_THREADS"]))
