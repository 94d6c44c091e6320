"""Intrinsic dimension: how many directions a task needs, found by training in random subspaces."""
