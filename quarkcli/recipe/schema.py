"""What a native recipe file and a scheme file may say (pydantic v2); every error with file, line and column."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from quarkcli.errors import ConfigError, near_misses
from quarkcli.recipe.load import Document

NATIVE = "quark/recipe/1"


class Strict(BaseModel):
    """Unknown keys are errors and nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)


class EntryModel(Strict):
    """One entry of `quantize.quant_cfg`."""

    quantizer_path: str = Field(min_length=1)
    parent_class: str | None = None
    cfg: dict[str, Any] | None = None
    enable: bool | None = None
    required: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _path_has_two_names(cls, value: Any) -> Any:
        if isinstance(value, dict) and "quantizer_name" in value:
            if "quantizer_path" in value:
                raise ValueError("quantizer_name is an alias of quantizer_path; give one of them")
            value = {**value, "quantizer_path": value["quantizer_name"]}
            value.pop("quantizer_name")
        return value

    @model_validator(mode="after")
    def _says_something(self) -> EntryModel:
        if self.cfg is None and self.enable is None:
            raise ValueError("neither cfg nor enable is given")
        if self.cfg is not None and not self.cfg:
            raise ValueError("cfg is empty; write enable: true or false to switch only")
        return self


class AlgorithmStep(BaseModel):
    """One algorithm with its parameters; the algorithm itself checks them."""

    model_config = ConfigDict(extra="allow", strict=True)
    method: str


class Quantize(Strict):
    """What to quantize: a scheme, or the ordered entries themselves."""

    scheme: str | None = None
    quant_cfg: list[EntryModel] | None = None
    kv_cache: str | None = None
    attention: str | None = None
    algorithm: list[AlgorithmStep] | str | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Quantize:
        if (self.scheme is None) == (self.quant_cfg is None):
            raise ValueError("give either scheme or quant_cfg")
        return self


class Metadata(Strict):
    """For people."""

    name: str | None = None
    description: str = ""


class Calibration(Strict):
    """Defaults for calibration; flags win."""

    data: str | None = None
    samples: int | None = Field(default=None, gt=0)
    seqlen: int | None = Field(default=None, gt=1)
    column: str | None = None
    seed: int | None = None
    moe: Literal["routed", "all"] | None = None


class Export(Strict):
    """Where the checkpoint goes."""

    dialect: str | None = None


class RecipeModel(Strict):
    """A native recipe file."""

    schema_: Literal["quark/recipe/1"] = Field(alias="schema")
    metadata: Metadata = Metadata()
    quantize: Quantize
    exclusions: Literal["default", "none"] = "default"
    calibration: Calibration = Calibration()
    export: Export = Export()


class SchemeModel(Strict):
    """A scheme file: one cfg per slot kind. A kind it does not name is switched off.

    aliases   other names it is known under
    """

    summary: str = ""
    hardware: str = ""
    aliases: list[str] = []
    weight: dict[str, Any]
    input: dict[str, Any] | None = None
    output: dict[str, Any] | None = None
    bias: dict[str, Any] | None = None


class CacheModel(Strict):
    """A KV cache scheme: one cfg for k and one for v."""

    summary: str = ""
    k: dict[str, Any]
    v: dict[str, Any]


class AttentionModel(Strict):
    """An attention scheme: one cfg for each of q, k, v and p (the softmax output) that it speaks of."""

    summary: str = ""
    q: dict[str, Any] | None = None
    k: dict[str, Any] | None = None
    v: dict[str, Any] | None = None
    p: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> AttentionModel:
        if not any((self.q, self.k, self.v, self.p)):
            raise ValueError("none of q, k, v and p is given")
        return self


M = TypeVar("M", bound=BaseModel)


def validate(model: type[M], document: Document) -> M:
    """`document` as `model`. Raises ConfigError with all errors at once, each with its place."""
    if not isinstance(document.data, dict):
        raise ConfigError("the file must hold a mapping", where=str(document.origin()))
    try:
        return model.model_validate(document.data)
    except ValidationError as error:
        problems = [_problem(model, document, detail) for detail in error.errors()]
    head, *more = problems
    text = head[1] if not more else f"{len(problems)} problems\n" + "\n".join(f"  {w}: {t}" for w, t in problems)
    raise ConfigError(text, where=head[0] if not more else document.file)


def _problem(model: type[BaseModel], document: Document, detail: Any) -> tuple[str, str]:
    path = tuple(detail["loc"])
    where = str(document.origin(*path))
    name = ".".join(str(step) for step in path)
    if detail["type"] == "extra_forbidden":
        close = near_misses(str(path[-1]), _keys_at(model, path[:-1]))
        return where, f"unknown key '{path[-1]}'" + (f" (did you mean '{close[0]}'?)" if close else "")
    if detail["type"] == "missing":
        return where, f"'{name}' is missing"
    message = detail["msg"].removeprefix("Value error, ")
    return where, f"{name}: {message}" if name else message


def _keys_at(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """Keys of the nested model that `path` leads to."""
    current: Any = model
    for step in path:
        if isinstance(step, int):
            continue
        fields = {field.alias or name: field.annotation for name, field in current.model_fields.items()}
        nested = [kind for kind in _classes(fields.get(step)) if issubclass(kind, BaseModel)]
        if not nested:
            return []
        current = nested[0]
    return [field.alias or name for name, field in current.model_fields.items()]


def _classes(annotation: Any) -> list[type]:
    if isinstance(annotation, type):
        return [annotation]
    found: list[type] = []
    for argument in getattr(annotation, "__args__", ()):
        found += _classes(argument)
    return found
