"""How fast genfast trains, beside everything PyTorch offers for the same work."""
