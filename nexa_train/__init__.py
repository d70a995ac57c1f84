"""Nexa: one training job, the same result on every machine."""

__version__ = "0.1.0"
