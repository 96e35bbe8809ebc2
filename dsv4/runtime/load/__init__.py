"""Weights from disk to device at the speed of the bus, checked on the way; start at `loaded`.

plan.py      metadata -> a place in one arena for every array, or for a rank's part of it
jobs.py      the plan cut into what a reader does at a time
files.py     bytes of a file into given memory, past the page cache or through it
readers.py   threads: read, check, hand to the copy
arena.py     the device's memory, the ring of pinned slots, the copies
loaded.py    all of it, and the weights by name
report.py    what it took
"""

from dsv4.runtime.load.loaded import LoadedWeights, Settings, load_weights
from dsv4.runtime.load.plan import EVERYTHING, LoadPlan, Part, Share, plan_load
from dsv4.runtime.load.report import LoadReport

__all__ = [
    "EVERYTHING",
    "LoadPlan",
    "LoadReport",
    "LoadedWeights",
    "Part",
    "Settings",
    "Share",
    "load_weights",
    "plan_load",
]
