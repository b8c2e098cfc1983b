"""The calibration data that is used when none is named. Torch-free."""

from __future__ import annotations

BUILTIN = "builtin"
DEFAULT_HUB = "neuralmagic/LLM_compression_calibration"
HELD_OUT = 5  # one topic in this many, the last ones by name, is for evaluation


def builtin_texts(*, held_out: bool) -> list[str]:
    """Returns Python's own reference, as shipped with every interpreter.

    One part is for calibration, the other is held out.
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    cut = len(names) - len(names) // HELD_OUT
    return [topics[name] for name in (names[cut:] if held_out else names[:cut])]


def default_source(offline: bool) -> tuple[str, str | None]:
    """Returns (source, warning): the named hub set when it can be reached, else the built-in text and the reason."""
    warning = f"calibrating on the built-in text: the default data set {DEFAULT_HUB} cannot be reached"
    if offline:
        return BUILTIN, warning
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return BUILTIN, warning
    try:
        HfApi().dataset_info(DEFAULT_HUB, timeout=5)
    except Exception:  # whatever keeps us from the hub has the same consequence, and it is said
        return BUILTIN, warning
    return DEFAULT_HUB, None
