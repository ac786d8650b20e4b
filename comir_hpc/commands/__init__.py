"""The command line.

`app` has the verbs. `verb` and `options` make their options from settings. `call` is what a verb is given. `terminal`
and `progress` say things, `failure` and `interrupt` say how a command ended. `doctor` examines the node.
"""

from __future__ import annotations

import os
import signal
import sys

from comir_hpc.commands.interrupt import EXIT_INTERRUPTED, Interrupt


def main() -> None:
    """Run one command and exit with its code; `comir_hpc.commands.failure` lists the codes."""
    # Verbs that can save first listen for themselves. Before and after that nothing is lost by ending at once.
    signal.signal(signal.SIGUSR2, lambda number, frame: os._exit(85))
    interrupt = Interrupt()
    interrupt.listen()
    try:
        from comir_hpc.commands.app import app
        from comir_hpc.commands.failure import carry_out
        from comir_hpc.commands.terminal import Terminal, close_streams, open_streams
    except (KeyboardInterrupt, ImportError):
        if interrupt.requested:
            interrupt.leave()
        raise

    open_streams()
    terminal = Terminal()
    try:
        code = carry_out(lambda: app(obj=terminal, standalone_mode=False), terminal, interrupt)
        code = carry_out(close_streams, terminal, interrupt) or code
    except KeyboardInterrupt:  # while the end is said
        interrupt.leave()
    if code == EXIT_INTERRUPTED:
        os._exit(code)  # Python's own way out waits for threads, and may replace the code by death of SIGINT
    sys.exit(code)
