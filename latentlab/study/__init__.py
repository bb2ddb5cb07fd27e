"""Studies: arms × seeds as one experiment, the notebooks in order, and the results, tables and figures made of them.

Read results.py first: it defines the one file format that everything here writes or reads.
"""
