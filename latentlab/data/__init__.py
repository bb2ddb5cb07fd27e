"""Problems to train and evaluate on: synthetic ones, files, data sets of the Hub, copies with other numbers.

Read datasets.py first, which serves them all; jsonl.py defines the file format.
"""
