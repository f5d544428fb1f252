"""The one place where the version is written; setup.py, CMakeLists.txt and the C++ build read it here."""

__version__ = "0.1.0"
