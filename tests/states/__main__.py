"""`python -m tests.states STEPS [WORLD ...] [--seed N]`: so many steps at random, in all worlds or in those that are named.

Ends at the first failure, with the seed and the shortest way to it that was found; with that seed and world it comes again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch
from hypothesis import seed, settings
from hypothesis.stateful import get_state_machine_test

from tests.states.machine import Machine, machine, played
from tests.states.worlds import worlds

#: models that are played with in a world before it is the next one's turn
EXAMPLES = 25


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.states", description=__doc__)
    parser.add_argument("steps", type=int)
    parser.add_argument("world", nargs="*", metavar="WORLD", help=f"of {', '.join(worlds())}")
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    parser.add_argument("--length", type=int, default=40, help="operations on one model")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    round_seed, begun = given.seed, time.monotonic()
    while Machine.steps < given.steps:
        for name in given.world or worlds():
            if not _passes(name, round_seed, given.length):
                return 1
            rate = Machine.steps / (time.monotonic() - begun)
            print(f"seed {round_seed}, {name}: {Machine.steps:,} steps, {rate:.0f} a second", flush=True)
        round_seed += 1
    return 0


def _passes(name: str, number: int, length: int) -> bool:
    chosen = settings(played(EXAMPLES, length), print_blob=False)
    try:
        seed(number)(get_state_machine_test(machine(worlds()[name]), settings=chosen))()
    except Exception as error:
        import traceback

        traceback.print_exception(error)
        print(f"`python -m tests.states 1 {name} --seed {number} --length {length}` finds this again", flush=True)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
