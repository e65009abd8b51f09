# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.vm run`, `userland` and `exec`: see the help."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.vm.catalogue import KERNELS, USERLANDS, cache
from tests.vm.chroot import BuildError, tree
from tests.vm.images import ROOT, kernel_image, root_image
from tests.vm.machine import boot, emulator


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


def _exec(arguments: argparse.Namespace) -> int:
    userland = USERLANDS[arguments.userland]
    root = root_image(userland)
    kernel = kernel_image(KERNELS[arguments.kernel], tree(userland))
    emulated = emulator([p for name in USERLANDS if (p := cache() / "tree" / name).exists()])
    place = cache() / "runs" / f"exec-{arguments.tag or kernel.version}"
    outcome = boot(
        emulated, kernel, root, Path(arguments.source), arguments.command, place=place, timeout_s=arguments.timeout
    )
    _say(outcome.console.read_text(errors="replace"))
    _say(
        f"{kernel.version}: exit {outcome.code} {outcome.trouble} after {outcome.seconds:.0f} s; files in {outcome.files}"
    )
    return 1 if outcome.code is None else outcome.code


def main() -> int:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm")
    commands = parser.add_subparsers(dest="command_name", required=True)
    execute = commands.add_parser("exec", help="boot one kernel and run a shell command in a copy of a source tree")
    execute.add_argument("--kernel", choices=KERNELS, default="6.1")
    execute.add_argument("--userland", choices=USERLANDS, default="bookworm")
    execute.add_argument("--source", default=str(ROOT))
    execute.add_argument("--timeout", type=float, default=400)
    execute.add_argument("--tag", default="")
    execute.add_argument("command")
    execute.set_defaults(act=_exec)
    arguments = parser.parse_args()
    try:
        code: int = arguments.act(arguments)
    except BuildError as error:
        print(f"tests.vm: {error}", file=sys.stderr)  # noqa: T201
        return 3
    return code


if __name__ == "__main__":
    sys.exit(main())
