"""`peftc run`: a Python program, unchanged, in which `import peft` means peftc.

It runs in an interpreter of its own, so that nothing of this one (warnings, handlers) is in its way.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

HELP = "Run a Python program in which `peft` means peftc"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("-m", "--module", action="store_true", help="TARGET is a module, as with `python -m`")
    parser.add_argument("target", metavar="TARGET", help="the program: a script, or with -m a module")
    parser.add_argument("arguments", metavar="ARGUMENT", nargs=argparse.REMAINDER, help="arguments of the program")


def run(args: argparse.Namespace) -> int:
    """Become an interpreter that installs the alias and runs the program; its exit code is the program's."""
    module = ["-m"] if args.module else []
    command = [sys.executable, "-m", "peftc.compat", *module, args.target, *args.arguments]
    sys.stdout.flush()
    if os.name == "posix":  # signals reach the program, as there is no process between
        os.execv(command[0], command)
    return subprocess.call(command)
