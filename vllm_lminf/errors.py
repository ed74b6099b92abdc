"""What goes wrong in ways that a user can act on; every message says what to do."""


class UnsupportedError(ValueError):
    """A model or a feature that LMINF doesn't serve; the message gives every reason."""

    def __init__(self, reasons: list[str]) -> None:
        self.reasons = reasons
        lines = "\n".join(f"  - {reason}" for reason in reasons)
        super().__init__(
            f"LMINF can't serve this:\n{lines}\n  Change what is named above, or unset "
            "VLLM_ATTENTION_BACKEND (or drop --attention-backend) to run it without LM-Infinite."
        )


class SettingsError(ValueError):
    """Settings that can't be honoured; the message lists every problem and what is allowed.

    Args:
        problems: a sentence each.
        how: how to set them, and to what.
    """

    def __init__(self, problems: list[str], how: str) -> None:
        self.problems = problems
        lines = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"LMINF can't start with these settings:\n{lines}\n{how}")


class BuildError(RuntimeError):
    """The kernels for CPUs can't be compiled or loaded here; the message says why."""


class CliError(Exception):
    """What the command line shows as it is, without a traceback, and ends with a status for."""
