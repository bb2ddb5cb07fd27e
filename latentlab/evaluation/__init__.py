"""Measurements of a model: accuracy with intervals, collapse of groups, contents of thoughts.

Read accuracy.py first, then statistics.py, which compares arms.
"""
