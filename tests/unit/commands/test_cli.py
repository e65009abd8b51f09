# SPDX-License-Identifier: Apache-2.0
"""The command line as a user's shell sees it: exit codes, what goes to stdout and what to stderr, no tracebacks."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import ebpf_mig
from ebpf_mig.cli import COMMANDS, cli
from ebpf_mig.recording.events import Header
from ebpf_mig.recording.file import RecordingWriter

ROOT = Path(ebpf_mig.__file__).parents[1]

PROBE = """
import sys, types
import click
from ebpf_mig import cli, errors
module = types.ModuleType("ebpf_mig.commands.probe")

@click.command(epilog="x")
def command():
    "Does what the test says."
{body}

module.command = command
sys.modules[module.__name__] = module
cli.COMMANDS = ("probe",)
sys.exit(cli.main(sys.argv[1:]))
"""
"""The real `main` with one more command, whose body is given by the test."""


def run(*args: str, stdin: bytes = b"", **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "ebpf_mig.cli", *args],
        input=stdin,
        capture_output=True,
        check=False,
        cwd=ROOT,
        env=os.environ | env,
    )
    return subprocess.CompletedProcess(args, done.returncode, done.stdout.decode(), done.stderr.decode())


def start(body: str, *args: str) -> subprocess.Popen[str]:
    code = PROBE.format(body=textwrap.indent(textwrap.dedent(body), "    "))
    return subprocess.Popen(
        [sys.executable, "-c", code, *(args or ("probe",))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def outcome(body: str, *args: str) -> tuple[int, str, str]:
    process = start(body, *args)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_version_names_what_a_bug_report_needs() -> None:
    done = run("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"ebpf-mig \S+ \(Python 3\.\d+\.\d+\S*, Linux \S+, [^,()]*bcc[^,()]*\)\n", done.stdout)


def test_version_and_report_do_not_load_bcc() -> None:
    code = (
        "import sys; from ebpf_mig import cli; cli.main(['--version']); cli.main(['report', '/none']); "
        "sys.exit(any(name.split('.')[0] == 'bcc' for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0


def test_a_package_that_is_not_the_bpf_compiler_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "bcc").mkdir()
    (tmp_path / "bcc" / "__init__.py").write_text("raise SystemExit('imported')")
    done = run("--version", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.stdout.endswith(", an unrelated package called bcc)\n")


def every_command(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of each command line: commands, groups and the commands in them."""
    yield path
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from every_command(command, (*path, name))
        else:
            yield *path, name


@pytest.mark.parametrize("words", list(every_command(cli)), ids=" ".join)
def test_every_command_has_help_with_examples(words: tuple[str, ...]) -> None:
    done = run(*words, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: {' '.join(('ebpf-mig', *words))} ")
    assert f"Examples:\n    {' '.join(('ebpf-mig', *words))}" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_group_help_lists_the_commands_in_order() -> None:
    done = run("--help")
    listed = re.findall(r"^  ([a-z-]+)  ", done.stdout.split("Commands:")[1], re.MULTILINE)
    assert (done.returncode, tuple(listed)) == (0, COMMANDS)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "Usage: ebpf-mig [OPTIONS] COMMAND [ARGS]..."),
        (("migrate",), "Usage: ebpf-mig migrate [OPTIONS] COMMAND [ARGS]..."),
        (("nonsense",), "No such command 'nonsense'"),
        (("report",), "Missing argument 'FILE'"),
        (("report", "--format", "pdf", "x"), "'pdf' is not one of 'text', 'json'"),
        (("report", "/none/x.rec"), "ebpf-mig: cannot read /none/x.rec: No such file or directory"),
        (("report", "/"), "ebpf-mig: cannot read /: Is a directory"),
        (("report", "/dev/null"), "ebpf-mig: /dev/null: the file is empty"),
    ],
)
def test_wrong_use_exits_with_2_and_one_message_on_stderr(args: tuple[str, ...], message: str) -> None:
    done = run(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_garbage_on_stdin_is_refused() -> None:
    done = run("report", "-", stdin=b"\x7fELF" + bytes(100))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "ebpf-mig: the recording: not an ebpf-mig recording\n"


def test_escapes_in_a_file_name_do_not_reach_the_terminal() -> None:
    assert "\x1b" not in run("report", "/none/\x1b[2J.rec").stderr


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        ("errors.UsageError('a')", 2, "a"),
        ("errors.PreflightError('no BTF', 'use a newer kernel')", 3, "no BTF; use a newer kernel"),
        ("errors.VmmError('refused')", 4, "refused"),
        ("errors.IncompleteError('12 lost')", 5, "12 lost"),
        ("errors.RecordingError('two\\nlines \\x1b[0m')", 2, r"two\nlines \x1b[0m"),
        ("KeyboardInterrupt", 130, "interrupted"),
        ("OSError(28, 'No space left', '/tmp/x')", 2, "cannot write /tmp/x: No space left"),
        ("MemoryError", 3, "there is no memory left; run with -vv for the traceback"),
        (
            "OSError(24, 'Too many open files')",
            3,
            "this process has no file descriptor left; run with -vv for the traceback",
        ),
        ("ValueError('boom')", 1, "internal error: ValueError: boom; run with -vv for the traceback"),
        (
            "BrokenPipeError(32, 'VMM')",
            1,
            "internal error: BrokenPipeError: [Errno 32] VMM; run with -vv for the traceback",
        ),
    ],
)
def test_errors_are_one_line_and_an_exit_code(error: str, code: int, line: str) -> None:
    body = f"click.echo('partial'); raise {error}"
    assert outcome(body) == (code, "partial\n", f"ebpf-mig: {line}\n")


@pytest.mark.parametrize("args", [("-vv", "probe"), ("probe", "-vv"), ("-v", "probe", "-vv")])
def test_traceback_only_with_vv(args: tuple[str, ...]) -> None:
    code, out, err = outcome("raise ValueError('boom')", *args)
    assert (code, out) == (1, "")
    assert err.startswith("Traceback (most recent call last):\n")
    assert err.endswith("ebpf-mig: internal error: ValueError: boom; run with -vv for the traceback\n")


@pytest.mark.parametrize("place", [0, 1, 2])
def test_vv_is_understood_at_every_level(place: int) -> None:
    words = ["migrate", "qemu", "--source", "/nonexistent/a", "--destination", "b", "--uri", "tcp:127.0.0.1:1"]
    with_it = run(*words[:place], "-vv", *words[place:])
    without = run(*words)
    assert without.returncode == with_it.returncode
    assert "Traceback" not in without.stderr and without.stderr.count("\n") == 1
    assert with_it.stderr.startswith("Traceback ") and with_it.stderr.endswith(without.stderr)


def test_one_v_gives_no_traceback() -> None:
    assert "Traceback" not in outcome("raise ValueError('boom')", "-v", "probe")[2]


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGINT, 130, "ebpf-mig: interrupted\n"),
        (signal.SIGTERM, 143, "ebpf-mig: terminated\n"),
        (signal.SIGHUP, 129, "ebpf-mig: terminated\n"),
    ],
)
def test_signals_end_it_after_the_clean_up(number: signal.Signals, code: int, line: str) -> None:
    process = start(
        """
        import signal, time
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            print("ready", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            print("detached", flush=True)
            raise
        """
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (code, "detached\n", line)


def test_nohup_is_respected() -> None:
    body = "import os, signal; os.kill(os.getpid(), signal.SIGHUP); print('still here')"
    code = PROBE.format(body=textwrap.indent(body, "    "))
    shell = ["sh", "-c", 'trap "" HUP; exec "$0" -c "$1" probe', sys.executable, code]
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "still here\n", "")


def test_reader_that_goes_away_ends_it_quietly() -> None:
    process = start("for n in range(1000000): click.echo('line')")
    assert process.stdout is not None
    assert process.stdout.readline() == "line\n"
    process.stdout.close()
    assert process.stderr is not None
    assert (process.wait(60), process.stderr.read()) == (128 + signal.SIGPIPE, "")
    process.stderr.close()


def test_full_disk_behind_stdout_is_one_line() -> None:
    body = "from ebpf_mig.commands.options import write_result; write_result('x' * 100)"
    code = PROBE.format(body=textwrap.indent(body, "    "))
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, "probe"], stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False
        )
    assert (done.returncode, done.stderr) == (2, "ebpf-mig: cannot write to stdout: No space left on device\n")


def test_shell_completion_of_commands() -> None:
    done = run(_EBPF_MIG_COMPLETE="bash_complete", COMP_WORDS="ebpf-mig rep", COMP_CWORD="1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "plain,report\n", "")


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """A recording without a migration, cut off at the end."""
    path = tmp_path / "cut.rec"
    RecordingWriter(path, Header(host="alpha")).close()
    return path


def test_report_of_a_cut_recording_says_so_on_stderr_and_reports_all_the_same(recording: Path) -> None:
    done = run("report", str(recording))
    assert done.returncode == 0
    assert done.stdout.startswith("Downtime not measured: no vCPU stop was seen ")
    assert (
        done.stderr == f"ebpf-mig: {recording} is cut off: it has no ending: tracing was killed or is still going on\n"
    )


def test_report_is_the_same_twice_and_from_stdin(recording: Path) -> None:
    first = run("report", str(recording), "--format", "json")
    assert first.stdout.startswith('{\n  "schema": "ebpf-mig/breakdown/1"')
    assert run("report", str(recording), "--format", "json").stdout == first.stdout
    assert run("report", "-", "--format", "json", stdin=recording.read_bytes()).stdout == first.stdout


def test_strict_writes_the_report_and_exits_with_5(recording: Path) -> None:
    done = run("report", str(recording), "--strict")
    assert done.returncode == 5
    assert done.stdout == run("report", str(recording)).stdout


def test_report_never_overwrites_without_force(recording: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.txt"
    first = run("report", str(recording), "-o", str(out))
    assert (first.returncode, first.stdout) == (0, "")
    text = out.read_text()
    assert text.startswith("Downtime not measured")
    out.write_text("precious")
    second = run("report", str(recording), "--output", str(out))
    assert second.returncode == 2
    assert second.stderr.endswith(f"ebpf-mig: {out} exists; not overwritten; give another name, or --force\n")
    assert out.read_text() == "precious"
    assert run("report", str(recording), "-o", str(out), "--force").returncode == 0
    assert out.read_text() == text


def test_colour_on_a_terminal_and_only_there(recording: Path) -> None:
    assert "\x1b[" not in run("report", str(recording)).stdout
    assert "\x1b[1m" in run("report", str(recording), "--color", "always").stdout
    master, slave = pty.openpty()
    env = {name: value for name, value in os.environ.items() if name not in {"NO_COLOR", "FORCE_COLOR"}}
    subprocess.run(
        [sys.executable, "-m", "ebpf_mig.cli", "report", str(recording)],
        cwd=ROOT,
        stdout=slave,
        stderr=subprocess.DEVNULL,
        env=env | {"TERM": "xterm"},
        check=True,
    )
    os.close(slave)
    assert os.read(master, 1000).startswith(b"\x1b[1mDowntime not measured")
    os.close(master)


def test_a_terminal_without_utf8_gets_ascii(recording: Path) -> None:
    assert run("report", str(recording), PYTHONIOENCODING="ascii").stdout.isascii()
