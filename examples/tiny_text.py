"""The text a tiny model learns: the Python standard library of the interpreter that runs this.

Its sources are documentation too: docstrings, comments and the language reference of pydoc. Every
file is one document, BOS ... EOS. Of functions that have a docstring some come a second time as a
chat, the docstring's first line asked and the function answered, so that the model also speaks
behind the prompt template. Whole files are held out by a hash of their path, and so are theirs.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from dsv4.synthetic.tokenizer import BOS, EOS, build_tokenizer

HELD_OUT = 8  # of 256 paths
SAMPLE_BYTES = 1 << 17  # of held-out text that goes with the checkpoint
_LARGEST_FILE = 1 << 18  # longer ones are tables
_SKIPPED = ("site-packages", "__pycache__", "encodings", "_bundled", "turtledemo")
_CHAT = f"{BOS}<｜User｜>{{question}}<｜Assistant｜></think>{{answer}}{EOS}"
_LONGEST_ANSWER = 1200  # characters

Tokens = np.ndarray[tuple[int], np.dtype[np.uint16]]


def library() -> Iterator[tuple[str, str]]:
    """(path, text) of every source file of the standard library, in an order without meaning."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path.relative_to(root) for path in root.rglob("*.py")]
    for path in sorted(paths, key=_digest):
        if any(part in _SKIPPED for part in path.parts):
            continue
        raw = (root / path).read_bytes()
        text = raw.decode("utf-8", errors="replace")
        if len(raw) <= _LARGEST_FILE and text.isascii() and text.strip():
            yield path.as_posix(), text


def held_out(path: str) -> bool:
    """Whether nothing of this file is trained on."""
    return _digest(Path(path))[0] < HELD_OUT


def _digest(path: Path) -> bytes:
    return hashlib.sha256(path.as_posix().encode()).digest()


def chats(text: str) -> Iterator[str]:
    """Short functions of a file that have a docstring, as question and answer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tests of the library hold odd escapes
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError):
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (question := ast.get_docstring(node)):
            answer = ast.get_source_segment(text, node)
            if answer and len(answer) <= _LONGEST_ANSWER:
                indent = " " * node.col_offset
                lines = [line.removeprefix(indent) for line in answer.splitlines()]
                yield _CHAT.format(question=question.splitlines()[0], answer="\n".join(lines))


def corpus() -> tuple[list[str], list[tuple[str, str]]]:
    """-> documents to train on, and (path, text) of what is held out."""
    train, rest = [], []
    for path, text in library():
        if held_out(path):
            rest.append((path, text))
        else:
            train.append(f"{BOS}{text}{EOS}")
            train.extend(chats(text))
    return train, rest


def sample_of(rest: list[tuple[str, str]]) -> str:
    """The start of the held-out text, tests left out: what `benchmarks quality` reads."""
    texts = (text.strip() + "\n" for path, text in rest if "test" not in path)
    return "\n".join(texts)[:SAMPLE_BYTES]


def tokenise(tokenizer: Tokenizer, documents: list[str]) -> Tokens:
    """All documents one behind the other."""
    found = tokenizer.encode_batch_fast(documents, add_special_tokens=False)
    return np.concatenate([np.array(one.ids, dtype=np.uint16) for one in found])


def prepare(vocab_size: int) -> tuple[Tokenizer, Tokens, Tokens, str, str]:
    """-> tokenizer, training tokens, held-out tokens, the held-out sample, SHA-256 of the text."""
    train, rest = corpus()
    tokenizer = build_tokenizer(vocab_size, train)
    valid = [f"{BOS}{text}{EOS}" for _, text in rest]
    digest = hashlib.sha256("".join([*train, *valid]).encode()).hexdigest()
    tokens = tokenise(tokenizer, train), tokenise(tokenizer, valid)
    return tokenizer, *tokens, sample_of(rest), digest
