"""Putting deltas on a model: choose modules, attach, switch, merge."""
