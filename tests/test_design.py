"""What the design fixes, read from the source: the order of the rooms, who may know what, sizes, and the package."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

from quarkcli import algorithms, dialects, errors, family
from quarkcli.recipe import catalog, recipe, schema
from quarkcli.recipe.attributes import native
from quarkcli.reporting import kinds

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "quarkcli"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# A room may import those on lines above it. `quarkcli` itself, which holds the version, is above all.
ROOMS = """
errors events spec memory
threads versions
documents
recipe
family
numerics
plan
model
algorithms dialects
servers
forward
disk
reporting
job
evaluation
search
api
cli
__main__
"""
# Annotations only.
NAMES_OF_TYPES = {("algorithms", "forward"), ("algorithms", "job"), ("reporting", "job")}
# Inside a folder, a module may import those named before it; every module has its place.
INSIDE = {
    "forward": "activations defaults carry handed guard enough lanes group moments outliers balance samples experts"
    " taps statistics joining files documents data walk",
    "disk": "headers weights beside outputs writer meant hub pickles stream remote source embedded side_files manifest"
    " made_from place state journal unfinished nonfinite contents checkpoint origin rewritten nearest compare values"
    " scales completeness excluded ties parallel exchanged fidelity same_config verify push",
    "job": "ranks forecast device rates options groups judging authored rows asked reach preflight splitting"
    " directories idle carried served packing problems rewriting solving damage pieces stages tuning prepass costs"
    " predict result part staging pipeline finish dividing walking fingerprint download convert run choosing"
    " bulk probe preview inspecting",
}

# Package -> the rooms that may import it.
OWNERS = {
    "transformers": {"model"},
    "accelerate": set(),
    "typer": {"cli"},
    "rich": {"cli"},
    "datasets": {"forward"},
    "pyarrow": {"forward"},
    "triton": {"numerics"},
    "pydantic": {"api", "documents", "recipe", "family"},
    "yaml": {"recipe", "reporting", "job", "search"},
    "re2": {"recipe"},
    "huggingface_hub": {"disk", "model", "forward", "cli"},
    "ml_dtypes": set(),
    "compressed_tensors": set(),
    "tests": set(),
}  # fmt: skip
# Modules that import torch as soon as they are imported; no other does, however far.
WITH_TORCH = {
    "quarkcli.numerics", "quarkcli.model", "quarkcli.forward.data", "quarkcli.forward.statistics",
    "quarkcli.forward.joining",
    "quarkcli.forward.outliers", "quarkcli.forward.guard", "quarkcli.forward.moments", "quarkcli.forward.balance",
    "quarkcli.forward.samples", "quarkcli.forward.experts",
    "quarkcli.forward.taps", "quarkcli.forward.walk", "quarkcli.forward.carry", "quarkcli.forward.handed",
    "quarkcli.algorithms._channels", "quarkcli.algorithms.tensors", "quarkcli.algorithms._trials",
    "quarkcli.job.rewriting", "quarkcli.job.solving", "quarkcli.job.stages", "quarkcli.job.tuning",
    "quarkcli.job.staging",
    "quarkcli.job.served", "quarkcli.job.probe", "quarkcli.job.packing", "quarkcli.job.pieces", "quarkcli.job.part",
    "quarkcli.job.damage",
    "quarkcli.job.pipeline",
    "quarkcli.evaluation.run", "quarkcli.evaluation.score", "quarkcli.evaluation.windows", "quarkcli.evaluation.after",
    "quarkcli.search.losses", "quarkcli.search.quantizing", "quarkcli.search.states",
}  # fmt: skip
NOUN_CLAUSE = {"What", "Which", "Where", "How", "Whether", "When", "That"}
LINES_OF_FILE, LINES_OF_FUNCTION = 400, 60


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "quarkcli"


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(module: str) -> Iterator[tuple[str, bool, int]]:
    """(module or object imported, only for type checkers, line)."""
    typing = {id(inner) for node in ast.walk(tree(module)) if for_types(node) for inner in ast.walk(node)}
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in typing, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole if whole in MODULES else str(node.module)), id(node) in typing, node.lineno


# ---- rooms


def test_every_room_has_its_place_and_every_place_its_room():
    placed = ROOMS.split()
    assert len(placed) == len(set(placed))
    assert set(placed) == {room(module) for module in MODULES} - {"quarkcli"}


def test_rooms_import_only_from_above():
    level = {name: number for number, line in enumerate(ROOMS.strip().splitlines()) for name in line.split()}
    wrong, only_types = [], set()
    for module in MODULES:
        here = room(module)
        for name, typing, line in imports(module):
            there = room(name)
            if not name.startswith("quarkcli") or there in (here, "quarkcli"):
                continue
            if here == "quarkcli" or level[there] >= level[here]:
                if typing and (here, there) in NAMES_OF_TYPES:
                    only_types.add((here, there))
                else:
                    wrong.append(f"{module}:{line}: {here} imports {there}")
            elif typing and (here, there) in NAMES_OF_TYPES:
                only_types.add((here, there))
    assert not wrong
    assert only_types == NAMES_OF_TYPES  # an exception that is no longer one goes


def test_modules_of_a_folder_import_only_those_before_them():
    for folder, line in INSIDE.items():
        order = line.split()
        own = {module: module.split(".")[2] for module in MODULES if module.startswith(f"quarkcli.{folder}.")}
        assert set(order) == set(own.values())
        for module, name in own.items():
            before = set(order[: order.index(name)])
            inner = [(own[there], at) for there, typing, at in imports(module) if there in own and not typing]
            wrong = [f"{module}:{at}: {there}" for there, at in inner if there not in before]
            assert not wrong


def test_libraries_stay_in_their_rooms():
    wrong = []
    for module in MODULES:
        for name, _, line in imports(module):
            top = name.split(".")[0]
            if top in OWNERS and room(module) not in OWNERS[top]:
                wrong.append(f"{module}:{line}: {top}")
    assert not wrong


def test_only_the_command_line_prints():
    wrong = []
    for module in MODULES:
        if room(module) == "cli":
            continue
        for node in ast.walk(tree(module)):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            stream = isinstance(node, ast.Attribute) and node.attr in {"stdout", "stderr", "stdin"}
            if called or stream:
                wrong.append(f"{module}:{node.lineno}")
    assert not wrong


# ---- registered names


@cache
def registered() -> dict[str, str]:
    """Name -> the room that owns it, in both spellings."""
    found = dict.fromkeys(algorithms.names(), "algorithms") | dict.fromkeys(dialects.names(), "dialects")
    for kind in ("schemes", "kv_cache", "ptq", "models"):
        found |= dict.fromkeys(catalog.files(kind), "recipe")
    return found | {name.replace("-", "_"): owner for name, owner in found.items()}


# (room, name): the word is something else there.
OTHER_WORDS: set[tuple[str, str]] = set()


def texts(node: ast.AST) -> Iterator[str]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
            yield inner.value


def compared(module: str) -> Iterator[tuple[str, int]]:
    """Texts that something is compared with, and their lines."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Compare):
            for operand in (node.left, *node.comparators):
                if isinstance(operand, ast.Constant | ast.Tuple | ast.List | ast.Set):
                    yield from ((text, node.lineno) for text in texts(operand))
        elif isinstance(node, ast.MatchValue):
            yield from ((text, node.value.lineno) for text in texts(node.value))
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in {"startswith", "endswith"}:
            yield from ((text, node.lineno) for argument in node.args for text in texts(argument))


def test_nobody_asks_for_a_registered_name_but_its_owner():
    names = registered()
    assert {"gptq", "compressed-tensors", "compressed_tensors", "nvfp4", "llama", "fp8"} <= set(names)
    found = {
        (room(module), text): f"{module}:{line}: {text!r}"
        for module in MODULES
        for text, line in compared(module)
        if text in names and room(module) != names[text]
    }
    wrong = [place for key, place in found.items() if key not in OTHER_WORDS]
    assert not wrong
    assert set(found) == OTHER_WORDS  # an exception that is no longer one goes


def test_the_check_itself_finds_such_comparisons(monkeypatch):
    code = "if name == 'gptq': pass\nif x in ('fp8', y): pass\nmatch z:\n    case 'llama': pass\na.startswith('nvfp4')"
    monkeypatch.setitem(globals(), "tree", lambda module: ast.parse(code))
    assert {text for text, _ in compared("quarkcli.fake")} == {"gptq", "fp8", "llama", "nvfp4"}


# ---- what is imported


def test_modules_without_torch_stay_without_it():
    """One process imports them one by one and names the first that brings torch in."""
    light = [name for name in MODULES if not any(f"{name}.".startswith(f"{heavy}.") for heavy in WITH_TORCH)]
    assert len(light) > 50
    script = (
        "import importlib, sys\n"
        f"for name in {light!r}:\n"
        "    importlib.import_module(name)\n"
        "    for heavy in ('torch', 'transformers', 'datasets', 'triton', 'numpy', 'rich'):\n"
        "        assert heavy not in sys.modules, f'{name} imports {heavy}'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_help_and_lists_are_light():
    commands = [
        ["--help"], ["quantize", "--help"], ["recipes", "list"], ["schemes", "list", "--json"], ["models", "list"],
        ["recipes", "show", "nvfp4"], ["schemes", "show", "nvfp4"], ["models", "show", "llama"],
    ]  # fmt: skip
    script = (
        "import sys\nfrom quarkcli.cli.main import main\n"
        f"for argv in {commands!r}:\n"
        "    assert main(argv) == 0, argv\n"
        "    for heavy in ('torch', 'transformers', 'datasets', 'triton', 'rich'):\n"
        "        assert heavy not in sys.modules, (argv, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


# ---- sizes


def test_no_file_is_long():
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {name: n for name, n in lengths.items() if n > LINES_OF_FILE} == {}


def test_no_function_is_long():
    wrong = [
        f"{module}.{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for module in MODULES
        for node in ast.walk(tree(module))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno + 1 > LINES_OF_FUNCTION
    ]
    assert not wrong


# ---- docstrings


def noun_clauses(source: ast.Module) -> list[str]:
    """Returns the first lines of docstrings that are a clause such as `What the job takes`, not a sentence."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef
    texts = [ast.get_docstring(node) or "" for node in ast.walk(source) if isinstance(node, documented)]
    return [text.splitlines()[0] for text in texts if text.split(" ")[0] in NOUN_CLAUSE]


def test_docstrings_are_sentences():
    wrong = {module: found for module in MODULES if (found := noun_clauses(tree(module)))}
    assert wrong == {}


def test_a_noun_clause_is_found():
    source = ast.parse('def f():\n    """Whether it is."""\ndef g():\n    """Returns whether it is."""')
    assert noun_clauses(source) == ["Whether it is."]


# ---- what is shipped


@pytest.mark.parametrize("name", catalog.files("models"))
def test_families_load(name):
    model = family.load(catalog.files("models")[name])
    assert model.architectures
    assert model.model_types


@pytest.mark.parametrize("name", catalog.files("schemes"))
def test_schemes_load(name):
    model = recipe.scheme_model(name)
    assert native.to_spec(model.weight).format
    assert model.input is None or native.to_spec(model.input).format
    assert model.summary
    assert recipe.from_scheme(name).scheme == name


@pytest.mark.parametrize("name", catalog.files("kv_cache"))
def test_caches_load(name):
    model = schema.validate(schema.CacheModel, catalog.document(catalog.files("kv_cache")[name]))
    assert native.to_spec(model.k).format
    assert native.to_spec(model.v).format


@pytest.mark.parametrize("name", catalog.files("ptq"))
def test_recipes_load(name):
    found = recipe.from_file(catalog.files("ptq")[name])
    assert found.description
    assert found.entries
    assert algorithms.created(found.algorithms)
    assert found.kv_cache is None or found.kv_cache in catalog.files("kv_cache")


def test_no_name_is_taken_twice():
    """`_` and `-` are the same; what looks alike must not be two things of one kind."""
    for kind in ("schemes", "kv_cache", "ptq", "models"):
        names = [name.replace("-", "_").lower() for name in catalog.files(kind)]
        assert len(names) == len(set(names))


# ---- the package


def test_the_list_of_packages_is_complete():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    real = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("__init__.py")}
    assert sorted(listed) == sorted(real | {"quarkcli.recipes"})
    without = [path.parent for path in PACKAGE.rglob("*.py") if not (path.parent / "__init__.py").is_file()]
    assert not without


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the unpacked wheel, built from a copy of the source tree."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for name in ("quarkcli", "recipes"):
        copytree(ROOT / name, source / name, ignore=ignore_patterns("__pycache__"))
    script = f"from setuptools import build_meta; print(build_meta.build_wheel({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=source)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def shipped(folder: Path, *parts: str) -> set[str]:
    files = (path for part in parts for path in (folder / part).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix() for path in files if "__pycache__" not in path.parts}


def test_the_wheel_holds_everything(installed):
    recipes = {f"quarkcli/{name}" for name in shipped(ROOT, "recipes")}
    assert any(name.endswith("schemes/nvfp4.yaml") for name in recipes)
    assert shipped(installed, "quarkcli") == shipped(ROOT, "quarkcli") | recipes


def test_the_wheel_works_away_from_the_source_tree(installed, tmp_path):
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import quarkcli\n"
        "from quarkcli.cli.main import main\n"
        "from quarkcli.recipe import catalog\n"
        "assert quarkcli.__file__.startswith(sys.argv[1])\n"
        "assert str(catalog.built_in_folder()) == sys.argv[1] + '/quarkcli/recipes'\n"
        "sys.exit(main(['plan', '--model', 'demo', '--recipe', 'nvfp4-kv_fp8', '--calib-data', 'builtin']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(installed)], capture_output=True, text=True, cwd=tmp_path
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "nvfp4" in done.stdout


# ---- every error of a user has a kind that the index knows


def raised() -> Iterator[tuple[str, type[errors.QuarkError], ast.expr | None]]:
    """Every error of a user that the package makes: place, class, and the expression of its kind."""
    known = (found for found in vars(errors).values() if isinstance(found, type))
    classes = {found.__name__: found for found in known if issubclass(found, errors.QuarkError)}
    for module in MODULES:  # and classes of other modules that are such errors
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.ClassDef):
                bases = [classes[base.id] for base in node.bases if isinstance(base, ast.Name) and base.id in classes]
                classes |= dict.fromkeys([node.name], bases[0]) if bases else {}
    del classes["Mistakes"]  # names its kind itself; each of them has its own
    for module in MODULES:
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "super().__init__" and node.keywords:
                named = [word.value for word in node.keywords if word.arg == "kind"]
                yield from ((f"{module}:{node.lineno}", errors.ConfigError, kind) for kind in named)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in classes:
                kind = next((word.value for word in node.keywords if word.arg == "kind"), None)
                yield f"{module}:{node.lineno}", classes[node.func.id], kind


def kind_of(expression: ast.expr | None) -> str | None:
    """The kind that an expression gives, or falls back to; the one of another error is "passed on"."""
    match expression:
        case ast.Constant(value=str(name)):
            return name
        case ast.BoolOp(values=[ast.Attribute(attr="kind"), ast.Constant(value=str(name))]):
            return name
        case ast.Attribute(attr="kind") | ast.Name(id="kind"):
            return "passed on"
    return None


def test_every_error_has_a_kind_of_the_index():
    index = kinds.index()
    found = [(place, raised_class, kind_of(kind)) for place, raised_class, kind in raised()]
    assert [place for place, _, name in found if name is None] == []
    named = [(place, one, name) for place, one, name in found if name not in (None, "passed on")]
    assert [(place, name) for place, _, name in named if name not in index] == []
    assert set(index) - {name for _, _, name in named} == set()
    own = (errors.QuarkError, errors.Stopped)  # an error of these may have a code of its own
    ends = {place: (int(one.code), index[name].exit) for place, one, name in named if one not in own}
    assert {place: codes for place, codes in ends.items() if codes[0] not in codes[1]} == {}


def test_classes_of_errors_are_chosen_by_statements():
    """One that a conditional expression chooses would be raised without a look at its kind."""
    names = {name for name, found in vars(errors).items() if isinstance(found, type)}
    wrong = [
        f"{module}:{node.lineno}"
        for module in MODULES
        for node in ast.walk(tree(module))
        if isinstance(node, ast.IfExp) and {ast.unparse(node.body), ast.unparse(node.orelse)} & names
    ]
    assert wrong == []


def test_the_index_of_errors_is_in_plain_sentences():
    for code, kind in kinds.index().items():
        assert code.startswith("E-") and code == code.upper()
        assert kind.causes and len({*kind.causes}) == len(kind.causes)
        assert all(text.endswith(".") for text in (kind.means, kind.cure, *kind.causes)), code
        assert kind.example.startswith(("error: ", "stopped: ")), code


# ---- the words on the screen: docs/architecture.md has the rules


WORDS_OF_SENTENCE = 25
NAMES = ("AWQ", "GPTQ", "KV", "NaN", "RANK", "IPython", "R1", "GGUF", "ModelOpt", "vLLM", "LLMTemplate")
VERBS = {
    "add", "ask", "begin", "build", "change", "check", "choose", "compare", "convert", "correct", "create",
    "delete", "describe", "did", "download", "enable", "exclude", "fix", "free", "give", "go", "if", "install",
    "keep", "leave", "look", "make", "measure", "merge", "move", "name", "put", "quantize", "read", "remove",
    "rename", "repair", "repeat", "restore", "run", "save", "search", "see", "set", "show", "start", "switch",
    "take", "try", "unpack", "unset", "unwrap", "use", "wait", "write",
}  # fmt: skip
# A plainer word says it: quantizer or tensor, layer input, supported, original model, checkpoint format, process.
BANNED = re.compile(
    r"\b(slots?|sites?|honou?red?|lanes?|fates?|whether|source model|source tensors?|forward pass|dialects?|ranks?"
    r"|out of device memory|in turn|nothing tells|as such|passes over)\b"
)
IN_QUOTES = re.compile(r"'[^']*'|`[^`]*`|--[\w-]+")


def formats(node: ast.AST) -> Iterator[str]:
    """Texts that an expression can give: `{}` stands for each value in it."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr(values=values):
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in values)
        case ast.IfExp(body=one, orelse=other):
            yield from (*formats(one), *formats(other))
        case ast.BinOp(left=one, op=ast.Add(), right=other):
            yield from (f"{first}{second}" for first in formats(one) for second in formats(other))


@cache
def said() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Places and texts of what errors say, and of their hints: arguments, and variables called `what` and `hint`."""
    known = (found for found in vars(errors).values() if isinstance(found, type))
    classes = {found.__name__ for found in known if issubclass(found, errors.QuarkError)}
    messages, hints = [], []
    for module in MODULES:
        for node in ast.walk(tree(module)):
            place = f"{module}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call):
                if node.args and isinstance(node.func, ast.Name) and node.func.id in classes:
                    messages += [(place, text) for text in formats(node.args[0])]
                hints += [(place, text) for word in node.keywords if word.arg == "hint" for text in formats(word.value)]
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found = {"what": messages, "hint": hints}.get(node.targets[0].id)
                if found is not None:
                    found += [(place, text) for text in formats(node.value)]
    return messages, hints


def sentences_of(text: str) -> list[str]:
    return re.split(r"[;:\n]|\. ", text)


def test_errors_and_hints_are_short_and_in_plain_words():
    texts = [*said()[0], *said()[1]]
    assert len(texts) > 900
    long = [row for row in texts if any(len(part.split()) > WORDS_OF_SENTENCE for part in sentences_of(row[1]))]
    assert long == []
    assert [(place, text) for place, text in texts if BANNED.search(IN_QUOTES.sub("", text))] == []


def test_errors_begin_with_a_small_letter_and_have_no_full_stop():
    messages, hints = said()
    assert [row for row in messages if row[1][:1].isupper() and not row[1].startswith(NAMES)] == []
    assert [row for row in messages + hints if row[1].endswith(".") and not row[1].endswith("...")] == []


def test_hints_begin_with_a_verb():
    """Or with a value, which a variable gives."""
    first = [(place, text, re.split(r"[ ,]", text)[0]) for place, text in said()[1] if text]
    assert [row for row in first if row[2] not in VERBS and not row[2].startswith(("{", "'", ";")) and row[2]] == []


def test_help_is_in_sentences():
    """What a flag or an argument does: it begins with a capital, or with a value, and ends with a full stop."""
    texts = [
        (f"{module}:{word.value.lineno}", text)
        for module in MODULES
        if room(module) == "cli"
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Option", "typer.Option", "typer.Argument")
        for word in node.keywords
        if word.arg == "help"
        for text in formats(word.value)
    ]
    assert len(texts) > 100
    ends = re.compile(r"\.( \[default: [^]]*\])?$")
    assert [row for row in texts if not row[1][:1].isupper() or not ends.search(row[1])] == []
    assert [row for row in texts if any(len(part.split()) > WORDS_OF_SENTENCE for part in sentences_of(row[1]))] == []
    assert [row for row in texts if re.search(r"\b(slots?|sites?|part by part|fuse)\b", row[1])] == []


# Their words are another package's, or are handed on from where a fault was found.
FOREIGN = {"E-COMMAND-LINE", "E-RECIPE-YAML"}
HANDED_ON = {"E-CHECK-FILES", "E-CHECK-MODEL", "E-CHECK-SEVERAL", "E-DATA-STRICT", "E-ENTRY", "E-GATE", "E-JSON-SHAPE",
             "E-NONFINITE-WEIGHT", "E-SERVER-SPLIT"}  # fmt: skip


def spoken() -> dict[str, set[str]]:
    """Texts in the functions that make errors of a kind, and what others give to these functions, by the kind."""
    found: dict[str, set[str]] = {}
    given: dict[str, set[str]] = {}
    makers: dict[str, set[str]] = {}
    for module in MODULES:
        for part in tree(module).body:
            nodes = list(ast.walk(part))
            texts = {text for node in nodes for text in formats(node)}
            for call in (node for node in nodes if isinstance(node, ast.Call)):
                values = (*call.args, *(word.value for word in call.keywords))
                name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
                given.setdefault(name, set()).update(text for value in values for text in formats(value))
            for kind in filter(re.compile(r"E-[A-Z-]+").fullmatch, texts):
                found.setdefault(kind, set()).update(texts)
                named = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
                makers.setdefault(kind, set()).update(named)
    return {kind: texts.union(*(given.get(name, ()) for name in makers[kind])) for kind, texts in found.items()}


def says(example: str, one: str) -> bool:
    """True when an error prints this first line, its place before it, from this text with its values."""
    one = one.partition("\n")[0]
    if "{}" not in one and len(one.split()) > 3:
        return one in example
    text = f": {example.partition(': ')[2]}"
    pieces = f": {one}".split("{}")
    if len("".join(pieces)) < 8 or not text.endswith(pieces[-1]):
        return False
    at = 0
    for piece in pieces:
        at = text.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    return True


def test_examples_of_errors_are_what_the_code_prints():
    made, index = spoken(), kinds.index()
    every = {text for module in MODULES for node in ast.walk(tree(module)) for text in formats(node)}
    texts = {code: every if code in HANDED_ON else made[code] for code in index.keys() - FOREIGN}
    wrong = {code for code, own in texts.items() if not any(says(index[code].example, one) for one in own)}
    assert wrong == set()


def test_an_example_that_nothing_prints_is_found():
    assert says("error: a.yaml:3: 'x' is 4, not 5", "'{}' is {}, not {}")
    assert not says("error: 'x' is 4 and not 5", "'{}' is {}, not {}")
