"""A plan that also looks at what travels along: what `run` would refuse is refused beforehand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from dsv4.convert.plan import Plan, make_plan
from dsv4.convert.sources.base import Source
from dsv4.formats.errors import SourceError
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.recipes import Recipe
from dsv4.formats.model.text_files import TOKENIZER_FILE, TextFileError, read_text_files

NO_TOKENIZER = f"the source has no {TOKENIZER_FILE}; `dsv4 run` will need --tokens"


def make_whole_plan(
    source: Source, recipe: Recipe, notice: Callable[[str], object] | None = None
) -> Plan:
    """`make_plan`, with notices about the tokenizer and the generation settings.

    notice: gets each of the plan's notices. Raises as `make_plan`, and SourceError for a file that
    `run` could not use.
    """
    plan = make_plan(source, recipe)
    plan = dataclasses.replace(plan, notices=plan.notices + text_notices(source, plan.config))
    if notice is not None:
        for sentence in plan.notices:
            notice(sentence)
    return plan


def text_notices(source: Source, config: ModelConfig) -> tuple[str, ...]:
    """Sentences on what the text files lack, or ask for in vain. Raises SourceError."""
    try:
        found = read_text_files(source.aux_files(), config)
    except TextFileError as error:
        raise SourceError(
            f"{error}; `dsv4 run` would refuse the file, so correct it in the source, "
            "or convert a copy of the source without it"
        ) from None
    missing = () if found.tokenizer is not None else (NO_TOKENIZER,)
    return missing + found.notices
