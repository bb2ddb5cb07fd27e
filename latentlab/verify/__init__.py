"""`latentlab verify`: exact proofs, and whether this device and precision replays rollouts exactly.

Read `reference.py` first (a latent rollout defined plainly), then `engine.py` (what must equal it).
"""
