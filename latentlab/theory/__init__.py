"""Exact theory: moments of gradient estimators on a policy small enough to enumerate.

Read `enumeration.py` first (the policy), then `moments.py` (the estimators) and `proofs.py`.
"""
