"""What the library needs of the machine: files, processes, signals, the Hub and the environment.

Nothing here knows of models or training. Read files.py first, then distributed.py.
"""
