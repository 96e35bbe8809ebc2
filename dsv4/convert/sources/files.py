"""Every file of a source accounted for: what is read, what is not needed, what is unknown.

Both kinds of source, a directory and a repository, list their names; all that is decided about
names is decided here. A name with a "/" stands for its top folder: nothing below is ever read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Self

from dsv4.convert.sources.base import AUX_FILES, CONFIG_FILE, INDEX_FILE
from dsv4.convert.sources.foreign import is_set_aside, refuse_foreign, top_level
from dsv4.convert.sources.index import first_names, is_shard_name, numbered_siblings
from dsv4.formats.errors import SourceError
from dsv4.formats.plain_text import printable

NAMES_SHOWN = 5
_MOST_SHOWN = 400  # characters
_DOCUMENTS = frozenset({INDEX_FILE, *AUX_FILES})

# Known, and of no use to a conversion. Code, and chat templates are code, is never executed.
_NOT_NEEDED = re.compile(
    r"""
    \..*                                            # .gitattributes, .git/, .cache/, .DS_Store
    | (?:readme|licen[sc]e|notice|copying|changelog|citation|authors|model_?card|terms
       |acceptable_use|contributing|security|code_of_conduct|version|third_party)(?![a-z])[^/]*
    | [^/]*\.(?:md|markdown|rst|txt|pdf|html?|png|jpe?g|gif|svg|webp|bmp|ico|mp4|mov|csv|tsv
       |py|pyc|ipynb|sh|toml|ya?ml|cfg|ini|lock|log|bib|cff|sha256|sha256sums?|md5|asc|sig)
    | [^/]*\.(?:bin|pt|pth|ckpt|pkl|pickle|gguf|ggml|onnx|onnx_data|h5|msgpack|ot|tflite|npz|npy
       |distcp|engine|mlmodel|mlpackage/)           # weights in other formats: never opened
    | (?:assets|images?|figures|figs|docs?|examples|evals?|benchmarks|scripts|tests?|inference
       |encoding|original|metal|onnx|openvino|coreml|gguf|runs|logs|__pycache__|lost\+found)/
    | (?:special_tokens_map|added_tokens|vocab|preprocessor_config|processor_config
       |image_processor_config|video_preprocessor_config|chat_template|hf_quant_config
       |quantization_config|quantize_config|quant_config|trainer_state|train_results|all_results
       |eval_results|params|configuration|model_index|adapter_config|tekken|recipe)\.json
    | [^/]+\.(?:bin|safetensors)\.index\.json
    | (?:tokenizer|sentencepiece(?:\.bpe)?|spiece|spm)\.model
    | [^/]*\.(?:jinja2?|tiktoken)
    | sha256sums? | md5sums? | checksums? | makefile | dockerfile
    """,
    re.VERBOSE | re.IGNORECASE,
)

# What programs put beside, or in place of, a file that they have not finished.
_MARK = re.compile(
    r"(?P<file>.+?)(?:\.[0-9a-f]{8})?\.(?:aria2(?:__temp)?|incomplete|part|partial|crdownload"
    r"|opdownload|download|filepart|lftp-pget-status|tmp|temp|st|!ut|!qb|bc!)/?"
    r"|\.(?P<hidden>.+)\.(?:[A-Za-z0-9]{6}|icloud)",  # rsync's and iCloud's
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class SourceFiles:
    """The names at the top level of a source, each in one class; folders end in "/".

    where: how errors name the source. shards: files of tensors. aside: safetensors files that
    are, by their names, another format's. documents: config.json, the index, what travels along.
    not_needed, unknown: the rest. marks: of downloads that did not finish, file -> mark.
    """

    where: str
    shards: tuple[str, ...]
    aside: tuple[str, ...]
    documents: tuple[str, ...]
    not_needed: tuple[str, ...]
    unknown: tuple[str, ...]
    marks: Mapping[str, str]

    @classmethod
    def of(cls, names: Collection[str], where: str, marks: Mapping[str, str] | None = None) -> Self:
        """Classify `names`, of files and (with "/" in them) of folders.

        marks: of unfinished downloads that are not among the names, file -> mark.
        Raises SourceError, saying what the source is, when it is not a checkpoint, and when
        config.json, the index or a file that travels along is not finished.
        """
        found: dict[str, list[str]] = {
            kind: [] for kind in ("shards", "aside", "documents", "not_needed", "unknown")
        }
        beside = dict(marks or {})
        for name in sorted({top_level(name) for name in names}):
            if (file := _marked_file(name)) is not None:
                beside[file] = name
            else:
                found[_class_of(name)].append(name)
        files = cls(where=where, marks=beside, **{kind: tuple(of) for kind, of in found.items()})
        files._refuse_unfinished([*AUX_FILES, INDEX_FILE])
        if not beside:
            refuse_foreign(names, where)
        elif CONFIG_FILE not in files.documents:
            files._refuse_unfinished(sorted(beside))
        return files

    def checkpoint(self, index: Mapping[str, str] | None, remedy: str) -> list[str]:
        """The safetensors files to read, sorted: those of the index, else all shards.

        Raises SourceError when one is not finished or, advising `remedy`, is missing.
        """
        if index is not None:
            names = set(index.values())
        else:
            names = {*self.shards, *filter(is_shard_name, self.marks)}
            names |= numbered_siblings(names)
        if not names:
            raise SourceError(
                f"{self.where} has no safetensors files and no {INDEX_FILE}; give a checkpoint"
            )
        self._refuse_unfinished(sorted(names))
        if missing := sorted(names - {*self.shards, *self.aside}):
            raise SourceError(
                f"{self.where}: {len(missing)} of {len(names)} safetensors files are missing "
                f"({first_names(missing)}); {remedy}"
            )
        return sorted(names)

    def notices(self, read: Iterable[str]) -> list[str]:
        """Whole sentences on what is not read though its name is odd; read: what is."""
        sentences = []
        if aside := sorted({*self.aside} - {*read}):
            sentences.append(
                "these safetensors files are, by their names, not a part of the checkpoint, and "
                f"are not read: {_shown(aside)}"
            )
        if self.unknown:
            sentences.append(
                f"dsv4 does not know these files and does not read them: {_shown(self.unknown)}"
            )
        return sentences

    def _refuse_unfinished(self, files: Iterable[str]) -> None:
        for file in files:
            if file in self.marks:
                mark = printable(self.marks[file], _MOST_SHOWN)
                there = file in {*self.shards, *self.aside, *self.documents}
                raise SourceError(
                    f"{self.where}: the download of {file} did not finish: {mark} is there; "
                    "finish it" + (f", or remove {mark} if {file} is whole" if there else "")
                )


def is_read(name: str) -> bool:
    """Whether a file of this name is ever opened."""
    return name in _DOCUMENTS or is_shard_name(name)


def _class_of(name: str) -> str:
    if name in _DOCUMENTS:
        return "documents"
    if is_shard_name(name):
        return "aside" if is_set_aside(name) else "shards"
    return "not_needed" if _NOT_NEEDED.fullmatch(name) else "unknown"


def _marked_file(name: str) -> str | None:
    """The file that is read and that `name` says is unfinished; None for any other name."""
    match = _MARK.fullmatch(name)
    file = (match["file"] or match["hidden"]) if match else ""
    return file if is_read(file) else None


def _shown(names: Collection[str]) -> str:
    return printable(first_names(sorted(names), NAMES_SHOWN), _MOST_SHOWN)
