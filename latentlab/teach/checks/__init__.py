"""The exercises of the notebooks, one module each; exercise.py says how they judge."""
