"""Measurements of the other rooms: each line a figure, its bound, and whether the result is right.

Uses every room and is used by none but the command line. Peers are compared with where they are
installed (the `test` extra) and named as missing where they are not.
"""
