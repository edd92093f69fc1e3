"""corewise makes a PyTorch model run as fast on this CPU as the CPU allows, and proves it."""

__version__ = "0.1.0"
