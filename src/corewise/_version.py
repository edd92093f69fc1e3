"""The version of corewise."""

__version__ = "0.1.0"
