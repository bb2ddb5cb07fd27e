"""Problems for training and evaluation: synthetic, from files, from the Hub, or perturbed copies.

Read datasets.py first, which serves them all; jsonl.py defines the file format.
"""
