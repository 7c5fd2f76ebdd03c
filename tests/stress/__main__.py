"""Tries hostile files, interrupts, faults, forks, threads and long use, and prints what was tried and found.

    make stress                                          # all kinds, in at most 10 minutes on two cores
    PYTHONPATH=tests:tests/support python -m stress forks interrupts   # some
    PYTHONPATH=tests:tests/support python -m stress --share 0.1        # less of each

The inputs are the same at each run. The exit status is 1 when a promise was broken, or when time did not last
for as many inputs as there have to be.
"""

from __future__ import annotations

import argparse
import sys
import time

from stress.kinds import KINDS
from stress.runner import run


def main() -> int:
    """Tries the kinds, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kinds", nargs="*", help=f"some of: {', '.join(kind.name for kind in KINDS)}")
    parser.add_argument("--share", type=float, default=1.0, help="of the inputs of a full run")
    parser.add_argument("--minutes", type=float, default=10.0)
    given = parser.parse_args()
    until = time.monotonic() + 60 * given.minutes
    rows = []
    failed = False
    for kind in KINDS:
        if given.kinds and kind.name not in given.kinds:
            continue
        begun = time.monotonic()
        wanted = max(1, round(kind.least * given.share))
        result = run(kind, wanted, until=until)
        for violation in result.violations:
            print(f"{kind.name}: {violation}", flush=True)
        rows.append(
            f"{kind.name:16} {result.tried:>8} {len(result.violations):>10} {time.monotonic() - begun:>8.0f}"
        )
        failed |= bool(result.violations) or result.tried < wanted
    print("\n".join([f"{'kind':16} {'inputs':>8} {'violations':>10} {'seconds':>8}", *rows]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
