"""tunelet: align small language models, end to end, on the computer you already have."""

__version__ = "0.1.0"
