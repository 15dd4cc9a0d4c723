"""What a result says of where it comes from: the commit, the versions, the machine, and the memory it took."""

import os
import platform
import resource
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

import peft_jax

ROOT = Path(__file__).resolve().parents[1]
WRITTEN = ("experiments/results", "README.md")  # by runs and tables themselves
PACKAGES = ("jax", "flax", "optax", "transformers")


def commit(root: Path = ROOT) -> tuple[str, list[str]]:
    """(commit, what differs from it, results and the README apart).  Outside a repository the commit is 'unknown'."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True).stdout

    try:
        here = git("rev-parse", "HEAD").strip()
        changes = git("status", "--porcelain", "--", ".", *(f":(exclude){path}" for path in WRITTEN))
    except (OSError, subprocess.CalledProcessError):
        return "unknown", ["everything: this is not a git repository with a commit"]
    return here, [line[3:] for line in changes.splitlines()]


def versions() -> dict[str, str]:
    found = {name: version(name) for name in PACKAGES}
    return {"peft_jax": peft_jax.__version__, **found, "python": platform.python_version()}


def machine() -> dict[str, Any]:
    device = jax.devices()[0]
    return {"device": device.device_kind, "count": jax.device_count(), "cores": os.cpu_count(), "os": platform.system()}


def origin(result: dict[str, Any]) -> str:
    """A benchmark's last line: how often, where, of which commit and with which versions."""
    found = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    cores, here = result["machine"]["cores"], result["commit"][:12]
    return f"{result['rounds']} rounds on {cores} CPU cores; commit {here}; {found}. No GPU has been measured yet.\n"


class Peak:
    """The most memory held while the block ran: resident where Linux can reset its mark, on the device if it counts.

    `of` says which: "run", or "process" where the mark could not be reset and covers earlier runs too.
    """

    def __enter__(self) -> "Peak":
        self.of = "run"
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.of = "process"
        return self

    def __exit__(self, *error: object) -> None:
        stats = jax.devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            self.of, self.bytes = "process", int(stats["peak_bytes_in_use"])
        elif self.of == "run":
            lines = Path("/proc/self/status").read_text().splitlines()
            self.bytes = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
        else:
            scale = 1 if platform.system() == "Darwin" else 1024
            self.bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
