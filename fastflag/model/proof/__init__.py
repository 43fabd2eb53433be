"""Kernels prove themselves on the machine where they are to run: right first, then faster.

gpu        what the GPU is, without a context on it
key        what a verdict holds for: model, GPU, libraries, sources, flags
verdicts   one file an op, and the lock of a GPU
speed      what counts as faster; as right, `exactness` beside this folder
clock      how long work takes
maker, cases, exact   what an op is tried on, and its formula in fp64
bands, trial          whether one implementation is right
devices               where it is tried
child, parent         the process that tries, and who starts it again
layer                 the chosen ones together
choice                what the verdicts come to
"""
