"""Training: the curriculum that makes thoughts latent, then GRPO; both loops share one run folder.

Read arms.py first (one GRPO iteration), then run.py (what a run folder holds and how it resumes).
"""
