# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.vm run`, `userland`, `pair`, `exec` and `table`: see the help.

Exit code 0 if everything passed, 1 if a test failed or a machine never answered, 3 if an image cannot be made.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.vm import pair, results, suite
from tests.vm.catalogue import EMULATED, KERNELS, USERLANDS, arm64_btf, cache
from tests.vm.chroot import BuildError
from tests.vm.images import ROOT, fetch_arm64_btf
from tests.vm.machine import boot


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def _run(arguments: argparse.Namespace) -> int:
    """Runs the suite in each kernel, with each user land given or with the kernel's own."""
    rows = []
    for kernel in _names(arguments.kernel, list(KERNELS)):
        for userland in _names(arguments.userland or KERNELS[kernel].userland, list(EMULATED)):
            _say(f"{kernel} with {userland}: building and booting ...")
            row = suite.emulated(kernel, userland, arguments.keyword, arguments.processors)
            _tell(row)
            rows.append(row)
    return _conclude(rows, arguments)


def _userland(arguments: argparse.Namespace) -> int:
    """Runs the suite natively in each user land given."""
    rows = []
    for userland in arguments.userlands or list(USERLANDS):
        _say(f"{userland} on this kernel: installing as the README says ...")
        row = suite.native(userland, arguments.keyword)
        _tell(row)
        rows.append(row)
    return _conclude(rows, arguments)


def _tell(row: results.Row) -> None:
    _say(f"{row.release} {row.userland}: {'passed' if row.good else 'FAILED'} after {row.seconds} s")
    for line in row.infrastructure:
        _say(f"  {line}")


def _conclude(rows: list[results.Row], arguments: argparse.Namespace) -> int:
    """Prints the table. Rows of a whole run go into the support table; those of a choice of tests only with --keep."""
    if arguments.keep or not arguments.keyword:
        results.save([row for row in rows if row.subjects], whole=not arguments.keyword)
        _write_table()
    _say(results.table(rows))
    return 0 if all(row.good for row in rows) else 1


def _write_table() -> None:
    text = results.SUPPORT_MD.read_text()
    results.SUPPORT_MD.write_text(results.document(results.load(), text))


def _table(_arguments: argparse.Namespace) -> int:
    _write_table()
    _say(results.table(results.load()))
    return 0


def _pair(arguments: argparse.Namespace) -> int:
    """Runs a migration between two machines, and compares the figures with the outer host's."""
    kernels = _names(arguments.kernel, [name for name in KERNELS if KERNELS[name].userland in USERLANDS])
    if len(kernels) != 2:
        raise BuildError("--kernel names the source's and the destination's kernel: 6.1,6.12")
    meeting = pair.run(kernels[0], kernels[1], arguments.delay)
    for line in meeting.lines():
        _say(line)
    if arguments.keep and meeting.good:
        meeting.keep(pair.DATA)
    return 0 if meeting.good else 1


def _exec(arguments: argparse.Namespace) -> int:
    """Runs one command in one kernel, and prints the console."""
    wanted = KERNELS[arguments.kernel]
    userland = EMULATED[arguments.userland or wanted.userland]
    emulating, kernel, root = suite.prepared(wanted, userland, arguments.processors)
    outcome = boot(
        emulating, kernel, root, Path(arguments.source), arguments.command,
        place=cache() / "runs" / f"exec-{arguments.tag or kernel.version}", timeout_s=arguments.timeout,
    )  # fmt: skip
    _say(outcome.console.read_text(errors="replace"))
    _say(f"{kernel.version}: exit {outcome.code} {outcome.trouble} after {outcome.seconds:.0f} s; see {outcome.files}")
    return 1 if outcome.code is None else outcome.code


def _arm64(_arguments: argparse.Namespace) -> int:
    _say(f"{arm64_btf()}: type information of {fetch_arm64_btf()}, for tests/unit/linux/test_arm64.py")
    return 0


def _names(text: str, known: list[str]) -> list[str]:
    names = text.split(",")
    if strange := [name for name in names if name not in known]:
        raise BuildError(f"unknown: {', '.join(strange)}; there are {', '.join(known)}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.vm", description=__doc__)
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="the marked tests in emulated kernels")
    run.add_argument("--kernel", default=",".join(KERNELS), help=f"of {', '.join(KERNELS)}")
    run.add_argument("--userland", default="", help=f"of {', '.join(USERLANDS)}; default: the kernel's own")
    native = commands.add_parser("userland", help="the marked tests in chroots on this machine's own kernel")
    native.add_argument("userlands", nargs="*", metavar="USERLAND", help=f"of {', '.join(USERLANDS)}")
    two = commands.add_parser("pair", help="a migration between two emulated machines, against a witness outside")
    two.add_argument("--kernel", default="6.1,6.12", help="the source's and the destination's kernel")
    two.add_argument("--delay", default="2ms", help="delay of the wire, each way (netem)")
    two.add_argument("--keep", action="store_true", help="keep the recordings in tests/data/machines")
    execute = commands.add_parser("exec", help="boot one kernel and run a shell command in a copy of a source tree")
    execute.add_argument("--kernel", choices=KERNELS, default="6.1")
    execute.add_argument("--userland", choices=EMULATED, default="", help="default: the kernel's own")
    execute.add_argument("--source", default=str(ROOT))
    execute.add_argument("--timeout", type=float, default=400)
    execute.add_argument("--tag", default="", help="name of the folder of results")
    execute.add_argument("command")
    for command in (run, execute):
        command.add_argument("--processors", type=int, choices=(1, 2), default=2, help="1 on a busy machine")
    for command in (run, native):
        command.add_argument("-k", dest="keyword", default="", help="choice of tests, as for pytest -k")
        command.add_argument("--keep", action="store_true", help="results of a choice of tests go into the table, too")
    table = commands.add_parser("table", help="write the table of docs/support.md anew")
    arm64 = commands.add_parser("arm64", help="fetch the type information for the arm64 unit tests")
    acts = ((run, _run), (native, _userland), (two, _pair), (execute, _exec), (table, _table), (arm64, _arm64))
    for command, act in acts:
        command.set_defaults(act=act)
    return parser


def main() -> int:
    """Runs the command given."""
    arguments = _parser().parse_args()
    try:
        code: int = arguments.act(arguments)
    except BuildError as error:
        print(f"tests.vm: {error}", file=sys.stderr)  # noqa: T201
        return 3
    return code


if __name__ == "__main__":
    sys.exit(main())
