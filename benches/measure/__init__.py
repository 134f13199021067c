"""What the benchmark drivers share: checkpoints on disk, and our archives and the peers' as points of rate and error.

Two words are used in one sense throughout:

*matrix weight*: an element of a two-dimensional floating-point tensor of the checkpoint, embeddings and output heads
included.
*relative squared error*: the sum of squared errors over the sum of squares, both over all matrix weights of the
checkpoint.
"""
