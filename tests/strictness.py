"""The runtime type checker of the test suite: jaxtyping shapes and dtypes, checked by beartype on every call.

`jaxtyping.install_import_hook` would do it, but it decorates functions inside functions too, anew on each call of the
outer one: a fifth of the suite's time.  This one decorates a module's functions and its classes' methods, once.
"""

import ast
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import beartype
import jaxtyping
from beartype.roar import BeartypeDecorHintPep585DeprecationWarning

warnings.filterwarnings("ignore", category=BeartypeDecorHintPep585DeprecationWarning)

TYPED = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))


def check(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Checks the arguments and the result of a function, an int for a float allowed, as type checkers have it.

    Not a dataclass's fields: JAX rebuilds a typed leaf out of None, booleans and `object()` whenever it maps over a
    tree, so a leaf must take anything; factories and rules are where its arrays are checked.
    """
    return jaxtyping.jaxtyped(fn, typechecker=TYPED)


class Loader(importlib.machinery.SourceFileLoader):
    """Loads a module with `check` around each of its functions, and never from or into a bytecode file."""

    def path_stats(self, path: str) -> Any:
        raise OSError("decorated bytecode is kept nowhere")

    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> Any:  # type: ignore[override]
        tree = ast.parse(data, path)
        outer = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.Module)]
        inner = {id(node) for fn in ast.walk(tree) if isinstance(fn, ast.FunctionDef) for node in ast.walk(fn)}
        for owner in outer:
            for node in owner.body:
                if isinstance(node, ast.FunctionDef) and id(owner) not in inner:
                    # Last of the decorators, so that custom_vjp and the like are given the checked function.
                    node.decorator_list.append(ast.parse("__import__('strictness').check", mode="eval").body)
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True, optimize=_optimize)


class Finder(importlib.machinery.PathFinder):
    """Gives modules of `peft_jax` to `Loader`."""

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] != "peft_jax":
            return None
        for finder in sys.meta_path:
            found = None if finder is cls else finder.find_spec(fullname, path, target)
            if found is not None:
                if isinstance(found.loader, importlib.machinery.SourceFileLoader):
                    found.loader = Loader(found.loader.name, found.loader.path)
                return found
        return None


def install() -> None:
    """To be called before `peft_jax` is imported."""
    assert "peft_jax" not in sys.modules
    sys.meta_path.insert(0, Finder)
