"""What a result was measured on, as a dictionary for the JSON beside it."""

import platform
import subprocess
from pathlib import Path

import torch


def describe_machine() -> dict[str, str | int]:
    """CPU model, cores, threads, cache, versions and commit."""
    fields = _cpu_fields()
    return {
        "cpu": fields.get("model name", platform.processor()),
        "cores": int(fields.get("cores", torch.get_num_threads())),
        "threads": torch.get_num_threads(),
        "last_level_cache": _last_level_cache(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
    }


def _cpu_fields() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    fields["cores"] = str(sum(line.startswith("processor") for line in lines) or 1)
    return fields


def _last_level_cache() -> str:
    sizes = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    return sizes[-1].read_text().strip() if sizes else "unknown"


def _commit() -> str:
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()
