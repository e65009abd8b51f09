# SPDX-License-Identifier: Apache-2.0
"""`ebpf-mig completion`: a script with which a shell completes our command lines."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from ebpf_mig.commands.options import examples, write_result
from ebpf_mig.errors import UsageError

VARIABLE = "_EBPF_MIG_COMPLETE"
"""The variable by which the script asks for completions; `cli.main` answers."""

_EXAMPLES = examples(
    "ebpf-mig completion bash > /etc/bash_completion.d/ebpf-mig",
    "ebpf-mig completion zsh > ~/.zfunc/_ebpf-mig",
    "ebpf-mig completion fish > ~/.config/fish/completions/ebpf-mig.fish",
)


@click.command("completion", epilog=_EXAMPLES)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print a completion script for SHELL."""
    found = get_completion_class(shell)
    if found is None:
        raise UsageError(f"no completion for {shell}")
    script = found(ctx.find_root().command, {}, "ebpf-mig", VARIABLE)
    # click's own source() of bash would run bash to ask its version; the template alone is the same everywhere.
    write_result(script.source_template % script.source_vars())
