"""`python -m hookcore` is the command `hookcore`."""

from __future__ import annotations

from hookcore.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
