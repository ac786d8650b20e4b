"""The command line.

`app` has the verbs. `verb` and `options` make their options from settings. `call` is what a verb is given. `terminal`
and `progress` say things, `failure` says how a command ended. `doctor` examines the node.
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Run one command and exit with its code; see `comir_hpc.commands.failure`."""
    # Verbs that can save first listen for themselves. Before and after that nothing is lost by ending at once.
    signal.signal(signal.SIGUSR2, lambda number, frame: os._exit(85))
    try:
        from comir_hpc.commands.app import app
        from comir_hpc.commands.failure import carry_out
        from comir_hpc.commands.terminal import Terminal, close_streams, open_streams
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command continues\n")
        sys.exit(130)

    open_streams()
    terminal = Terminal()
    code = carry_out(lambda: app(obj=terminal, standalone_mode=False), terminal)
    code = carry_out(close_streams, terminal) or code
    sys.exit(code)
