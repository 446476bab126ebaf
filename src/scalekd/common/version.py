"""The version of scalekd."""

__version__ = "0.1.0"
