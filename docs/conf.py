"""Sphinx: Markdown pages by hand, the API from docstrings.  Builds without network, and warnings are errors."""

import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import peft_jax

HERE = Path(__file__).parent
project, author, release = "peft_jax", "the peft_jax authors", peft_jax.__version__
project_copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "peft_jax"
default_role = "code"
exclude_patterns = ["_build"]
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True, "exclude-members": "trains"}
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
maximum_signature_line_length = 100


def write_api() -> None:
    """One page for each public module, in ``docs/api`` (not under version control): a new module needs no listing."""
    folder = HERE / "api"
    folder.mkdir(exist_ok=True)
    names = ["peft_jax", *(found.name for found in pkgutil.walk_packages(peft_jax.__path__, "peft_jax."))]
    names = [name for name in names if not re.search(r"\._", name)]
    for name in names:
        only_docstring = hasattr(importlib.import_module(name), "__path__")  # a package repeats what its modules define
        members = ":no-members:" if only_docstring else ":members:"
        page = f"# {name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n   {members}\n```\n"
        (folder / f"{name}.md").write_text(page)
    for stale in folder.glob("*.md"):
        if stale.stem not in {*names, "index"}:
            stale.unlink()
    (folder / "index.md").write_text("# API\n\n```{toctree}\n:maxdepth: 1\n\n" + "\n".join(names) + "\n```\n")


def as_rst(lines: list[str]) -> list[str]:
    """Our docstrings are plain text: equations, columns and signatures are indented or aligned, and stay as they are.

    Such paragraphs become literal blocks; in the others, what reStructuredText would take for markup is escaped.
    Google sections (Args, Raises, Returns) and doctests are left to their own parsers.
    """
    result: list[str] = []
    section = False
    for paragraph in re.split(r"\n[ \t]*\n", "\n".join(lines)):
        rows = paragraph.strip("\n").splitlines()
        if not rows or not any(row.strip() for row in rows):
            continue
        heading = re.match(r"(Args|Arguments|Raises|Returns|Yields):$", rows[0])
        section = bool(heading) or (section and rows[0].startswith(" "))
        if rows[0].lstrip().startswith(">>>"):
            result += [*rows, ""]
        elif section:
            result += [*escaped("\n".join(rows)).splitlines(), ""]
        elif any(row.startswith("  ") or re.search(r"\S {3,}\S", row) for row in rows):
            indent = min(len(row) - len(row.lstrip()) for row in rows)
            result += ["::", "", *("   " + row[indent:] for row in rows), ""]
        else:
            result += [*escaped("\n".join(rows)).splitlines(), ""]
    return result


def escaped(text: str) -> str:
    parts = re.split(r"(``.+?``|`[^`]+`)", text, flags=re.DOTALL)
    parts[::2] = [re.sub(r"([*|\\])|(_)(?=\W|$)", r"\\\g<0>", part) for part in parts[::2]]
    parts[2::2] = ["\\ " + part if re.match(r"\w", part) else part for part in parts[2::2]]  # `Tensor`s
    return "".join(parts)


def process(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    lines[:] = as_rst(lines)


def skip(app: Any, what: str, name: str, thing: Any, skipped: bool, options: Any) -> bool | None:
    """Docstrings that a class only inherits from `tuple`, or a dataclass writes for itself, say nothing."""
    return True if (getattr(thing, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app: Any) -> None:
    write_api()
    app.connect("autodoc-process-docstring", process, priority=100)
    app.connect("autodoc-skip-member", skip)
