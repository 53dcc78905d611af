"""The base LM, the hypernetwork, and their weights."""
