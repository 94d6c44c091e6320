"""Shared by every test: this folder is importable, for the tiny models in toys.py."""
