"""CryoSPIRE: heterogeneous single-particle cryo-EM by a part-aware Gaussian mixture."""

__version__ = "0.1.0"
