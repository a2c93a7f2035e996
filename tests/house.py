"""How untyped the package is, and how often it does one thing: counts, as JSON.

    python -m tests.house [--files]

`untyped`: `dict[str, Any]`, `dict[str, object]`, `Mapping[str, Any]`, `Mapping[str, object]`, and uses of names that
stand for one of them. `unavailable`: files with that word. Then the files that lock, replace a file by renaming (a
new file that is moved into a bundle replaces none), ask the kernel to end with their parent, or check parsed TOML or
JSON field by field. `names`: public names that more than one module defines, less those that mean the same everywhere.
"""

from __future__ import annotations

import argparse
import ast
import collections
import json
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "sparsifiner_edge"
UNTYPED = re.compile(r"(?:dict|Mapping)\[str, (?:Any|object)\]")
ALIAS = re.compile(r"^(\w+)(?:: TypeAlias)? = (?:dict|Mapping)\[str, (?:Any|object)\]$", re.MULTILINE)
ONCE = {
    "lock": r"\bflock\(",
    "replace": r"\.replace\((?:place|target|path|folder / \w+)\)|\.rename\((?!folder / name)"
    r"|os\.(?:replace|rename)\(|\)\.renameat2",
    "parent_death": r"PDEATHSIG|prctl\(1, 9",
    "field_by_field": r"get_type_hints\(|type\(value\) is kind",
}

# One meaning, several modules: an operator in each of its implementations, what every command or package target has.
MIRRORED = {"reference", "torch", "torch_merge", "torch_landmarks", "select", "attention", "merge", "run"}
INTERFACES = {"command", "main", "write", "open_device", "MODULE"}


def public_names(text: str) -> set[str]:
    """Names that a module defines at its top level, without what it keeps to itself."""
    found: set[str] = set()
    for node in ast.parse(text).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return {name for name in found if not name.startswith("_")}


def names_in_two_senses(texts: dict[Path, str]) -> dict[str, list[str]]:
    """Public name to the modules that define it, where they are several and not one interface or operator."""
    defined: dict[str, list[Path]] = collections.defaultdict(list)
    for path, text in texts.items():
        for name in public_names(text):
            defined[name].append(path)
    return {
        name: [str(path.relative_to(PACKAGE)) for path in paths]
        for name, paths in sorted(defined.items())
        if len(paths) > 1
        and name not in INTERFACES
        and not all(path.is_relative_to(PACKAGE / "ops") and path.stem in MIRRORED for path in paths)
    }


def untyped(texts: dict[Path, str]) -> collections.Counter[Path]:
    """Uses per file; an alias counts where it is defined, and wherever its name stands after that."""
    found = collections.Counter({path: len(UNTYPED.findall(text)) for path, text in texts.items()})
    for path, text in texts.items():
        for name in ALIAS.findall(text):
            found[path] += len(re.findall(rf"\b{name}\b", text)) - 1
            for other, there in texts.items():
                if other != path and re.search(rf"import [^\n]*\b{name}\b", there):
                    found[other] += len(re.findall(rf"\b{name}\b", there)) - 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", action="store_true", help="say how many are in which file")
    given = parser.parse_args()
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
    found = untyped(texts)
    native = [path for end in ("*.cc", "*.h") for path in (PACKAGE.parent / "runtime").rglob(end)]
    counts: dict[str, object] = {
        "untyped": found.total(),
        "unavailable": sum("unavailable" in text for text in texts.values()),
        **{name: sum(bool(re.search(what, text)) for text in texts.values()) for name, what in ONCE.items()},
        "names": len(names_in_two_senses(texts)),
        "lines": sum(text.count("\n") for text in [*texts.values(), *(path.read_text("utf-8") for path in native)]),
    }
    if given.files:
        names = {str(path.relative_to(PACKAGE)): count for path, count in found.most_common() if count}
        places = {
            name: [str(path.relative_to(PACKAGE)) for path, text in texts.items() if re.search(what, text)]
            for name, what in ONCE.items()
        }
        counts["names_files"] = names_in_two_senses(texts)
        counts |= {"untyped_files": names, **{f"{name}_files": files for name, files in places.items()}}
    print(json.dumps(counts, indent=2))


if __name__ == "__main__":
    main()
