<<<<<<< HEAD
"""The version of scalekd."""
=======
"""The version of the package."""
>>>>>>> w1

__version__ = "0.1.0"
