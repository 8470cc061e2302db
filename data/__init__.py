"""Corpora, and what all commands share. Imported before torch: Ctrl-C meanwhile is one word."""
import os
import sys

# Before a thread of GNU's OpenMP sleeps it looks for work so often, not 300,000 times: with a core
# that something else keeps busy a step is 3 times as fast; on an idle machine nothing changes.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def excepthook(kind, value, trace):
    """Python's own, but for Ctrl-C: run_script (command.py) is not there yet."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, value, trace)


sys.excepthook = excepthook
