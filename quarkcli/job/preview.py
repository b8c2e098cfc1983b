"""Shows calibration data: which there is, and the rows that a job would make of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quarkcli import family
from quarkcli.disk import embedded
from quarkcli.disk.origin import open_weights
from quarkcli.disk.source import Source
from quarkcli.events import Listener, silent
from quarkcli.forward.defaults import BUILTIN, DEFAULT_HUB, SELF, builtin_texts
from quarkcli.forward.files import EXAMPLE, KINDS
from quarkcli.job import idle, preflight, rows
from quarkcli.job.authored import Author
from quarkcli.job.options import Calibration, Options
from quarkcli.job.run import open_source
from quarkcli.recipe import catalog
from quarkcli.recipe import recipe as recipes
from quarkcli.recipe.recipe import Recipe

if TYPE_CHECKING:
    from quarkcli.forward.data import CalibrationData
    from quarkcli.model.tokenizer import Tokenizer


def sources() -> list[dict[str, str]]:
    """Returns what `--calib-data` takes: names that mean something, and kinds of files."""
    texts = builtin_texts(held_out=False)
    size = sum(map(len, texts))
    suffixes = ", ".join(suffix for suffix, kind in KINDS.items() if kind != "text")
    plain = ", ".join(suffix for suffix, kind in KINDS.items() if kind == "text")
    offline = f"documentation of Python 3.11, which comes with quark: {len(texts)} texts, {size:,} characters"
    return [
        {"name": BUILTIN, "kind": "built-in", "what": f"{offline}; one page in five is held out for 'quark eval'"},
        {"name": SELF, "kind": "the model", "what": "text that the model writes; needs memory for the whole model"},
        {"name": DEFAULT_HUB, "kind": "hub", "what": "the default if the hub can be reached"},
        {"name": "ORG/NAME", "kind": "hub", "what": "any data set of the hub; the split train, shuffled by the seed"},
        {"name": suffixes, "kind": "file", "what": f"a row per line or record, such as {EXAMPLE}; also .gz"},
        {"name": plain, "kind": "file", "what": "one text, cut into rows; also .gz"},
        {"name": "DIR", "kind": "directory", "what": "all such files in it"},
    ]


@dataclass(frozen=True)
class Preview:
    """The rows of a job with its settings. `warnings` are about the settings, the job's own are told."""

    source: Source
    settings: Calibration
    data: CalibrationData
    tokenizer: Tokenizer
    warnings: list[str]

    def as_dict(self, limit: int | None) -> dict[str, Any]:
        """Returns the JSON form, with the text of `limit` rows at most."""
        data = self.data
        return {
            "model": embedded.place(self.source),
            "source": data.source,
            "rows": len(data.tokens),
            "seqlen": data.tokens.shape[1],
            "tokens": data.token_count,
            "seed": self.settings.seed,
            "prefix": data.prefix,
            "digest": data.digest,
            "skipped": data.skipped,
            "notes": data.notes,
            "texts": self.texts(limit),
        }

    def texts(self, limit: int | None) -> list[dict[str, Any]]:
        """Returns rows, decoded from the tokens that the model would be given. Padding is left out."""
        found = []
        for index, row in enumerate(self.data.tokens[:limit]):
            ids = row.tolist() if self.data.mask is None else row[self.data.mask[index]].tolist()
            found.append({"row": index, "tokens": len(ids), "text": self.tokenizer.decode(ids)})
        return found


def preview(options: Options, tell: Listener = silent) -> Preview:
    """Returns the calibration rows of a job with these options. Raises QuarkError as the job would."""
    recipe = Recipe("no recipe", "", None, [])
    if options.recipe is not None:
        recipe = recipes.from_file(catalog.find_recipe(str(options.recipe)))
    source = open_source(options)
    settings = preflight.calibration(options, recipe, source, {"any": set()})
    assert settings is not None
    unused = idle.of_model(
        source, revision=options.revision, trusted=options.trust_remote_code, allow_pickle=options.allow_pickle
    )
    warnings = [*settings.warnings, *unused, *idle.of_rows(options, settings)]
    tokenizer = rows.tokenizer_of(source, options)
    weights, _ = open_weights(source)
    headers = weights.headers
    layout = family.lay_out(*family.for_checkpoint(source.config, headers), source.config, headers)
    author = Author(source, weights, layout.transposed_experts, options)
    return Preview(source, settings, rows.rows_of(settings, options, tokenizer, tell, author), tokenizer, warnings)
