"""The package from outside: public names, what an import costs and touches, and who may import whom."""

from __future__ import annotations

import inspect
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import semipd
import semipd.errors

ROOT = Path(__file__).parent.parent
HEAVY = {"anyio", "gguf", "huggingface_hub", "jinja2", "numpy", "safetensors", "tokenizers", "torch", "tqdm", "triton"}


def run_python(code: str) -> str:
    """What `code` prints in a fresh interpreter."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


def test_all_lists_every_public_name_in_order() -> None:
    public = {
        name for name in dir(semipd) if not name.startswith("_") and not isinstance(getattr(semipd, name), ModuleType)
    }
    assert semipd.__all__ == sorted({*public, "__version__"})


def test_every_error_is_public() -> None:
    errors = {name for name, value in vars(semipd.errors).items() if inspect.isclass(value)}
    assert errors <= set(semipd.__all__)


@pytest.mark.parametrize("name", [name for name in semipd.__all__ if name != "__version__"])
def test_public_functions_classes_and_their_methods_are_documented(name: str) -> None:
    value = getattr(semipd, name)
    if inspect.isfunction(value):
        assert value.__doc__
        return
    assert inspect.isclass(value)
    # A dataclass without a docstring is given its signature as one.
    assert value.__doc__ and not value.__doc__.startswith(f"{name}(")
    for attribute, member in vars(value).items():
        if not attribute.startswith("_") and (inspect.isroutine(member) or isinstance(member, property)):
            assert inspect.getdoc(member), f"{name}.{attribute} has no docstring"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'semipd' has no attribute 'Motor'"):
        _ = semipd.Motor


def test_import_is_quick() -> None:
    code = "import time; start = time.perf_counter(); import semipd; print(time.perf_counter() - start)"
    assert min(float(run_python(code)) for _ in range(3)) < 0.3


def test_import_loads_no_library() -> None:
    loaded = run_python("import sys, semipd; print(*{name.partition('.')[0] for name in sys.modules})").split()
    assert not HEAVY & set(loaded)


def test_naming_the_engine_loads_no_tensor_library() -> None:
    loaded = run_python("import sys, semipd; semipd.Engine; print(*sys.modules)").split()
    assert "semipd.engine" in loaded
    assert not {"numpy", "torch", "triton"} & set(loaded)


def test_import_starts_nothing_and_changes_no_state_of_the_process() -> None:
    state = "(signals(), threading.enumerate(), sys.getswitchinterval(), logging.root.handlers[:], dict(os.environ))"
    code = f"""
import logging, os, signal, sys, threading
def signals(): return [signal.getsignal(s) for s in sorted(signal.valid_signals())]
before = {state}
import semipd
semipd.Engine
after = {state}
print(before == after)
"""
    assert run_python(code) == "True"


def test_modules_import_only_what_their_layer_allows() -> None:
    # In a process of its own, as it disables the loggers of the one that it runs in.
    run_python("""
import sys
from importlinter.cli import lint_imports
sys.exit(lint_imports(config_filename="pyproject.toml", no_cache=True, no_logo=True))
""")


def test_every_module_has_its_layer() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contract = config["tool"]["importlinter"]["contracts"][0]
    layers = [name.strip() for line in contract["layers"] for name in line.split("|")]
    modules = [module.name for module in pkgutil.walk_packages(semipd.__path__, "semipd.") if not module.ispkg]
    homeless = [name for name in modules if not any(f"{name}.".startswith(f"{layer}.") for layer in layers)]
    assert not homeless, "give them a line in pyproject.toml, [tool.importlinter]"
