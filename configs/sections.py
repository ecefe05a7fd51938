"""What every config section is: a frozen pydantic model that refuses unknown keys, and the error it raises."""

from __future__ import annotations

import os
import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


class Section(BaseModel):
    """A part of a run's config. Immutable; an unknown key or a wrong type is an error, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class ConfigError(ValueError):
    """The user's config cannot be used. One sentence: file, dotted key, value, and what to do.

    Code below the CLI raises it with the key alone; :meth:`LoadedRun.locate` adds the file that set the key.
    """

    def __init__(
        self, reason: str, *, key: str = "", value: object = None, hint: str = "", file: str = ""
    ) -> None:
        self.reason, self.key, self.value, self.hint, self.file = reason, key, value, hint, file
        super().__init__(self._sentence())

    def _sentence(self) -> str:
        place = ": ".join(part for part in (self.file, self.key) if part)
        text = f"{place}: {self.reason}" if place else self.reason
        return f"{text}; {self.hint}" if self.hint else text

    def at(self, file: str) -> ConfigError:
        """The same error, naming the file (or ``command line``) that set the key."""
        return ConfigError(self.reason, key=self.key, value=self.value, hint=self.hint, file=file)


SIGNED = r"[?&](x-amz-signature|x-goog-signature|signature|sig|token|access_token)="  # of a query


def _expanded(text: str) -> str:
    """A path with ``~`` and environment variables filled in, as a shell would have done."""
    if "://" not in text and text.startswith("~"):
        text = os.path.expanduser(text)  # noqa: PTH111 - a path's type would drop the slash of "a/"
    text = os.path.expandvars(text)
    unset = re.search(r"\$(\w+|\{\w+\})", text)
    if unset:
        raise ValueError(f"names the environment variable {unset[1].strip('{}')}, which is not set")
    if re.search(r"://[^/]*:[^/]*@", text) or re.search(SIGNED, text, re.IGNORECASE):
        raise ValueError(
            "holds a password or a signature, and configs are stored with runs; give the credentials through the "
            "environment or the store's own configuration file"
        )
    if "\0" in text:
        raise ValueError("holds a NUL character, which no path can")
    return text


def _given(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty; if it came from a shell variable, that variable is not set")
    return text


Location = Annotated[
    str, AfterValidator(_expanded)
]  # a path or URL to read from; "~" and "$NAME" are filled in
Output = Annotated[
    str, AfterValidator(_given), AfterValidator(_expanded)
]  # one to write to, which must be given
