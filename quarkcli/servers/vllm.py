"""vLLM 0.32: what it loads, the keys that it must find in a config, and its words for modules that are left out.

Read in `vllm/model_executor/layers/quantization/`; most of it was loaded. The dialects say what its classes take.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from quarkcli.servers.base import Loader


class _Key(NamedTuple):
    """A key that a config must have, dots between the steps, and its kind; `why` is what happens without."""

    path: str
    kind: type
    why: str


# quant_method -> keys without which the class is not made, or fails later.
_KEYS: dict[str, tuple[_Key, ...]] = {
    "quark": (
        _Key("export", dict, "it is refused"),
        _Key("export.kv_cache_group", list, "the class fails on it"),
        _Key("exclude", list, "the class fails on it"),
        _Key("layer_type_quant_config", dict, "the class fails on it"),
    ),
    "compressed-tensors": (_Key("config_groups", dict, "no scheme is found"), _Key("ignore", list, "the class fails")),
    "modelopt": (_Key("quant_algo", str, "the algorithm is not known"),),
}
# quant_method -> lists in which it knows names and `re:` patterns alone, and no globs.
_NO_GLOBS = {"quark": "exclude", "compressed-tensors": "ignore"}


class Vllm(Loader):
    name = "vllm"
    title = "vLLM 0.32"

    def config_faults(self, config: Mapping[str, Any]) -> list[str]:
        method = str(config.get("quant_method"))
        found = [
            f"quantization_config has no {key.path} ({key.kind.__name__}): {key.why}"
            for key in _KEYS.get(method, ())
            if not isinstance(_at(config, key.path), key.kind)
        ]
        listed = config.get(_NO_GLOBS.get(method, ""))
        globs = [text for text in listed or () if isinstance(text, str) and _is_glob(text)]
        if globs:
            found.append(f"{_NO_GLOBS[method]} has globs, which it takes for names: {', '.join(globs[:3])}")
        if config.get("desc_act") is True and config.get("group_size") != -1:
            found.append("desc_act is true: it refuses groups in order of activations")
        return found


def _is_glob(text: str) -> bool:
    """True for a glob that would have to match: a head is never quantized where it is not named."""
    return "*" in text and not text.startswith("re:") and not text.endswith("lm_head")


def _at(config: Mapping[str, Any], path: str) -> Any:
    value: Any = config
    for step in path.split("."):
        value = value.get(step) if isinstance(value, Mapping) else None
    return value


SERVER = Vllm()
