"""Imports point downward only.

The tables below are the rule; the tests read every import statement of the library, also those inside functions and
under TYPE_CHECKING, and hold it. A new module needs a row in LAYERS.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# From the top down. A unit is a module or a package directly under ssd_ray; "ssd_ray" itself is the package's
# __init__. A unit imports from lower rows and from inside itself, never from its own row or from above. A module of a
# package that has a row of its own is a unit of its own: the server lies in cluster/, beside what places and starts
# actors, but is built on the library's face.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("bench",),
    ("training",),
    ("cluster.serve",),
    ("cluster.routes",),
    ("cluster.openai",),
    ("ssd_ray",),
    ("llm", "async_llm", "inspection"),
    ("engine",),
    ("cluster",),
    ("actors",),
    ("speculation", "models", "transport"),
    ("chat", "progress"),
    ("outputs",),
    ("stats", "text"),
    ("sampling", "saguaro", "wire", "flags", "prompt_files", "prompts", "tracing"),
    ("config",),
    ("errors", "heap", "logs"),
)

# Foreign packages that only these units may import.
ONLY_IN: dict[str, frozenset[str]] = {
    "ray": frozenset({"actors", "cluster", "cluster.serve", "llm", "cli", "bench"}),
    "zmq": frozenset({"transport"}),
    "transformers": frozenset({"models", "actors", "cluster", "llm", "cli", "bench", "training"}),
    "fastapi": frozenset({"cluster.routes", "cluster.serve"}),
    "pydantic": frozenset({"cluster.openai", "cluster.serve"}),
    "typer": frozenset({"cli", "bench", "flags"}),
    "rich": frozenset({"cli", "bench", "inspection", "progress", "training"}),
}

# Foreign packages that these units must do without: importing them has to stay cheap.
NEVER_IN: dict[str, frozenset[str]] = {
    "ssd_ray": frozenset({"torch", "numpy", "msgspec"}),
    "errors": frozenset({"torch", "numpy", "msgspec"}),
    "heap": frozenset({"torch", "numpy", "msgspec"}),
    "logs": frozenset({"torch", "numpy", "msgspec"}),
    "config": frozenset({"torch", "numpy", "msgspec"}),
    "wire": frozenset({"torch"}),
}

HEIGHT = {unit: height for height, units in enumerate(reversed(LAYERS)) for unit in units}


@dataclass(frozen=True)
class Import:
    """One imported module, as an absolute dotted name, and the line it stands on."""

    name: str
    line: int


def module_name(path: Path, root: Path) -> str:
    """``actors/target.py`` and ``ssd_ray/actors/target.py`` are both ``ssd_ray.actors.target``."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    if parts[0] != "ssd_ray":
        parts.insert(0, "ssd_ray")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit_of(module: str) -> str:
    """``ssd_ray.models.runner`` belongs to the unit ``models``."""
    inner = module.partition(".")[2]
    return inner if inner in HEIGHT else inner.partition(".")[0] or module


def imports_of(source: str) -> Iterator[Import | str]:
    """Every import of a module; a string describes one that cannot be resolved."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield f"line {node.lineno}: a relative import; write the full name"
        elif isinstance(node, ast.ImportFrom):
            # `from ssd_ray import wire` imports ssd_ray.wire, `from ssd_ray import LLM` the package's public name.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            submodules = [name for name in names if name.removeprefix("ssd_ray.") in HEIGHT]
            yield from (Import(name, node.lineno) for name in submodules)
            if len(submodules) < len(node.names):
                yield Import(node.module or "", node.lineno)


def inward(unit: str, imported: Import) -> str | None:
    """What is wrong with importing a module of ssd_ray, if anything."""
    other = unit_of(imported.name)
    if other not in HEIGHT:
        return f"line {imported.line}: {imported.name} has no row in LAYERS"
    if other != unit and HEIGHT[other] >= HEIGHT[unit]:
        return f"line {imported.line}: {unit} imports {imported.name}, which is not below it"
    return None


def outward(unit: str, imported: Import) -> str | None:
    """What is wrong with importing a foreign module, if anything."""
    package = imported.name.split(".")[0]
    if package in ("actors", "cluster"):
        return f"line {imported.line}: {package} is called ssd_ray.{package}"
    if package in ONLY_IN and unit not in ONLY_IN[package]:
        return f"line {imported.line}: {unit} imports {package}"
    if package in NEVER_IN.get(unit, ()):
        return f"line {imported.line}: {unit} imports {package}, which is slow to import"
    return None


def violations(module: str, source: str) -> list[str]:
    """Every breach of the tables in one module."""
    unit = unit_of(module)
    if unit not in HEIGHT:
        return [f"{module} has no row in LAYERS"]
    found = []
    for imported in imports_of(source):
        if isinstance(imported, str):
            found.append(imported)
        else:
            check = inward if imported.name.split(".")[0] == "ssd_ray" else outward
            found.append(check(unit, imported))
    return [problem for problem in found if problem]


def library_modules() -> dict[str, Path]:
    """Module name -> file. actors/ and cluster/ are read through their own folders, not through the links."""
    files = [path for folder in ("ssd_ray", "actors", "cluster") for path in (ROOT / folder).rglob("*.py")]
    own = [path for path in files if path == path.resolve()]
    return {module_name(path, ROOT): path for path in own}


MODULES = library_modules()


def test_every_package_is_seen():
    assert {"ssd_ray", "ssd_ray.actors", "ssd_ray.cluster", "ssd_ray.models"} <= MODULES.keys()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_downward(module):
    assert violations(module, MODULES[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("ssd_ray.models.runner", "import ray", "models imports ray"),
        ("ssd_ray.wire", "def f():\n    from ray import get", "wire imports ray"),
        ("ssd_ray.sampling.noise", "import ssd_ray.models.runner", "not below it"),
        ("ssd_ray.speculation.tree", "from ssd_ray.transport.channel import Channel", "not below it"),
        ("ssd_ray.speculation.tree", "from ssd_ray import transport", "not below it"),
        ("ssd_ray.speculation.tree", "from ssd_ray import LLM", "not below it"),
        ("ssd_ray.wire", "from ssd_ray.sampling import noise", "not below it"),
        ("ssd_ray.actors.target", "from ssd_ray.cluster.driver import Driver", "not below it"),
        ("ssd_ray.cluster.driver", "from ssd_ray.llm import LLM", "not below it"),
        ("ssd_ray.errors", "from ssd_ray.config import Config", "not below it"),
        ("ssd_ray.config", "if TYPE_CHECKING:\n    import torch", "slow to import"),
        ("ssd_ray.llm", "from actors.target import Target", "is called ssd_ray.actors"),
        ("ssd_ray.cluster.driver", "import cluster.refs", "is called ssd_ray.cluster"),
        ("ssd_ray.cluster.driver", "from ssd_ray.cluster.serve import build", "not below it"),
        ("ssd_ray.async_llm", "from ssd_ray.cluster.serve import build", "not below it"),
        ("ssd_ray.cluster.openai", "from ssd_ray.cluster import routes", "not below it"),
        ("ssd_ray.cluster.openai", "import fastapi", "cluster.openai imports fastapi"),
        ("ssd_ray.models.runner", "from ..actors import target", "a relative import"),
        ("ssd_ray.models.runner", "from . import slots", "a relative import"),
        ("ssd_ray.llm", "from ssd_ray.training.recipe import train_draft", "not below it"),
        ("ssd_ray.training.recipe", "import ray", "training imports ray"),
        ("ssd_ray.models.runner", "import ssd_ray.unheard_of", "has no row in LAYERS"),
        ("ssd_ray.unheard_of", "", "has no row in LAYERS"),
    ],
)
def test_a_breach_is_found(module, source, complaint):
    (problem,) = violations(module, source)
    assert complaint in problem


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ssd_ray.models.runner", "import torch\nfrom ssd_ray.models.slots import Slots\nfrom ssd_ray import wire"),
        ("ssd_ray.cluster.driver", "import ray\nfrom ssd_ray.actors.target import TargetActor"),
        (
            "ssd_ray.cluster.serve",
            "from ssd_ray.async_llm import AsyncLLM\nfrom ssd_ray.cluster.placement import Placer",
        ),
        ("ssd_ray.cli", "import ray\nfrom ssd_ray import LLM, bench\nfrom ssd_ray.cluster.serve import serving"),
        ("ssd_ray", "from ssd_ray.llm import LLM"),
    ],
)
def test_what_is_allowed_passes(module, source):
    assert violations(module, source) == []


def test_names_come_from_either_folder():
    root = Path("/checkout")
    assert module_name(root / "actors" / "target.py", root) == "ssd_ray.actors.target"
    assert module_name(root / "ssd_ray" / "models" / "__init__.py", root) == "ssd_ray.models"
    assert module_name(root / "ssd_ray" / "__init__.py", root) == "ssd_ray"


UNPICKLING = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
"""Modules whose reading runs what they read."""


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_is_pickled_but_by_ray(module):
    """Not by way of others either: torch.load is told to read tensors alone, numpy.load does so by itself."""
    source = MODULES[module].read_text(encoding="utf-8")
    names = {each.name for each in imports_of(source) if isinstance(each, Import)}
    parts = {part for name in names for part in name.split(".")}
    assert not parts & UNPICKLING
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    keywords = {call.lineno: {ast.unparse(each) for each in call.keywords} for call in calls}
    assert not [line for line, given in keywords.items() if "allow_pickle=True" in given]
    loads = [call.lineno for call in calls if ast.unparse(call.func) == "torch.load"]
    assert all("weights_only=True" in keywords[line] for line in loads)
