"""The parts of the recipe that `examples/train_pair.py` runs, one stage a file."""
