"""Model families: which tensor of a checkpoint plays which role. Torch-free; a family is a YAML file.

`lay_out` applies a family to headers and answers with every weight a recipe can reach (`Weight`), the activations they
read, the parts of the walk and the attention modules. A family nobody described is inferred from names.
"""

from quarkcli.family.layout import AttentionModule, Layout, Part, Site, Weight, lay_out
from quarkcli.family.schema import (
    PROTECTED,
    ExpertsModel,
    FamilyModel,
    FusedModel,
    HeaderLike,
    check_unprotect,
    for_checkpoint,
    identify,
    infer,
    load,
)
from quarkcli.family.views import WeightView, fused_views, view_shape

__all__ = [
    "PROTECTED",
    "AttentionModule",
    "ExpertsModel",
    "FamilyModel",
    "FusedModel",
    "HeaderLike",
    "Layout",
    "Part",
    "Site",
    "Weight",
    "WeightView",
    "check_unprotect",
    "for_checkpoint",
    "fused_views",
    "identify",
    "infer",
    "lay_out",
    "load",
    "view_shape",
]
