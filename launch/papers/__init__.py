"""What the papers report of their systems, and how far their order is that of our own figures: a part of zoo.py."""
