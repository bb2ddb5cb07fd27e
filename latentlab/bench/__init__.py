"""`latentlab bench`: rollouts and updates against other ways to make them, and against a floor.

Read `baselines.py` first (what is compared), then `engine.py` (what is run) and `timing.py`.
"""
