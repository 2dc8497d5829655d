#!/usr/bin/env python3
"""A library of ours exports every function of its header and no other symbol, and needs only the
standard library at run time.

usage: exports_test.py libsparkv.so sparkv.h
"""

import pathlib
import re
import subprocess
import sys

library, header = sys.argv[1:]


def output(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


with open(header, encoding="utf-8") as text:
    declared = set(re.findall(r"^SPARKV_API\b[^;(]*?(\w+)\(", text.read(), re.MULTILINE))
exported = {line.split()[-1] for line in
            output("nm", "-D", "--defined-only", library).splitlines()}
dynamic = output("readelf", "-d", library)
soname = re.search(r"\(SONAME\).*\[(.*)\]", dynamic).group(1)
needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
wanted = re.sub(r"(\.so\.\d+).*", r"\1", pathlib.Path(library).name)
standard = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libpthread.so.0",
            "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}

problems = [
    (not declared, "no function found in the header"),
    (declared - exported, f"declared, not exported: {sorted(declared - exported)}"),
    (exported - declared, f"exported, not declared: {sorted(exported - declared)}"),
    (soname != wanted, f"SONAME is {soname}, not {wanted}"),
    (needed - standard, f"needs more than the standard library: {sorted(needed - standard)}"),
]
for wrong, text in problems:
    if wrong:
        print(text)
sys.exit(any(wrong for wrong, _ in problems))
