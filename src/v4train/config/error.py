"""The one error that a wrong recipe raises: all its problems together, each with the line that has to change."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        where: the line to look at: ``configs/tiny.yaml:12``, or the ``--set a.b=c`` that gave the value.
        path: dotted path of the value (``model.layers.0.kind``), empty for the file as a whole.
        found: what stands there, as a short text; empty where nothing stands there.
        remedy: what is wrong with it, what is allowed, and the nearest valid name.
    """

    where: str
    path: str
    found: str
    remedy: str

    def __str__(self) -> str:
        subject = " = ".join(part for part in (self.path, self.found) if part)
        return f"{self.where}: {subject}\n    {self.remedy}" if subject else f"{self.where}:\n    {self.remedy}"


class ConfigError(ValueError):
    """A recipe cannot be used. ``problems`` has every reason, in the order of the file; `str` is the text for the user."""

    def __init__(self, subject: str, *, problems: tuple[Problem, ...]):
        assert problems, "an error needs a reason"
        self.subject, self.problems = subject, problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{count} in {subject}", *map(str, problems)]))
