#!/usr/bin/env python3
"""A decode step over packed rows may not cost more instructions, against dense f16 rows through our
own kernel, than it did, nor sequences in one stream, over packed rows or recent ones, more than in
streams of their own. Instructions are counted, not timed, so that a busy machine changes nothing.

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
# Four sequences in one stream: (preset, where their cells are, against a stream each at most). Of
# 256 tokens each, balanced has none packed, all in stages. More would take minutes to count.
SHARED = (("balanced", "unified", 1.25), ("tiers-5321", "interleaved", 1.37))


def count(program, preset, simd, sequences=1, streams="split"):
    """Instructions of a step, and what it finds packed."""
    done = subprocess.run(
        ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null",
         "--toggle-collect=*AttendSide::Step*", program, preset, simd, str(sequences), streams],
        capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{preset}, {simd}: exit code {done.returncode}\n{done.stderr}")
    collected = int(re.search(r"Collected : (\d+)", done.stderr)[1])
    if collected == 0:
        sys.exit(f"{preset}, {simd}: nothing was counted\n{done.stderr}")
    return collected, done.stdout.strip()


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
            dense[simd], _ = count(program, "exact", simd)
        own, packed = count(program, preset, simd)
        ratio = own / dense[simd]
        print(f"{simd}: {preset}, {packed}: "
              f"{ratio:.3f} of the instructions of exact, at most {most}")
        failed += ratio > most
    simd = "avx2" if " avx2 " in flags else "plain"
    for preset, streams, most in SHARED:
        shared, packed = count(program, preset, simd, 4, streams)
        ratio = shared / count(program, preset, simd, 4, "split")[0]
        print(f"{simd}: {preset}, four sequences {streams}, {packed}: "
              f"{ratio:.3f} of a stream each, at most {most}")
        failed += ratio > most
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
