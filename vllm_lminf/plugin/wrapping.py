"""How functions of vLLM are wrapped where it offers no registry, and taken off again.

What is wrapped, and why, is listed in `vllm_lminf.plugin.patches`. This module imports no vLLM.
"""

import functools
from collections.abc import Callable
from typing import Any

_originals: dict[tuple[Any, str], Any] = {}


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Has calls of a function of vLLM go to ``around(original, *args, **kwargs)``; once, however
    often it is asked.

    Args:
        owner: the class or module that defines it.
        name: its name there. It may be a classmethod; ``around`` is given the class behind the
            original function then.
        around: gives what the call returns.

    Raises:
        RuntimeError: vLLM has no such function there any more.
    """
    if (owner, name) in _originals:
        return
    if name not in vars(owner):
        raise RuntimeError(
            f"{path_of(owner, name)} isn't there in the installed vLLM, and LMINF stands on it: "
            "install a vLLM that this version of vllm-lminf knows"
        )
    original = _originals[owner, name] = vars(owner)[name]
    is_classmethod = isinstance(original, classmethod)
    function = original.__func__ if is_classmethod else original

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(function, *args, **kwargs)

    setattr(owner, name, classmethod(wrapper) if is_classmethod else wrapper)


def installed() -> list[str]:
    """The dotted paths of all that is wrapped now, in the order in which it was."""
    return [path_of(owner, name) for owner, name in _originals]


def remove_all() -> None:
    """Takes every wrapper off."""
    while _originals:
        (owner, name), original = _originals.popitem()
        setattr(owner, name, original)


def path_of(owner: Any, name: str) -> str:
    """The dotted path of what a class or a module has under a name."""
    place = (
        f"{owner.__module__}.{owner.__qualname__}" if isinstance(owner, type) else owner.__name__
    )
    return f"{place}.{name}"
