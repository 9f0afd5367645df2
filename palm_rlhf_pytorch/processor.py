"""What the processor says of itself."""

from __future__ import annotations

from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def described() -> list[str]:
    """Its lines, on Linux; nothing elsewhere."""
    return CPUINFO.read_text(errors="replace").splitlines() if CPUINFO.exists() else []


def is_not_intel_with(*flags: str) -> bool:
    """Whether this is an x86 processor of another maker that has these instructions."""
    lines = described()
    vendors = [line for line in lines if line.startswith("vendor_id")]
    has = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    return bool(vendors) and "GenuineIntel" not in vendors[0] and has.issuperset(flags)
