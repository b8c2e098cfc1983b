"""Says which role each tensor of a checkpoint plays. A family is a YAML file. Torch-free.

`lay_out` applies a family to headers and answers with every weight a recipe can reach (`Weight`), the activations they
read, the parts of the walk and the attention modules. A family nobody described is inferred from names.
"""

from quarkcli.family.config import (
    TIED,
    active_experts,
    block_count,
    head_size,
    heads,
    hidden_size,
    kv_heads,
    position_limit,
    quantization,
    text_config,
    vocabulary,
    without_quantization,
)
from quarkcli.family.fit import check as check_fit
from quarkcli.family.infer import guess, infer
from quarkcli.family.known import Card, card, cards, for_checkpoint, has_experts, identify, load
from quarkcli.family.layout import AttentionModule, Layout, Site, Weight, lay_out
from quarkcli.family.leftovers import check_codes, surprises
from quarkcli.family.lists import block_lists, tower
from quarkcli.family.orientation import hidden_transpositions
from quarkcli.family.parts import Part
from quarkcli.family.rewrites import Channels, Pair, Residual, Rewrites, Values, expert_bias
from quarkcli.family.schema import (
    PROTECTED,
    ROLE_CLASSES,
    TOWERS,
    ExpertsModel,
    FamilyModel,
    FusedModel,
    HeaderLike,
    ScalingModel,
    check_unprotect,
)
from quarkcli.family.spelling import published_experts, spelled
from quarkcli.family.views import WeightView, fused_shape, fused_views, view_shape
from quarkcli.family.write import to_yaml

__all__ = [
    "PROTECTED",
    "ROLE_CLASSES",
    "TIED",
    "TOWERS",
    "AttentionModule",
    "Card",
    "Channels",
    "ExpertsModel",
    "FamilyModel",
    "FusedModel",
    "HeaderLike",
    "Layout",
    "Pair",
    "Part",
    "Residual",
    "Rewrites",
    "ScalingModel",
    "Site",
    "Values",
    "Weight",
    "WeightView",
    "active_experts",
    "block_count",
    "block_lists",
    "card",
    "cards",
    "check_codes",
    "check_fit",
    "check_unprotect",
    "expert_bias",
    "for_checkpoint",
    "fused_shape",
    "fused_views",
    "guess",
    "has_experts",
    "head_size",
    "heads",
    "hidden_size",
    "hidden_transpositions",
    "identify",
    "infer",
    "kv_heads",
    "lay_out",
    "load",
    "position_limit",
    "published_experts",
    "quantization",
    "spelled",
    "surprises",
    "text_config",
    "to_yaml",
    "tower",
    "view_shape",
    "vocabulary",
    "without_quantization",
]
