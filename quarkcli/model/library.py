"""Imports transformers' inner parts, in this file only, so that a release that moved one gives one clear error.

Everything else of this room imports these names from here. The project asks for 5.22 up to, not including, 6.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from typing import Any
from unittest import mock

from quarkcli.errors import ModelError
from quarkcli.memory import without_collection
from quarkcli.model import deferred

try:
    with without_collection():  # everything that an import makes stays
        deferred.unneeded()
        import transformers
        from huggingface_hub import constants as hub_constants
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            Concatenate,
            MergeModulelist,
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
        from transformers.initialization import no_init_weights
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
        from transformers.utils import chat_template_utils
except ImportError as error:
    raise ModelError(
        f"this release of transformers cannot run models for quark: {error}",
        hint="install a release from 5.22 on, below 6: pip install 'transformers>=5.22,<6'",
        kind="E-TRANSFORMERS",
    ) from error

TESTED = "5.23.0"  # the release in constraints.txt, on which every family runs

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "CONFIG_MAPPING",
    "TESTED",
    "AutoConfig",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoTokenizer",
    "Concatenate",
    "MergeModulelist",
    "PreTrainedModel",
    "WeightConverter",
    "WeightRenaming",
    "dot_natural_key",
    "get_model_conversion_mapping",
    "no_init_weights",
    "one_day",
    "quiet",
    "rename_source_key",
    "transformers",
]


class _OneDay(datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz: Any = None) -> _OneDay:
        return cls(2025, 1, 1, tzinfo=tz)


@contextmanager
def one_day() -> Iterator[None]:
    """Shows the same day to chat templates that print the date (Llama's): a run can go on after midnight."""
    with mock.patch.object(chat_template_utils, "datetime", _OneDay):
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers from logging, drawing and fetching inside; the caller's settings come back afterwards."""
    log = transformers.logging
    bars = log.is_progress_bar_enabled()
    with ExitStack() as stack:
        # set_verbosity would make every logger of the process look up anew what it is enabled for, twice a call.
        theirs = logging.getLogger("transformers")
        stack.enter_context(mock.patch.object(theirs, "handlers", [logging.NullHandler()]))
        stack.enter_context(mock.patch.object(theirs, "propagate", False))
        stack.callback(log.enable_progress_bar if bars else log.disable_progress_bar)
        # Both libraries ask this constant whenever they are about to use the network.
        stack.enter_context(mock.patch.object(hub_constants, "HF_HUB_OFFLINE", True))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        log.disable_progress_bar()
        yield
