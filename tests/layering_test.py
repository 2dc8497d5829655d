#!/usr/bin/env python3
"""Reads every #include of ours and fails on an arrow that points up.

Bottom to top: include/sparkv, base, config, method, format, ops, baselines, cache, capi. Adapters,
tools and the reference have shorter lists of their own; tests and bench may see all, and nobody
sees them.
"""

import re
import sys
import tempfile
from pathlib import Path

BELOW = {
    "include": (),
    "base": ("include",),
    "config": ("include", "base"),
    "method": ("include", "base", "config"),
    "format": ("include", "base", "config", "method"),
    "ops": ("include", "base", "config", "method", "format"),
    "baselines": ("include", "base", "config", "method", "format", "ops"),
    "cache": ("include", "base", "config", "method", "format", "ops", "baselines"),
    "capi": ("include", "base", "config", "method", "format", "ops", "cache"),
    "reference": ("include", "base"),
    "adapters": ("include",),
    "tools": ("include",),
}
FREE = ("tests", "bench")
SOURCES = {".h", ".hpp", ".cuh", ".inc", ".c", ".cc", ".cpp", ".cu"}


def module_of(path):
    """"base" for src/base/half.h, "tools" for tools/sparkv/main.cc."""
    return path.parts[1] if path.parts[0] == "src" and len(path.parts) > 2 else path.parts[0]


def resolve(root, source, name):
    """The file of ours that #include "name" in `source` means, relative to root, or None."""
    for folder in (source.parent, Path("src"), Path("include"), Path(".")):
        path = (root / folder / name).resolve()
        if path.is_file() and path.is_relative_to(root):
            return path.relative_to(root)
    # A file that is not there is still an arrow when its first folder is a module.
    first = Path(name).parts[0]
    return Path("src", name) if first in BELOW and "/" in name else None


def problems(root):
    found, files = [], 0
    for top in ("include", "src", "adapters", "tools", *FREE):
        for file in sorted((root / top).rglob("*")):
            if file.suffix not in SOURCES:
                continue
            files += 1
            source = file.relative_to(root)
            module = module_of(source)
            if module not in BELOW and module not in FREE:
                found.append(f"{source}: '{module}' has no place in the order of layering_test.py")
                continue
            text = file.read_text(encoding="utf-8")
            for match in re.finditer(r'^[ \t]*#[ \t]*include[ \t]*["<]([^">]+)[">]', text, re.M):
                target = resolve(root, source, match.group(1))
                if target is None or module in FREE or module_of(target) == module:
                    continue
                if module_of(target) not in BELOW[module]:
                    line = text.count("\n", 0, match.start()) + 1
                    found.append(f"{source}:{line}: {module} may not include {target}")
    if not files:
        found.append(f"{root}: no source file found")
    return found


def self_test():
    """Each arrow that points up is found, each that points down is not."""
    good = {
        "include/sparkv/sparkv.h": "#include <stdint.h>\n",
        "src/base/half.h": '#include "sparkv/sparkv.h"\n',
        "src/format/row.h": '#include "base/half.h"\n',
        "src/cache/cache.cc": '#include "cache/cache.h"\n#include "format/row.h"\n#include <map>\n',
        "src/cache/cache.h": "",
        "src/reference/reference.h": '#include "base/half.h"\n',
        "adapters/ggml/p.cc": '#include <sparkv/sparkv.h>\n#include "ggml.h"\n#include "p.h"\n',
        "adapters/ggml/p.h": "",
        "tests/unit/t.cc": '#include "cache/cache.h"\n#include "reference/reference.h"\n',
    }
    bad = {
        "src/base/up.h": '#include "format/row.h"\n',
        "src/base/relative.h": '#include "../cache/cache.h"\n',
        "src/base/absent.h": '#  include "ops/not_there.h"\n',
        "src/config/sibling.h": '#include "method/not_there.h"\n',
        "include/sparkv/private.h": '#include "base/half.h"\n',
        "src/cache/oracle.cc": '#include "reference/reference.h"\n',
        "src/reference/cheat.cc": '#include "format/row.h"\n',
        "adapters/ggml/private.cc": '#include "cache/cache.h"\n',
        "tools/sparkv/deep.cc": '#include "../../src/base/half.h"\n',
        "src/capi/test.cc": '#include "tests/unit/t.cc"\n',
        "src/newcomer/a.h": "",
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()

        def write(files):
            for name, text in files.items():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_text(text, encoding="utf-8")

        write(good)
        wrong = [f"self-test: not wrong, but found: {text}" for text in problems(root)]
        write(bad)
        found = problems(root)
        return wrong + [f"self-test: {name} was not found"
                        for name in bad if not any(text.startswith(name) for text in found)]


if __name__ == "__main__":
    trouble = self_test() + problems(Path(__file__).resolve().parent.parent)
    print("\n".join(trouble) or "all includes point down")
    sys.exit(bool(trouble))
