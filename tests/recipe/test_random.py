"""Random recipes of every vocabulary, and with slips in them: a plan or a user error, never a traceback."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from quarkcli import algorithms, dialects, family
from quarkcli.disk.embedded import EMBEDDED
from quarkcli.disk.source import Source
from quarkcli.errors import QuarkError
from quarkcli.job import preflight
from quarkcli.plan.compose import Overrides
from quarkcli.plan.resolve import resolve
from quarkcli.recipe import recipe
from quarkcli.spec import ELEMENTS, RULES, SCALE_FORMATS

SHARES = {"some": 300, "all": 2500}  # of 1,200 and 10,000, in four parts
WORDS = st.sampled_from(
    [None, True, False, 0, 1, -1, 4, 8, 16, 32, 1.5, "", "static", "dynamic", "tensor", "token", "channel", "e4m3",
     [4, 3], [2, 1], [8, 0], [], {}, {"group": 32}, {"tile": [16, 16]}, {-1: 16}, "min_max", "per_group", "int4", "off"]
)  # fmt: skip
PATTERNS = st.sampled_from(
    ["*", "*weight_quantizer", "*input_quantizer", "*.weight_quantizer", "*q_proj*", "*[kv]_bmm_quantizer", "default",
     "[", "re:.*down_proj.*", "re:(", "lm_head*", "*weight_quantizer.1", "nn.Linear", "nn.Embedding", ""]
)  # fmt: skip
NATIVE = st.fixed_dictionaries(
    {"element": st.sampled_from([*ELEMENTS, "mx", "int5"])},
    optional={
        "granularity": st.sampled_from(
            ["tensor", "channel", "token", {"group": 16}, {"group": 48}, {"tile": [8, 8]}, 3]
        ),
        "scale": st.fixed_dictionaries(
            {},
            optional={
                "dtype": st.sampled_from(list(SCALE_FORMATS)),
                "rule": st.sampled_from(RULES),
                "when": st.sampled_from(["static", "dynamic"]),
                "global_scale": st.sampled_from(
                    [{"dtype": "f32"}, {"dtype": "f32", "constant_amax": 3.0}, {"dtype": "e4m3"}]
                ),
                "minimum": WORDS,
            },
        ),
        "zero_point": st.sampled_from(["none", "int", "float"]),
        "observer": st.sampled_from(["mse", {"name": "percentile", "percentile": 99}, "histogram", "headroom", "x"]),
        "then": st.just({"element": "int4", "granularity": "channel"}),
        "stored": st.sampled_from(["first", "last"]),
        "enable": WORDS,
    },
)
MODELOPT = st.fixed_dictionaries(
    {"num_bits": st.sampled_from([2, 4, 8, 7, [4, 3], [2, 1], "e2m3", "fp8"])},
    optional={
        "axis": st.sampled_from([None, 0, -1, 2, [0]]),
        "block_sizes": st.dictionaries(
            st.sampled_from([-1, -2, 0, "type", "scale_bits", "four_over_six", "x"]), WORDS, max_size=4
        ),
        **dict.fromkeys(("type", "unsigned", "narrow_range", "calibrator", "constant_amax", "rotate", "bias"), WORDS),
    },
)
QUARK = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["int4", "fp8_e4m3", "fp4", "mx6", "uint4", "bfp16", "int9"])},
    optional=dict.fromkeys(("qscheme", "group_size", "ch_axis", "symmetric", "is_dynamic", "scale_format"), WORDS),
)
JUNK = st.dictionaries(st.sampled_from(["element", "num_bits", "dtype", "scale", "cfg", "*"]), WORDS, max_size=3)
CFG = NATIVE | MODELOPT | QUARK | JUNK
ENTRY = st.fixed_dictionaries(
    {"quantizer_path": PATTERNS},
    optional={
        "cfg": CFG | st.lists(MODELOPT | QUARK, max_size=3) | WORDS,
        "enable": st.booleans() | WORDS,
        "parent_class": st.sampled_from(["nn.Linear", "nn.Embedding", "nn.BatchNorm2d", 3]),
        "required": st.booleans(),
    },
)
LEGACY = st.dictionaries(PATTERNS, CFG | WORDS | st.dictionaries(PATTERNS, CFG, max_size=2), max_size=4)
LIST = st.lists(ENTRY | LEGACY, max_size=5)
LAYER = st.dictionaries(st.sampled_from(["weight", "input_tensors", "output_tensors", "bias", "x"]), QUARK, max_size=3)

STEP = st.fixed_dictionaries(
    {"method": st.sampled_from(["gptq", "rtn", "gtpq"])},
    optional={"slots": st.lists(PATTERNS, max_size=2), "damp": WORDS},
)
HEADROOM = st.fixed_dictionaries(
    {"method": st.just("nvfp4_act_headroom")}, optional={"rho": WORDS, "weight_scale_algorithm": WORDS | st.just("mse")}
)

SHAPES: dict[str, st.SearchStrategy[Any]] = {
    "native": st.fixed_dictionaries(
        {
            "schema": st.just("quark/recipe/1"),
            "quantize": st.fixed_dictionaries(
                {"quant_cfg": st.lists(ENTRY, max_size=5)},
                optional={"algorithm": st.lists(STEP, max_size=3), "kv_cache": st.sampled_from(["fp8", "none", "fp9"])},
            ),
        },
        optional={
            "exclusions": st.sampled_from(["default", "none", 3]),
            "calibration": st.just({"samples": 4}),
            "share": st.lists(st.fixed_dictionaries({"slots": st.lists(PATTERNS, max_size=2)}), max_size=2),
        },
    ),
    "lists": LIST | LEGACY,
    "modelopt": st.fixed_dictionaries(
        {
            "quantize": st.fixed_dictionaries(
                {"quant_cfg": LIST}, optional={"algorithm": WORDS | HEADROOM | st.just("mse")}
            )
        }
    ),
    "quark": st.fixed_dictionaries(
        {"global_quant_config": LAYER},
        optional={"layer_quant_config": st.dictionaries(PATTERNS, LAYER, max_size=2), "exclude": st.lists(PATTERNS)},
    ),
}


@pytest.fixture(scope="module")
def layout() -> family.Layout:
    source = Source.open(str(EMBEDDED))
    return family.lay_out(*family.for_checkpoint(source.config, source.headers), source.config, source.headers)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", ["some", pytest.param("all", marks=pytest.mark.slow)])
def test_a_plan_or_a_user_error(shape: str, share: str, layout: family.Layout) -> None:
    ends = {"plan": 0, "error": 0}

    @settings(
        max_examples=SHARES[share], deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(SHAPES[shape])
    def run(data: Any) -> None:
        try:
            found = recipe.from_config(data)
            plan = resolve(found, Overrides(), layout)
            algorithms.pipeline(plan)
            preflight.check_plan(plan)
            dialects.choose("auto", plan)
            ends["plan"] += 1
        except QuarkError as error:
            assert error.what
            ends["error"] += 1

    run()
    assert ends["plan"] > 0
    assert ends["error"] > 0
