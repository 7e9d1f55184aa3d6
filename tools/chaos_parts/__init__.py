"""The parts of tools/chaos.py: what is done to a run, its damaged shards, its starts, the two runs, the proof."""
