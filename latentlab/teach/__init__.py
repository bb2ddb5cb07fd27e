"""For lectures: thoughts one can read, one's own questions, a playground, exercises with checks.

Read thoughts.py first.
"""
