"""Checks native recipe files and scheme files (pydantic v2). Every error has file, line and column."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from quarkcli.documents.shape import KINDS, written
from quarkcli.errors import ConfigError, did_you_mean, in_brackets
from quarkcli.recipe.load import Document, Path_
from quarkcli.recipe.mistakes import Mistakes

NATIVE = "quark/recipe/1"
_KINDS = {**KINDS, "dict_type": "a mapping", "model_type": "a mapping"}


class Strict(BaseModel):
    """Unknown keys are errors and nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True, defer_build=True)


class EntryModel(Strict):
    """One rule of the ordered list."""

    quantizer_path: str = Field(
        min_length=1, description="shell pattern on the whole name of a slot, or `re:` and a regular expression"
    )
    parent_class: str | None = Field(default=None, description="only match modules of this class")
    cfg: dict[str, Any] | list[dict[str, Any]] | None = Field(
        default=None, description="the number format; it replaces all earlier attributes; a list of two is a chain"
    )
    enable: bool | None = Field(default=None, description="on or off; true if only cfg is given")
    required: bool | None = Field(default=None, description="whether it must match a slot; true unless imported")

    @model_validator(mode="before")
    @classmethod
    def _path_has_two_names(cls, value: Any) -> Any:
        if isinstance(value, dict) and "quantizer_name" in value:
            if "quantizer_path" in value:
                raise ValueError("quantizer_name and quantizer_path mean the same; remove one of them")
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

    model_config = ConfigDict(extra="allow", strict=True, defer_build=True)
    method: str = Field(description="name of the algorithm")
    slots: list[str] | None = Field(
        default=None, min_length=1, description="patterns of the weight slots that it works on; without it: all"
    )

    @model_validator(mode="before")
    @classmethod
    def _is_no_name(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError(f"an algorithm must be a mapping, not {value!r}; write {{method: {value}}}")
        return value


class AdviceRow(Strict):
    """The default advice for some formats: steps, and why."""

    elements: list[str] = Field(min_length=1, description="globs for the number format (element) of the stored codes")
    inputs: list[Literal["kept", "static", "dynamic"]] | None = Field(
        default=None, description="how the weight's input is quantized; without it: any"
    )
    steps: list[AlgorithmStep] = Field(min_length=1, description="steps, in the order they run")
    why: str = Field(min_length=1, description="the reason, for the plan and the report")


class AdviceModel(Strict):
    """The table of default advice: the first row that fits a format holds."""

    rows: list[AdviceRow]


class ChoiceRow(Strict):
    """A scheme that `quark init` may choose, and when."""

    scheme: str = Field(min_length=1, description="a scheme")
    runs: list[Literal["fast", "weight-only", "emulated"]] = Field(
        min_length=1, description="ways in which a server must run it"
    )
    least: float = Field(default=0.0, ge=0, description="smallest number of parameters of the model")
    room: float | None = Field(
        default=None, gt=0, le=1, description="largest share of the GPUs' memory that it may take"
    )
    only: str | None = Field(default=None, min_length=1, description="glob on the modules that are quantized; all")
    why: str = Field(min_length=1, description="the reason, for the recipe")


class ChoicesModel(Strict):
    """The table of choices: the first row that fits holds."""

    rows: list[ChoiceRow]


class Quantize(Strict):
    """Says what is quantized: by a scheme, or by ordered entries."""

    scheme: str | None = Field(default=None, min_length=1, description="name of a scheme, instead of quant_cfg")
    quant_cfg: list[EntryModel] | None = Field(default=None, description="the ordered entries; the last match wins")
    kv_cache: str | None = Field(default=None, min_length=1, description="name of a KV cache scheme, or none")
    attention: str | None = Field(default=None, min_length=1, description="name of an attention scheme, or none")
    algorithm: list[AlgorithmStep] | str | None = Field(default=None, description="the algorithms, in their order")

    @model_validator(mode="after")
    def _one_of_two(self) -> Quantize:
        if (self.scheme is None) == (self.quant_cfg is None):
            raise ValueError("scheme and quant_cfg exclude each other")
        return self


class Metadata(Strict):
    """Describes the recipe for people."""

    name: str | None = Field(
        default=None, min_length=1, description="name of the recipe; without it: the name of the file"
    )
    description: str = Field(default="", description="what it is for, in one line")


class Calibration(Strict):
    """Sets the calibration data; flags override it."""

    data: str | None = Field(default=None, min_length=1, description="file, directory, hub data set, builtin, or self")
    samples: int | None = Field(default=None, gt=0, description="number of rows")
    seqlen: int | None = Field(default=None, gt=1, description="tokens per row")
    column: str | None = Field(
        default=None, min_length=1, description="column with the text; without it quark finds it"
    )
    bos: Literal["auto", "on", "off"] | None = Field(
        default=None, description="whether rows begin with the BOS token; auto: as the tokenizer does it"
    )
    seed: int | None = Field(
        default=None, ge=0, lt=2**63, description="seed of what is random: the choice of rows, the signs of a rotation"
    )
    moe: Literal["routed", "all"] | None = Field(
        default=None, description="tokens that an expert is calibrated on: those routed to it, or all"
    )
    min_expert_tokens: int | None = Field(
        default=None, gt=0, description="an expert with fewer tokens takes the statistics of its layer"
    )


class Export(Strict):
    """Sets the dialect, the layout of the checkpoint on disk."""

    dialect: str | list[str] | None = Field(
        default=None, description="a dialect, auto, or a list of dialects: one directory for each"
    )


class ShareModel(Strict):
    """Names weights of one part that share a scale."""

    slots: list[str] = Field(min_length=1, description="patterns of the weight slots that share")
    what: Literal["scale"] = Field(default="scale", description="what they share")
    exact: bool = Field(default=False, description="only these share; weights that no row names then share nothing")


class RecipeModel(Strict):
    """Describes a native recipe."""

    schema_: Literal["quark/recipe/1"] = Field(alias="schema", description="marks a native recipe")
    metadata: Metadata = Field(default=Metadata(), description="name and description")
    quantize: Quantize = Field(description="what is quantized, and how")
    exclusions: Literal["default", "none"] = Field(
        default="default", description="whether quark keeps what the family and the defaults protect"
    )
    share: list[ShareModel] | None = Field(
        default=None, description="weights that share a per-tensor scale beyond the family's groups; []: none share"
    )
    expert_inputs: Literal["shared", "own"] = Field(
        default="shared",
        description="layer: experts of a layer share their static input scale; own: each has its own",
    )
    calibration: Calibration = Field(default=Calibration(), description="the calibration data")
    export: Export = Field(default=Export(), description="the layout of the checkpoint")


class SchemeModel(Strict):
    """Describes a scheme: one cfg for each kind of slot. A kind that it does not name is off."""

    summary: str = Field(default="", description="what it is, in one line")
    hardware: str = Field(default="", description="hardware that runs it")
    aliases: list[str] = Field(default=[], description="other names of the scheme")
    weight: dict[str, Any] = Field(description="cfg of weights")
    input: dict[str, Any] | None = Field(default=None, description="cfg of the activations that a module reads")
    output: dict[str, Any] | None = Field(default=None, description="cfg of the activations that it returns")
    bias: dict[str, Any] | None = Field(default=None, description="cfg of the bias of a module")


class CacheModel(Strict):
    """Describes a KV cache scheme: one cfg for k and one for v."""

    summary: str = Field(default="", description="what it is, in one line")
    k: dict[str, Any] = Field(description="cfg of keys")
    v: dict[str, Any] = Field(description="cfg of values")


class AttentionModel(Strict):
    """Describes an attention scheme: a cfg for q, k, v and p. Those that it does not name are off."""

    summary: str = Field(default="", description="what it is, in one line")
    q: dict[str, Any] | None = Field(default=None, description="cfg of queries")
    k: dict[str, Any] | None = Field(default=None, description="cfg of keys")
    v: dict[str, Any] | None = Field(default=None, description="cfg of values")
    p: dict[str, Any] | None = Field(default=None, description="cfg of the softmax output")

    @model_validator(mode="after")
    def _says_something(self) -> AttentionModel:
        if not any((self.q, self.k, self.v, self.p)):
            raise ValueError("needs a cfg for at least one of q, k, v and p")
        return self


def json_schema() -> dict[str, Any]:
    """Returns JSON Schema (draft 2020-12) of a native recipe file."""
    schema = RecipeModel.model_json_schema(by_alias=True)
    names = {"type": "object", "additionalProperties": {"type": "string"}, "title": "Imports"}
    schema["properties"]["imports"] = {**names, "description": "Name -> file; used as `$import: name`."}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": NATIVE, **schema}


M = TypeVar("M", bound=BaseModel)


def validate(model: type[M], document: Document) -> M:
    """Returns `document` as `model`. Raises ConfigError with all errors at once, each with its place."""
    if not isinstance(document.data, dict):
        raise ConfigError("the file must hold a mapping", where=str(document.origin()), kind="E-RECIPE-SCHEMA")
    try:
        return model.model_validate(document.data)
    except ValidationError as error:
        problems = _problems(model, document, error)
    each = [ConfigError(text, where=where, kind="E-RECIPE-SCHEMA") for where, text in problems]
    raise each[0] if len(each) == 1 else Mistakes(each, where=document.file)


def _problems(model: type[BaseModel], document: Document, error: ValidationError) -> list[tuple[str, str]]:
    """Returns (place, message) of each problem. A value that has none of several allowed kinds is one problem."""
    at: dict[Path_, list[Any]] = {}
    for detail in error.errors():
        loc = detail["loc"]
        path = loc if detail["type"] == "missing" else written(document.data, loc)
        at.setdefault(path, []).append(detail)
    found: list[tuple[str, str]] = []
    for path, details in at.items():
        if isinstance(details[0]["input"], list | dict) and any(_is_inside(other, path) for other in at):
            continue  # what is wrong inside is said
        where = str(document.origin(*path))
        kinds = list(dict.fromkeys(_KINDS[detail["type"]] for detail in details if detail["type"] in _KINDS))
        if kinds:
            found.append((where, f"{_name(path)} must be {' or '.join(kinds)}, not {details[0]['input']!r:.60}"))
        found += [(where, _message(model, path, detail)) for detail in details if detail["type"] not in _KINDS]
    return found


def _is_inside(path: Path_, outer: Path_) -> bool:
    return len(path) > len(outer) and path[: len(outer)] == outer


def _name(path: Path_) -> str:
    return ".".join(str(step) for step in path)


def _message(model: type[BaseModel], path: Path_, detail: Any) -> str:
    if detail["type"] == "extra_forbidden":
        more = in_brackets(did_you_mean(str(path[-1]), _keys_at(model, path[:-1])))
        return f"unknown key '{path[-1]}'{more}"
    if detail["type"] == "missing":
        return f"'{_name(path)}' is missing"
    if detail["type"] in ("string_too_short", "too_short") and not detail["input"]:
        return f"{_name(path)} is empty; write a value, or remove it"
    message = detail["msg"].removeprefix("Value error, ")
    return f"{_name(path)}: {message}" if path else message


def _keys_at(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """Returns keys of the nested model that `path` leads to."""
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
