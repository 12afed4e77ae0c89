"""One page and some pictures of what happened in training runs: `adakd report`.

Reads what the runs left in their folders, and needs neither their models nor transformers, but matplotlib.
"""
