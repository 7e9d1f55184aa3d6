"""What was written around a CPU: hand-written backwards, layouts and products that are fast there.

Each has a form of the same name in ``dalle/models/plain.py`` that says what it computes. Which form runs on which
device is said in ``dalle/models/kernels.py``; models import nothing from here.
"""
