"""What reaches a terminal: any text in any encoding, 80 columns, progress, and early refusals."""

from __future__ import annotations

import ast
import inspect
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.filesize import decimal

import dsv4
from dsv4.cli import EPILOG, ORDER, cli
from dsv4.commands import progress as progress_module
from dsv4.commands.exit_codes import __doc__ as ENDINGS
from dsv4.commands.exit_codes import endings
from dsv4.commands.options import Size
from dsv4.commands.progress import Bar, Lines, Stand
from dsv4.commands.tables import report_tables
from dsv4.convert import engine as converting
from dsv4.formats.errors import Dsv4Error
from dsv4.formats.model.releases import FLASH
from dsv4.formats.plain_text import counted, duration, memory_size, size
from dsv4.kernels.core.signature import NAME_LENGTH
from dsv4.kernels.ops import cases
from dsv4.runtime.load import Part, plan_load
from dsv4.validate import engine as validating
from dsv4.validate.report import Report, TensorVerdict
from dsv4.validate.watch import Step

PACKAGE = Path(dsv4.__file__).parent
ROOT = PACKAGE.parent
WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # importing it now raises ImportError
sys.argv = ["dsv4", *sys.argv[1:]]
from dsv4.cli import main
main()
"""


def invoked(*args: str | Path) -> Result:
    """A command in this process; a refusal of ours is its `exception`."""
    return CliRunner().invoke(cli, list(map(str, args)))


def refused(*args: str | Path, code: int = 2) -> str:
    """Its one sentence."""
    error = invoked(*args).exception
    assert isinstance(error, Dsv4Error), error
    assert error.exit_code == code
    return str(error)


# Texts


def _faults(path: Path) -> Iterator[str]:
    """Ways round the consoles that read no markup."""
    for node in ast.walk(ast.parse(path.read_text())):
        line = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rich.markup"):
            yield f"{line} escapes for markup that nothing reads"
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name.split(".")[-1] in ("Console", "from_markup", "rich_print"):
                yield f"{line} {name}"
            if any(k.arg == "markup" and ast.unparse(k.value) != "False" for k in node.keywords):
                yield f"{line} reads markup"


def test_only_one_module_makes_consoles_and_none_reads_markup(tmp_path: Path) -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        if path != PACKAGE / "commands" / "console.py":
            assert list(_faults(path)) == []
    calls = [
        node
        for node in ast.walk(ast.parse((PACKAGE / "commands" / "console.py").read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Console"
    ]
    assert len(calls) == 2
    for call in calls:
        assert {"markup", "emoji", "highlight"} <= {
            k.arg for k in call.keywords if ast.unparse(k.value) == "False"
        }
    planted = tmp_path / "planted.py"
    planted.write_text("from rich.markup import escape\nConsole().print('[b]', markup=True)\n")
    assert len(list(_faults(planted))) == 3


@pytest.mark.parametrize("name", ["flash[v4]", "x[/y]", ":smile: [red]", "a[b", "雪[/]"])
def test_a_path_is_shown_as_it_is(tmp_path: Path, name: str) -> None:
    directory = tmp_path / name
    done = CliRunner().invoke(cli, ["tiny", str(directory)])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"{directory}: ")
    done = CliRunner().invoke(cli, ["plan", str(directory)])
    assert done.exit_code == 0, done.output
    assert f"plan for {directory}\n" in done.stdout


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_an_encoding_that_lacks_a_character_gets_an_escape(tmp_path: Path, encoding: str) -> None:
    script = (
        "from dsv4.commands import console\n"
        "console.escape_what_cannot_be_written()\n"
        "text = 'é 雪 😀 \\udce8'\n"
        "console.show(text); console.notice(text); print(text)\n"
        "console.print_json({'text': text})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second, document = done.stdout.decode(encoding).split("\n", 2)
    if encoding == "utf-8":
        assert first == second == "é 雪 😀 \\udce8"
    else:
        assert "雪" not in first and "\\u96ea" in first and first == second
    assert json.loads(document) == {"text": "é 雪 😀 \udce8"}


def test_the_program_sets_its_streams_up(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dsv4", "tiny", str(tmp_path / "雪")],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/\\u96ea: " in done.stdout


# Numbers


@given(st.integers(0, 10**13))
def test_sizes_are_those_of_an_outsider(nbytes: int) -> None:
    ours, theirs = size(nbytes), decimal(nbytes).replace("bytes", "B").replace("byte", "B")
    units = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
    found, expected = (
        float(n.replace(",", "")) * units[u] for n, u in (ours.split(), theirs.split())
    )
    assert found == pytest.approx(expected, rel=0.06)
    assert found == pytest.approx(nbytes, rel=0.06)
    assert float(ours.split()[0]) < 1000 or ours.endswith("TB")
    assert (float(ours.split()[0]) == 0) == (nbytes == 0)


@given(st.integers(1, 1 << 44))
def test_memory_is_never_nothing(nbytes: int) -> None:
    number, unit = memory_size(nbytes).split()
    found = float(number) * {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[unit]
    assert found == pytest.approx(nbytes, rel=0.06)


@given(st.floats(0, 1e9))
def test_durations_say_the_time(seconds: float) -> None:
    units = {"s": 1, "min": 60, "h": 3600, "days": 86400}
    words = duration(seconds).split()
    found = sum(float(n) * units[u] for n, u in zip(words[::2], words[1::2], strict=True))
    assert found == pytest.approx(seconds, rel=0.05, abs=0.06)
    assert len(duration(seconds)) <= 16


def test_one_is_singular() -> None:
    assert [counted(n, "finding") for n in (0, 1, 2)] == ["0 findings", "1 finding", "2 findings"]
    assert counted(1, "file is", "files are") == "1 file is"
    assert counted(2000, "file is", "files are") == "2,000 files are"


# Eighty columns


def _drawn(part: object, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, markup=False, color_system=None)
    console.print(part)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue().rstrip("\n").split("\n")


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_the_bar_fits_and_keeps_percent_and_time(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stand = Stand("draft layer 0", 3_500_000_000, 4_100_000_000, facts=("302 of 446 tensors",))
    bar = Bar(stand)
    now[0] += 71.0
    (line,) = _drawn(bar.line(width), width)
    assert len(line.rstrip()) <= width
    assert " 85 %" in line
    assert "12 s left" in line
    assert re.search("[━╸╺]{4}", line)
    if width >= 80:
        assert "draft layer 0" in line and "3.5 GB of 4.1 GB" in line
    if width >= 120:
        assert "49.3 MB/s" in line and "302 of 446 tensors" in line


def test_no_time_is_given_before_there_is_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=80)
    lines = Lines(console)
    file = console.file
    assert isinstance(file, io.StringIO)
    for done in (0, 1000, 1001):
        now[0] += 0.5
        lines(Stand("layer 0", done, 10**12))
    assert "left" not in file.getvalue()
    assert file.getvalue().count("\n") == 1  # a tenth is not done, ten seconds have not passed
    for _ in range(3):
        now[0] += 11
        lines(Stand("layer 0", 10**10, 10**12))
    assert file.getvalue().count("\n") == 4
    assert "left" in file.getvalue()
    lines(Stand("layer 0", 10**12, 10**12))
    assert file.getvalue().splitlines()[-1].startswith("100 %")
    # What an earlier run did is no rate of this one.
    assert "left" not in " ".join(
        progress_module.told(Stand("x", 9 * 10**11, 10**12, 9 * 10**11), lines._clock)
    )


def test_numbers_are_whole_at_eighty_columns() -> None:
    report = Report(Path("packed"))
    for layer, rel_mse in ((3, 6.763e-3), (12, 2.631e1)):
        loss = {"rel_mse": rel_mse, "sqnr_db": -13.26, "cosine": 0.996613}
        loss |= {"max_abs_error": 0.103, "amax": 1.0}
        name = f"layers.{layer}.ffn.shared_experts.w1.weight"
        report.tensors.append(
            TensorVerdict(name, "nvfp4", False, dict(loss), rel_mse / 2, max_error=1.0)
        )
    text = [line for part in report_tables(report) for line in _drawn(part, 80)]
    assert max(map(len, text)) <= 80
    for number in ("6.763e-03", "2.631e+01", "1.0e+00", "-13.26", "0.996613", "0.103", "1.000"):
        assert any(number in line.split() for line in text), number
    assert "…" not in "".join(text)


def test_sizes_are_taken_as_they_are_printed() -> None:
    for text, nbytes in (("500kB", 500_000), ("900MB", 900_000_000), ("2 GiB", 2 << 30)):
        assert Size().convert(text, None, None) == nbytes


# Refusals


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["convert", "--hf", "nosuch", "--out", "o"], "'nosuch' is neither a directory nor a hub"),
        (["convert", "--hf", "/nosuch", "--out", "o"], "there is no directory /nosuch"),
        (["convert", "--hf", "a/b", "--out", "o", "--memory", "2x"], "'2x' is not a size"),
        (["convert", "--hf", "a/b", "--out", "o", "--memory", "2k"], "'2k' is not a size"),
        (["convert", "--hf", "a/b", "--out", "o", "--memory", "٣GB"], "'٣GB' is not a size"),
        (["convert", "--hf", "a/b", "--out", "o", "--recipe", "best"], "is not one of 'native'"),
        (["convert", "--hf", ".", "--out", "o", "--revision", "v1"], "has no meaning for the"),
        (["convert", "--hf", "a/b", "--out", ""], "the directory's name is empty"),
        (["convert", "--hf", "a/b", "--out", "/dev/null"], "/dev/null is not a directory"),
        (["plan", "typo"], "'typo' is neither a directory nor a hub id"),
        (["inspect", "nosuch"], "Directory 'nosuch' does not exist"),
        (["inspect", ".", "--diff", "nosuch"], "Directory 'nosuch' does not exist"),
        (["validate", "nosuch"], "Directory 'nosuch' does not exist"),
        (["validate", ".", "--source", "nosuch"], "'nosuch' is neither a directory nor a hub id"),
        (["validate", ".", "--json", "--source", "x"], "expected a file name before --source"),
        (["validate", ".", "--json", "/nosuch/r.json"], "there is no directory /nosuch"),
        (["validate", ".", "--html", "/"], "/ is a directory, expected a file name"),
        (["validate", ".", "--html", ""], "the file name is empty"),
        (["repair", "nosuch"], "Directory 'nosuch' does not exist"),
        (["repair", ".", "--source", "nosuch"], "'nosuch' is neither a directory nor a hub id"),
        (["bench", "load", "--device", "tpu"], "'tpu' is not one of cuda, cuda:1 (and so on), cpu"),
        (["serf"], "No such command 'serf'."),
        (["help", "serf"], "`dsv4 --help` lists the commands"),
        (["kernels", "build", "--arch", "sm_70"], "'sm_70', expected some of"),
    ],
)
def test_a_wrong_argument_is_refused_without_torch(arguments: list[str], sentence: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr.replace("\n", " ")
    assert done.stdout == ""


def test_the_guard_notices_torch(tiny_source: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, "plan", str(tiny_source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "torch" in done.stderr and done.returncode == 1


@pytest.mark.parametrize("command", ["kernels", "decode", "prompt"])
def test_a_bench_names_itself_where_there_is_no_gpu(command: str) -> None:
    assert f"`dsv4 bench {command}` needs one" in refused("bench", command)


def test_options_that_would_do_nothing_are_refused(standard_store: Path) -> None:
    for arguments, sentence in (
        ([standard_store, "--layers", "3"], "--layers does nothing with STORE"),
        (["--skew"], "--skew does nothing without STORE"),
    ):
        done = invoked("bench", "decode", *arguments)
        assert done.exit_code == 2 and sentence in done.output


def test_too_few_experts_name_the_option(tmp_path: Path) -> None:
    sentence = refused("bench", "convert", "--experts", "4", "--dir", tmp_path)
    assert "--experts 4 are too few" in sentence and "--experts 6 or more" in sentence


def test_too_little_memory_is_said_in_its_unit(tiny_source: Path) -> None:
    sentence = refused("plan", tiny_source, "--memory", "1M", "--workers", "1", code=3)
    assert "--memory 1.0 MiB does not suffice for 1 worker on" in sentence


# Reports


def test_the_verdict_comes_before_its_files(standard_store: Path) -> None:
    for option in ("--json", "--html"):
        done = invoked("validate", standard_store, "--quick", option, "/dev/full")
        assert "verdict" in done.stdout and "OK" in done.stdout
        assert isinstance(done.exception, Dsv4Error) and done.exception.exit_code == 3
        assert "/dev/full cannot be written: No space left on device" in str(done.exception)


def test_a_report_may_go_to_stdout(standard_store: Path) -> None:
    done = invoked("validate", standard_store, "--quick", "--json", "-")
    document = json.loads(done.stdout)
    assert document["ok"] is True and document["begun"].startswith("20")
    assert "verdict" in done.stderr
    assert not Path("-").exists()


def test_a_full_disk_ends_with_the_files_name(capsys: pytest.CaptureFixture[str]) -> None:
    def end(error: OSError) -> tuple[int, str]:
        with pytest.raises(SystemExit) as left, endings():
            raise error
        assert isinstance(left.value.code, int)
        return left.value.code, capsys.readouterr().err

    assert end(OSError(28, "No space left on device", "page.html")) == (
        3,
        "dsv4: page.html: No space left on device\n",
    )
    assert end(OSError(28, "No space left on device")) == (3, "dsv4: No space left on device\n")
    assert end(OSError(13, "Permission denied", "x"))[0] == 2


def test_a_dry_run_writes_nothing_and_names_the_damage(
    standard_store: Path, tiny_source: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(standard_store, tmp_path / "store"))
    (store / "norm" / "weight" / "c" / "0").unlink()
    (store / "head" / "zarr.json").write_text("{}")
    (store / "head" / "codes" / "c" / "0" / "0.partial").write_bytes(b"")  # of a killed repair
    before = {p: p.read_bytes() for p in store.rglob("*") if p.is_file()}
    done = invoked("repair", store, "--dry-run", "--json")
    document = json.loads(done.stdout)
    assert (done.exit_code, document["ok"], document["dry_run"]) == (1, False, True)
    assert [file["key"] for file in document["files"]] == ["norm/weight/c/0", "head/zarr.json"]
    text = invoked("repair", store, "--dry-run").stdout
    assert "DAMAGED, 2 files; nothing was written" in text
    assert {p: p.read_bytes() for p in store.rglob("*") if p.is_file()} == before
    assert invoked("repair", store, "--source", tiny_source).exit_code == 0
    assert invoked("repair", store, "--dry-run").exit_code == 0


SLOW = """
import sys, threading
from dsv4.convert.sources import local as local_source
from dsv4.validate import watch
from dsv4.validate.checks import content, inversion
content.PIECE_BYTES = 1024
inversion.TILE_BYTES = 128 * 64 * 4
stopped = threading.Event()
stop = watch.Watch.stop
def stop_and_tell(self):
    stop(self)
    stopped.set()
watch.Watch.stop = stop_and_tell
def piece():
    sys.stderr.write("piece\\n"); sys.stderr.flush()
    stopped.wait(60)
if sys.argv[1] == "content":
    payload = content.ChunkDigests.payload
    def slow(self, *args):
        piece()
        payload(self, *args)
    content.ChunkDigests.payload = slow
else:
    read = local_source.LocalSource.read_into
    def slow(self, file, position, view, what):
        if what == "embed.weight":
            piece()
        read(self, file, position, view, what)
    local_source.LocalSource.read_into = slow
sys.argv = ["dsv4", *sys.argv[2:]]
from dsv4.cli import main
main()
"""


@pytest.mark.parametrize("phase", ["content", "inversion"])
def test_ctrl_c_ends_a_validation_in_the_middle_of_a_file(
    phase: str, standard_store: Path, tiny_source: Path
) -> None:
    arguments = ["validate", str(standard_store), "--source", str(tiny_source), "--workers", "1"]
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, phase, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        while "piece" not in (line := process.stderr.readline()):
            assert line, process.poll()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    # What was being read when the signal came: by four threads, of hundreds; or by one, of twelve.
    assert errors.count("piece") <= (4 if phase == "content" else 1)
    assert process.returncode == 130
    assert errors.endswith("dsv4: interrupted\n") and "Traceback" not in errors


def test_progress_counts_every_byte_once(standard_store: Path, tiny_source: Path) -> None:
    steps: list[Step] = []
    report = dsv4.validate(standard_store, source=tiny_source, progress=steps.append)
    assert report.ok
    assert [step.done_bytes for step in steps] == sorted(step.done_bytes for step in steps)
    assert steps[-1].done_bytes == steps[-1].total_bytes
    shards = sum(path.stat().st_size for path in tiny_source.glob("*.safetensors"))
    hashed = [step for step in steps if step.what == "hashing the source"]
    assert hashed[-1].done_bytes - hashed[0].done_bytes < shards <= steps[-1].total_bytes / 2.5
    steps.clear()
    assert dsv4.repair(standard_store, dry_run=True, progress=steps.append).ok
    assert steps[-1].done_bytes == steps[-1].total_bytes


# Inspection


def test_a_glob_lists_what_it_matches(standard_store: Path) -> None:
    packed = dsv4.open(standard_store)
    done = invoked("inspect", standard_store, "*", "--json")
    tensors = json.loads(done.stdout)["tensors"]
    assert list(tensors) == packed.names()
    arrays = packed.store.hierarchy.arrays.values()
    payload = sum(spec.nbytes for spec in arrays if not spec.path.endswith("/lineage"))
    assert sum(facts["bytes"] for facts in tensors.values()) == payload
    text = invoked("inspect", standard_store, "layers.2.ffn.gate.*").stdout
    assert "layers.2.ffn.gate.weight" in text and "nvfp4" in text
    assert "no tensor's name matches 'ffn*'" in refused("inspect", standard_store, "ffn*")


def test_nothing_is_shown_as_python_writes_it(standard_store: Path) -> None:
    name = "layers.2.ffn.experts.5.w1.weight"
    gate = "layers.2.ffn.gate.weight"
    asked: list[list[str | Path]] = [[], [name], [gate], ["--diff", standard_store]]
    for arguments in asked:
        done = invoked("inspect", standard_store, *arguments)
        assert done.exit_code == 0, done.output
        assert not re.search(r"\{|\[|True|False|None|'", done.stdout), done.stdout
    assert "do not differ" in done.stdout


def test_what_running_takes_is_what_the_loader_takes(
    standard_store: Path, tiny_source: Path
) -> None:
    document = json.loads(invoked("plan", tiny_source, "--json").stdout)
    parts = {Part.CORE, Part.EXPERTS}  # what the GPU's loader asks for
    placed = plan_load(dsv4.open(standard_store).store, parts).arrays.values()
    assert sum(one.spec.nbytes for one in placed) == document["run_bytes"]


# Help


def _commands(group: click.Group) -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        yield name, command
        if isinstance(command, click.Group):
            yield from _commands(command)


def test_help_tells_codes_variables_and_options() -> None:
    assert set(ORDER) | {"help"} == cli.commands.keys()
    text = CliRunner().invoke(cli, ["--help"]).output
    assert re.findall(r"^  (\w+)  ", text, re.MULTILINE)[: len(ORDER)] == list(ORDER)
    assert "..." not in text.partition("Commands:")[2]
    codes = re.findall(r"\d+", ENDINGS or "")
    assert len(codes) == 7
    for code in codes:
        assert re.search(rf"\b{code} ", EPILOG), code
    for word in ("DSV4_KERNELS", "HF_TOKEN", "NO_COLOR"):
        assert word in text
    for name in ("plan", "convert", "validate", "repair", "inspect", "tiny"):
        for option in cli.commands[name].params:
            assert isinstance(option, click.Argument) or getattr(option, "help", None), option.name
    assert CliRunner().invoke(cli, ["-V"]).output == f"dsv4, version {dsv4.__version__}\n"
    shown = CliRunner().invoke(cli, ["help", "bench", "load"]).output
    assert "--device" in shown and shown.startswith("Usage:")


# Python


def test_a_package_that_is_a_function_has_its_signature() -> None:
    for package, function in (
        (dsv4.convert, converting.convert),
        (dsv4.validate, validating.validate),
    ):
        assert inspect.signature(package) == inspect.signature(function)
        assert (inspect.getdoc(function) or "?") in (inspect.getdoc(package) or "")


def test_what_is_offered_is_listed() -> None:
    assert {"repair", "quantize_nvfp4", "dequantize_nvfp4", "NVFP4Tensor"} <= set(dir(dsv4))
    for name in dir(dsv4):
        assert getattr(dsv4, name) is not None
    assert (PACKAGE / "py.typed").is_file()


def test_kernel_names_keep_their_letters() -> None:
    kernels = {k for case in cases(FLASH, "flash", (1, 8)) for k in case.kernels}
    flags = [
        (k, f"{key}{value}".lower())
        for k in kernels
        for key, value in k.config
        if isinstance(value, bool)
    ]
    assert flags
    for one, word in flags:
        assert re.sub("[^a-z0-9]+", "_", word) in one.name or len(one.name) > NAME_LENGTH, one.name
