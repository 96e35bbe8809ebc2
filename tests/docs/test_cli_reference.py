"""docs/cli.md says what the commands say."""

from __future__ import annotations

from tests.docs.cli_reference import TARGET, page


def test_the_page_is_what_the_help_prints() -> None:
    made = page()
    assert TARGET.read_text() == made
    for command in ("convert", "validate", "run", "bench decode", "kernels build"):
        assert f"## `dsv4 {command}`" in made
