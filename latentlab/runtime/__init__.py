"""What the library needs of the machine: files, processes, devices, signals, the Hub.

Nothing here knows of models or training. Read files.py first, then distributed.py.
"""
