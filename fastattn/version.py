"""The version of this package: the one place that has it. setup.py reads this line without importing anything."""
__version__ = "0.1.0"
