"""What the demo refuses."""

from __future__ import annotations

from hookcore import HookcoreError


class DemoError(HookcoreError):
    """The demo cannot run as asked, or its outputs differ where they must not."""
