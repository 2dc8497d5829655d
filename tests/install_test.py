#!/usr/bin/env python3
"""Installs into an empty prefix, moves it, and builds and runs a program against it twice: through
find_package and through pkg-config.

usage: install_test.py cmake build-tree c-compiler
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

cmake, build, compiler = sys.argv[1:]
program = Path(__file__).resolve().parent / "header_c_test.c"

PROJECT = f"""
cmake_minimum_required(VERSION 3.24)
project(consumer C)
find_package(sparkv 0.1 REQUIRED)
add_executable(consumer "{program}")
target_link_libraries(consumer PRIVATE sparkv::sparkv)
"""


def run(*command, **options):
    print("+", *command, flush=True)
    return subprocess.run([str(part) for part in command], check=True, **options)


with tempfile.TemporaryDirectory(prefix="sparkv install ") as folder:
    folder = Path(folder)
    run(cmake, "--install", build, "--prefix", folder / "first", stdout=subprocess.DEVNULL)
    # An absolute path that got into the package no longer exists now.
    prefix = folder / "prefix"
    shutil.move(folder / "first", prefix)

    (folder / "project").mkdir()
    (folder / "project/CMakeLists.txt").write_text(PROJECT, encoding="utf-8")
    run(cmake, "-S", folder / "project", "-B", folder / "tree", "-G", "Ninja",
        f"-DCMAKE_PREFIX_PATH={prefix}", f"-DCMAKE_C_COMPILER={compiler}")
    run(cmake, "--build", folder / "tree")
    run(folder / "tree/consumer")

    package = next(prefix.glob("**/sparkv.pc")).parent
    flags = run("pkg-config", "--cflags", "--libs", "sparkv", stdout=subprocess.PIPE, text=True,
                env={**os.environ, "PKG_CONFIG_PATH": str(package)}).stdout
    run(compiler, program, "-o", folder / "with-pkg-config", *shlex.split(flags))
    run(folder / "with-pkg-config",
        env={**os.environ, "LD_LIBRARY_PATH": str(next(prefix.glob("**/libsparkv.so")).parent)})
