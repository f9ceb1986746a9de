"""`python benchmarks/kill_round.py N`: a round of adaptation is killed (SIGKILL) at N random moments.

The state directory is made from the bundled demo. Real `edgekws adapt` processes, with a short replay and few steps, and a gate that lets
everything pass, so that the promotion is killed too: every other kill falls behind the last line that a round says, where it promotes.
After each kill: the version that listens is the one from before or the new one, and whole; the database opens; and the log says how the
round before ended. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


def main(count: int) -> int:
    """Prints how many died before and after the promotion."""
    from test_adaptation import killed_rounds, make_state

    with tempfile.TemporaryDirectory() as folder:
        outcomes = []
        for what in killed_rounds(make_state(Path(folder)), count, seed=0):
            outcomes.append(what)
            if len(outcomes) % 10 == 0 or what.startswith("WRONG"):
                print(f"{len(outcomes)} kills, the last: {what}", file=sys.stderr, flush=True)
    for what in sorted(set(outcomes)):
        print(f"{outcomes.count(what):4d}  {what}")
    return int(any(what.startswith("WRONG") for what in outcomes))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kills", nargs="?", type=int, default=200, metavar="N")
    sys.exit(main(parser.parse_args().kills))
