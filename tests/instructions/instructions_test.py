#!/usr/bin/env python3
"""A decode step over packed rows may not cost more instructions, against dense f16 rows through our
own kernel, than it did. Instructions are counted, not timed, so that a busy machine changes nothing.

    instructions_test.py STEPS_PROGRAM
"""
import pathlib
import re
import shutil
import subprocess
import sys

SKIP = 77
# Measured with GCC 12, and a tenth for other compilers: (instruction set, preset, ratio at most).
BOUNDS = (("avx2", "spark-0.5-i5", 1.94), ("plain", "spark-0.5-i5", 1.19))


def count(program, preset, simd, steps):
    """Instructions of a whole run."""
    done = subprocess.run(
        ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", program, preset, simd,
         str(steps)], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{preset}, {simd}: exit code {done.returncode}\n{done.stderr}")
    return int(re.search(r"Collected : (\d+)", done.stderr)[1])


def per_step(program, preset, simd):
    steps = 4
    return (count(program, preset, simd, steps) - count(program, preset, simd, 0)) / steps


def main():
    program = sys.argv[1]
    if shutil.which("valgrind") is None:
        print("skipped: valgrind is not installed")
        return SKIP
    flags = pathlib.Path("/proc/cpuinfo").read_text()
    failed, dense = 0, {}
    for simd, preset, most in BOUNDS:
        if simd == "avx2" and " avx2 " not in flags:
            print(f"skipped: {simd}: not on this CPU")
            continue
        if simd not in dense:
            dense[simd] = per_step(program, "exact", simd)
        ratio = per_step(program, preset, simd) / dense[simd]
        print(f"{simd}: {preset} takes {ratio:.3f} of the instructions of exact, at most {most}")
        failed += ratio > most
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
