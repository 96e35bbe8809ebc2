"""`dsv4.convert` and `dsv4.validate` are functions, and their packages are not in the way."""

from __future__ import annotations

import inspect
import pickle
import pydoc
import subprocess
import sys

import pytest

import dsv4

LIGHT = """
import sys, dsv4
assert "torch" not in sys.modules and "dsv4.convert.engine" not in sys.modules
assert set(dsv4.__all__) <= set(dir(dsv4))
"""
THREADS = """
import sys, threading
start, found = threading.Barrier(4), []
def use(statement):
    start.wait()
    names = {}
    exec(statement, names)
    found.append(names["it"])
statements = [
    "import dsv4; it = dsv4.convert",
    "from dsv4.convert.engine import convert as it",
    "from dsv4 import convert as it",
    "from dsv4.convert import plan; import dsv4; it = dsv4.convert",
]
threads = [threading.Thread(target=use, args=[one]) for one in statements]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(found) == 4 and len(set(found)) == 1 and callable(found[0]), found
"""
SUBMODULES_FIRST = """
import dsv4.convert.engine
import dsv4.validate.checks.content
from dsv4.convert import plan
import dsv4, importlib, inspect
for again in range(2):
    assert inspect.isfunction(dsv4.convert) and inspect.isfunction(dsv4.validate)
    importlib.reload(dsv4)
"""


@pytest.mark.parametrize("script", [LIGHT, THREADS, SUBMODULES_FIRST])
def test_whatever_is_imported_first_and_from_where(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["convert", "validate", "repair"])
def test_they_are_functions_that_say_what_they_take(name: str) -> None:
    function = getattr(dsv4, name)
    assert inspect.isfunction(function)
    assert pickle.loads(pickle.dumps(function)) is function
    shown = pydoc.plain(pydoc.render_doc(function))
    assert f"{name}(" in shown and "source" in shown and "Error" in shown


def test_the_names_that_were_promised_are_there() -> None:
    assert list(inspect.signature(dsv4.convert).parameters)[:5] == [
        "src",
        "out",
        "recipe",
        "workers",
        "progress",
    ]
    assert list(inspect.signature(dsv4.validate).parameters)[:2] == ["packed", "source"]
    for name in dsv4.__all__:
        assert getattr(dsv4, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'pack'"):
        dsv4.pack  # noqa: B018
