"""Turns every exception of a model's code into one error of the model.

Every call into code that quark does not own (classes of transformers, code that comes with a model) is made inside
`ModelCode.running`.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quarkcli import family, memory
from quarkcli.errors import ModelError, QuarkError
from quarkcli.model.library import TESTED, quiet, transformers

DATA_FREE_HINT = "quantize with a scheme that needs no calibration data, such as mxfp4: that never runs the model"
_LENGTH = 400  # characters of a foreign message; some print whole tensors


@dataclass(frozen=True)
class ModelCode:
    """The code of one model: its class, the config it is built from, the folder that both come from."""

    cls: type
    config: Any
    folder: Path

    @contextmanager
    def running(self, failing: str) -> Iterator[None]:
        """Quiets the model's code that runs inside, and turns what it raises into ModelErrors.

        failing  what a failure is called behind the name of the class: `fails in decoder block 3`
        raises   ModelError for what that code raises. Errors of quark pass, and so do running out of memory and what
                 goes wrong in a callable of ours that the model's code has called: a defect of quark stays one.
        """
        try:
            with quiet():
                yield
        except Exception as error:
            if self.passes(error):
                raise
            raise self.failure(failing, error) from error

    def passes(self, error: Exception) -> bool:
        """True for what is no failure of the model's code, as `running` says."""
        return isinstance(error, QuarkError) or memory.ran_out(error) or self._is_ours(error)

    def failure(self, failing: str, error: Exception) -> ModelError:
        """Returns the error for `error`: what failed, in which library and version, and what to do."""
        return ModelError(
            f"{self.cls.__name__} ({self._family()}{self._library()}) {failing}: {described(error)}{_unloaded(error)}",
            where=str(self.folder),
            hint="; ".join((*self._other_release(), DATA_FREE_HINT)),
            kind="E-CLASS-FAILS",
        )

    def _is_ours(self, error: Exception) -> bool:
        """True when the innermost code is ours, outside this room: a statistic, a quantizer.

        This room follows transformers so closely that what fails in it under the model's code is a mismatch of the two.
        """
        model = {"transformers", "transformers_modules", self.cls.__module__.partition(".")[0]}
        ours = False
        for frame, _ in traceback.walk_tb(error.__traceback__):
            name = str(frame.f_globals.get("__name__"))
            top = name.partition(".")[0]
            if top == "quarkcli" or top in model:
                ours = top == "quarkcli" and not name.startswith("quarkcli.model.")
        return ours

    @property
    def _is_transformers(self) -> bool:
        return self.cls.__module__.startswith("transformers.")

    def _family(self) -> str:
        if self.config is None:
            return ""
        named = {key: getattr(self.config, key, None) for key in ("architectures", "model_type")}
        found = family.identify(named)
        return f"family {found[0]}, " if found is not None else f"model type {named['model_type']}, "

    def _library(self) -> str:
        library = f"transformers {transformers.__version__}"
        if self._is_transformers:
            return library
        return f"the model's own code in {self.cls.__module__.rpartition('.')[2]}.py, {library}"

    def _other_release(self) -> Iterator[str]:
        """Yields a release of transformers that is known to work, where one is."""
        written = getattr(self.config, "transformers_version", None)
        if not self._is_transformers:
            if written and written != transformers.__version__:
                yield f"config.json says that the model was saved with transformers {written}"
        elif transformers.__version__ != TESTED:
            yield (
                f"install transformers {TESTED}, which runs every family of quark: pip install 'transformers=={TESTED}'"
            )


def _unloaded(error: Exception) -> str:
    """Returns what torch does not say of values that a class asks for: which part of the model has none."""
    return "; quark loads one part of the model at a time, and this class reads another" * ("meta tensor" in str(error))


def described(error: Exception) -> str:
    """Returns the type and message on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= _LENGTH else text[:_LENGTH] + '...'}"
