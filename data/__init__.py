"""Corpora, and what all commands share. Imported before torch: Ctrl-C meanwhile is one word."""
import sys


def excepthook(kind, value, trace):
    """Python's own, but for Ctrl-C: run_script (command.py) is not there yet."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, value, trace)


sys.excepthook = excepthook
