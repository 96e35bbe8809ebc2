"""What a release of transformers writes: run as a program, with that release's wheel unpacked.

    python -m tests.formats.model.transformers_writer WHEEL OUT

writes `OUT/own` and `OUT/default`: the small model of `transformers_checkpoint` by
`save_pretrained`, in the release's own names and in those it writes when nothing is asked for.
Only what a release says of the versions of *other* packages is not heeded: releases before 5.20
want a huggingface_hub that this project cannot have, and nothing of it is used here.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path


class _Never(Exception):
    """Stands for every exception of a library that is not there."""


def _stand_ins() -> None:
    """Modules that old releases import and that writing a checkpoint does not use."""
    checks = types.ModuleType("transformers.dependency_versions_check")
    vars(checks)["dep_version_check"] = lambda *_, **__: None
    sys.modules[checks.__name__] = checks
    httpx = types.ModuleType("httpx")
    for name in ("NetworkError", "ProxyError", "ConnectError", "TimeoutException", "HTTPError"):
        vars(httpx)[name] = _Never
    sys.modules.setdefault("httpx", httpx)


def main(wheel: str, out: str) -> None:
    """Write both formats of the release unpacked in `wheel`."""
    sys.path.insert(0, wheel)
    _stand_ins()
    import torch
    import transformers

    if not Path(transformers.__file__).is_relative_to(wheel):
        raise SystemExit(f"transformers is imported from {transformers.__file__}, not {wheel}")
    from tests.formats.model.transformers_checkpoint import random_model

    model = random_model(torch.bfloat16).to(torch.bfloat16)
    model.save_pretrained(Path(out) / "own", save_original_format=False)
    model.save_pretrained(Path(out) / "default")
    print(transformers.__version__)


if __name__ == "__main__":
    main(*sys.argv[1:])
