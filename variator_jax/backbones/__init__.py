"""Frozen backbones: one folder each, behind the interface in `base.py`."""
