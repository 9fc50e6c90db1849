"""The version of this package, in the one place where it is written.

``setup.py`` runs this file without importing the package, which would need MXNet.
"""

__version__ = "0.1.0"
