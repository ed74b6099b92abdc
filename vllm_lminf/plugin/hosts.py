"""Which vLLM can host the plugin, and what is said where one can't.

This is asked before anything else of vLLM is imported: on a version that the plugin doesn't know,
any other name may be gone, and an engine that doesn't select LMINF must start all the same.
"""

from collections.abc import Callable
from enum import EnumMeta
from typing import Any

from packaging.version import InvalidVersion, Version

from vllm_lminf.plugin.config import is_backend_name
from vllm_lminf.plugin.wrapping import wrap

OLDEST_VLLM = Version("0.32")
FIRST_UNKNOWN_VLLM = Version("0.34")
PLATFORMS = ("cpu", "cuda")


def unsupported_environment() -> list[str]:
    """Why this vLLM can't host the plugin; empty when it can."""
    from vllm.platforms import current_platform
    from vllm.version import __version__

    reasons = []
    if not _is_known(__version__):
        reasons.append(
            f"vLLM {__version__} is installed; this plugin knows {OLDEST_VLLM} up to, not "
            f"including, {FIRST_UNKNOWN_VLLM}: install one of these, or a newer vllm-lminf"
        )
    if current_platform.device_type not in PLATFORMS:
        reasons.append(
            f"vLLM's platform here is {current_platform.device_type!r}; this plugin serves "
            f"{' and '.join(PLATFORMS)}"
        )
    return reasons


def _is_known(version: str) -> bool:
    """A source tree without a build calls itself "dev", which is no version and so not known."""
    try:
        return OLDEST_VLLM <= Version(Version(version).base_version) < FIRST_UNKNOWN_VLLM
    except InvalidVersion:
        return False


def explain_absence(message: str) -> bool:
    """Makes vLLM say this, and not that it doesn't know the backend, where LMINF is asked for.

    Every road to a backend by name ends in looking it up in vLLM's enumeration of them. Looking up
    any other name is as before. Safe to repeat.

    Returns:
        Whether that could be arranged; not where this vLLM has no such place.
    """
    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum
    except ImportError:
        return False
    names: Any = type(AttentionBackendEnum)
    if names is EnumMeta or "__getitem__" not in vars(names):
        return False

    def look_up(original: Callable[..., Any], cls: type, name: str) -> Any:
        if isinstance(name, str) and cls is AttentionBackendEnum and is_backend_name(name):
            raise ValueError(message)
        return original(cls, name)

    wrap(names, "__getitem__", look_up)
    return True
