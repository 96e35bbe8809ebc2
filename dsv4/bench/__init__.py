"""Measurements of the other rooms: each line a figure, its bound, and whether the result is right.

What a user runs to judge his own machine. Uses every room and is used by the command line alone;
comparisons with other projects are in `benchmarks/`, beside the package.
"""
