"""How devices and keys are written in tables and charts of waiting."""

from __future__ import annotations


def by_number(device: str) -> tuple:
    """Return what sorts cpu(2) before cpu(10)."""
    return len(device), device


def printable(key: str) -> str:
    """Return a key without line breaks and the like, which it may have."""
    return "".join(c if c.isprintable() else "?" for c in key)
