"""The command line as a program: outputs, exit codes, and every refusal in one sentence."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import dsv4
from dsv4.runtime.text.tokenizer import Text
from tests.support import warm_commands

TIMEOUT = 240


def dsv4_command(*args: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    done = warm_commands.run(*args, stdin=stdin.encode(), seconds=TIMEOUT)
    out, errors = done.stdout.decode(), done.stderr.decode()
    return subprocess.CompletedProcess(done.args, done.returncode, out, errors)


def refused(*args: str | Path, code: int = 2) -> str:
    """Run, expect a refusal, and return its one sentence."""
    done = dsv4_command(*args)
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert lines, done
    return lines[-1]


def test_help_names_every_command() -> None:
    done = dsv4_command("--help")
    assert done.returncode == 0
    for command in ("plan", "convert", "validate", "inspect", "run", "tiny"):
        assert command in done.stdout
        assert dsv4_command(command, "--help").returncode == 0


def test_tiny_convert_validate_run(tmp_path: Path) -> None:
    hub, packed = tmp_path / "hub", tmp_path / "packed"
    assert dsv4_command("tiny", hub, "--seed", "3").returncode == 0
    done = dsv4_command("convert", "--hf", hub, "--out", packed, "--workers", "2")
    assert done.returncode == 0, done.stderr
    root = dsv4.open(packed).store.manifest["root"]
    assert root in done.stdout.replace("\n", "").replace(" ", "")
    done = dsv4_command("validate", packed, "--source", hub, "--json", tmp_path / "report.json")
    assert done.returncode == 0, done.stdout
    assert json.loads((tmp_path / "report.json").read_text())["ok"] is True
    done = dsv4_command(
        "run", packed, "--prompt", "Hello", "--max-new-tokens", "5", "--temperature", "0"
    )
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stderr


def test_plan_prints_one_json_document(tiny_source: Path) -> None:
    document = json.loads(dsv4_command("plan", tiny_source, "--json").stdout)
    assert document["tensors"] == document["exact_tensors"] + len(document["rounded_tensors"])
    assert document["output_bytes"] > 0
    assert "head.weight" in document["rounded_tensors"]
    assert dsv4_command("plan", tiny_source).returncode == 0


def _run_json(store: Path, *args: str) -> dict[str, Any]:
    done = dsv4_command("run", store, "--json", *args)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_run_json_is_the_greedy_continuation(standard_store: Path) -> None:
    document = _run_json(
        standard_store, "--tokens", "5,6,7", "--max-new-tokens", "6", "--temperature", "0"
    )
    session = dsv4.load(standard_store).session(64)
    token = int(session.forward(torch.tensor([5, 6, 7]))[-1].argmax())
    expected: list[int] = []
    while len(expected) < 6:
        expected.append(token)
        token = int(session.forward(torch.tensor([token]))[-1].argmax())
    assert document["prompt_tokens"] == [5, 6, 7]
    assert document["generated_tokens"] == expected
    text = Text.from_file(dsv4.open(standard_store).store.assets["tokenizer.json"])
    assert document["text"] == text.decode(expected)
    assert document["timings"]["generated_tokens"] == 6
    start = document["start"]
    first, *_, last = start
    assert (first, last) == ("interpreter", "first token")
    assert 0 < start["interpreter"] < start["weights ready"] < start["first token"] < 60


def test_run_renders_the_chat_template_unless_raw(standard_store: Path) -> None:
    text = Text.from_file(dsv4.open(standard_store).store.assets["tokenizer.json"])
    bounds = ("--max-new-tokens", "1", "--temperature", "0")
    chat = _run_json(standard_store, "--prompt", "Hi", *bounds)
    raw = _run_json(standard_store, "--prompt", "Hi", "--raw", *bounds)
    assert raw["prompt_tokens"] == text.encode("Hi")
    rendered = "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜></think>"
    assert chat["prompt_tokens"] == text.encode(rendered)


def test_equal_seeds_give_equal_answers(standard_store: Path) -> None:
    args = ("--prompt", "Hi", "--max-new-tokens", "8", "--temperature", "1.5", "--seed")
    first = _run_json(standard_store, *args, "1")["generated_tokens"]
    assert _run_json(standard_store, *args, "1")["generated_tokens"] == first
    assert _run_json(standard_store, *args, "2")["generated_tokens"] != first


def test_chat_answers_each_line_and_ends_with_the_input(standard_store: Path) -> None:
    done = dsv4_command(
        "run", standard_store, "--temperature", "0", "--max-new-tokens", "4", stdin="Hi\nAgain\n"
    )
    assert done.returncode == 0, done.stderr
    assert "cut after 4 tokens" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_ends_the_answer_and_not_the_program(standard_store: Path) -> None:
    command = [sys.executable, "-m", "dsv4", "run", str(standard_store), "--temperature", "0"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"Hi\n")
        process.stdin.flush()
        assert os.read(process.stdout.fileno(), 1)  # the answer has begun
        process.send_signal(signal.SIGINT)
        _, raw = process.communicate(b"/help\n/exit\n", timeout=TIMEOUT)
        errors = raw.decode()
        assert process.returncode == 0
    assert "(interrupted)" in errors
    assert "/reset" in errors  # the help came after the interruption


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["terminated", "killed"])
def test_an_answer_that_is_ended_from_outside_leaves_nothing(
    standard_store: Path, how: signal.Signals
) -> None:
    arguments = ["--tokens", "1,2,3", "--max-new-tokens", "400", "--temperature", "0"]
    command = [sys.executable, "-m", "dsv4", "run", str(standard_store), *arguments]
    before = sorted(standard_store.rglob("*"))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.read(1)  # it answers
        process.send_signal(how)
        _, errors = process.communicate(timeout=TIMEOUT)
    if how is signal.SIGTERM:
        assert (process.returncode, errors) == (143, b"dsv4: terminated\n")
    else:
        assert (process.returncode, errors) == (-signal.SIGKILL, b"")
    assert sorted(standard_store.rglob("*")) == before
    dsv4.open(standard_store)


def test_inspect_shows_the_tree_and_a_tensor(standard_store: Path) -> None:
    done = dsv4_command("inspect", standard_store)
    assert done.returncode == 0
    assert "layers.2" in done.stdout
    name = "layers.2.ffn.experts.5.w1.weight"
    document = json.loads(dsv4_command("inspect", standard_store, name, "--json").stdout)
    assert document["format"] == "nvfp4"
    assert document["exact"] is True
    assert document["sources"]["weight"]["file"].endswith(".safetensors")


def test_validate_fails_with_exit_1(standard_store: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(standard_store, tmp_path / "store"))
    (store / "norm" / "weight" / "c" / "0").unlink()
    done = dsv4_command("validate", store)
    assert done.returncode == 1
    assert "FAILED" in done.stdout
    assert "Traceback" not in done.stderr


def _copied(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "copy"))


def _edit_config(source: Path, **changes: object) -> None:
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_refusals_of_convert(tiny_source: Path, standard_store: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def convert(source: Path, target: Path = out, *more: str) -> str:
        return refused("convert", "--hf", source, "--out", target, *more)

    assert "there is no directory" in convert(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "config.json" in convert(tmp_path / "empty")
    assert "complete packed checkpoint" in convert(tiny_source, standard_store)
    assert "overlap" in convert(tiny_source, tiny_source / "packed")
    busy = tmp_path / "busy"
    busy.mkdir()
    (busy / "thesis.tex").write_text("x")
    assert "thesis.tex" in convert(tiny_source, busy)
    assert (busy / "thesis.tex").read_text() == "x"
    assert not out.exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "deepseek_v41"}, "another architecture"),
        ({"model_type": "llama"}, "expected 'deepseek_v4'"),
        ({"hidden_size": "many"}, "hidden_size is 'many', expected an integer"),
        ({"n_routed_experts": 9}, "missing"),
        ({"n_routed_experts": 7}, "unexplained"),
        ({"q_lora_rank": 32}, "of another dtype or shape"),
        ({"compress_ratios": [0, 0, 4, 7, 4, 128, 0]}, "expected 0, 4 or 128"),
    ],
)
def test_refusals_of_a_config(
    tiny_source: Path, tmp_path: Path, changes: dict[str, object], sentence: str
) -> None:
    source = _copied(tiny_source, tmp_path)
    _edit_config(source, **changes)
    message = refused("convert", "--hf", source, "--out", tmp_path / "out")
    assert sentence in message
    assert not (tmp_path / "out").exists()


def test_refusal_of_a_truncated_and_of_a_missing_shard(tiny_source: Path, tmp_path: Path) -> None:
    source = _copied(tiny_source, tmp_path)
    shard = source / "model-00003-of-00009.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert shard.name in refused("convert", "--hf", source, "--out", tmp_path / "out")
    shard.unlink()
    assert shard.name in refused("plan", source)


def test_refusals_of_run(standard_store: Path, tmp_path: Path) -> None:
    def run(*args: str) -> str:
        return refused("run", standard_store, *args)

    assert "exclude each other" in run("--prompt", "a", "--tokens", "1")
    assert "'x', expected token ids" in run("--tokens", "1,x")
    assert "token id 999999 is not in the vocabulary" in run("--tokens", "999999")
    assert "no CUDA device" in run("--prompt", "a", "--device", "cuda")
    assert "is not a packed checkpoint" in refused("run", tmp_path)
    assert "did you mean layers.0.attn.wq_a.weight" in refused(
        "inspect", standard_store, "layers.0.attn.wq_aa.weight"
    )


def test_an_unfinished_store_is_refused(standard_store: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(standard_store, tmp_path / "store"))
    (store / "dsv4.complete").unlink()
    assert "dsv4.complete is missing" in refused("run", store, "--prompt", "a")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "ctrl-c"])
def test_an_interrupted_conversion_resumes(
    tiny_source: Path, standard_store: Path, tmp_path: Path, how: signal.Signals
) -> None:
    out = tmp_path / "packed"
    command = [sys.executable, "-m", "dsv4", "convert", "--hf", str(tiny_source)]
    command += ["--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        journal = out / "journal.jsonl"
        deadline = time.monotonic() + TIMEOUT
        while not (journal.exists() and journal.read_bytes().count(b"\n") > 30):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(how)
        _, errors = process.communicate(timeout=TIMEOUT)
    if how is signal.SIGINT:
        assert process.returncode == 130
        assert b"run the same command again to continue" in errors
        assert b"Traceback" not in errors
    message = refused("convert", "--hf", tiny_source, "--out", out, "--recipe", "native")
    assert "recipe" in message  # another recipe does not continue this one
    done = dsv4_command("convert", "--hf", tiny_source, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "units were done already" in done.stdout
    expected = dsv4.open(standard_store).store.manifest["root"]
    assert dsv4.open(out).store.manifest["root"] == expected


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (("kernels", "--rows", "0"), "0 in '0', expected at least 1"),
        (("kernels", "--rows", ""), "'', expected numbers such as 1,8"),
        (("decode", "--rows", "9"), "9 in '9', expected at least 1 and at most 8"),
        (("decode", "--rows", "one"), "'one', expected numbers such as 1,8"),
    ],
)
def test_rows_that_no_kernel_takes_are_refused(command: tuple[str, ...], expected: str) -> None:
    assert expected in refused("bench", *command)
