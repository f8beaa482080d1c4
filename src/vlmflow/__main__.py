"""``vlmflow`` and ``python -m vlmflow``: the command line, and the net under it for what nobody has foreseen."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from vlmflow.core.errors import typed_line


def main() -> None:
    """Run a command; what escapes it is told in one line, with exit code 2.

    Ctrl-C and SIGTERM, from the first import on, end it in one line too, with exit codes 130 and 143. A traceback is
    shown where the option ``--traceback`` or VLMFLOW_TRACEBACK=1 asks for it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and background jobs have it
            signal.signal(number, _stop)
    try:
        from vlmflow.cli import main as command

        command()
    except SystemExit as end:
        if end.code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            _say("; ".join(["stopped", *getattr(end, "__notes__", ())]))
        if end.code:
            _trace(end)
        raise
    except Exception as error:
        _trace(error)
        _say(f"{typed_line(error)}; this was not foreseen, and VLMFLOW_TRACEBACK=1 shows where it comes from")
        sys.exit(2)


def _stop(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)  # no library takes it for an error of its own, and files are left whole


def _say(text: str) -> None:
    print(f"vlmflow: {text}", file=sys.stderr)


def _trace(error: BaseException) -> None:
    if os.environ.get("VLMFLOW_TRACEBACK", "0") not in ("", "0"):
        import traceback

        traceback.print_exception(error)


if __name__ == "__main__":
    main()
