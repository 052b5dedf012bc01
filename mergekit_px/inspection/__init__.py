"""Looking at checkpoints without merging them.

source     a path or a Hub reference -> an opened checkpoint
describe   what a checkpoint holds, from its headers
compare    how checkpoints differ, tensor by tensor, in bounded memory
verify     whether a merged folder still holds the bytes that its lock file names
"""
