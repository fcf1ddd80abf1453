"""Information theory that makes neural networks small and robust: the library of the book.

One module a chapter; import what is needed, for instance ``from fishlib.data import ImageData``.
"""

__version__ = "0.1.0"
