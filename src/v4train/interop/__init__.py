"""Open weights: read, write and prove equal to the public DeepSeek-V4 checkpoints.

`quantised` has the number formats and `tensor_files` the files; `names` says which tensor of theirs is which part of which parameter of
ours; the rest is built from the three.
"""
