"""The one place where the version is written: the package and CMakeLists.txt read it here."""

__version__ = "0.1.0"
