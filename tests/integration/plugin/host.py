"""Runs unmodified llama.cpp programs with and without the plugin, for the tests beside this file.

CMake says where things are: SPARKV_BIN_DIR (llama.cpp's programs), SPARKV_PLUGIN, SPARKV_MODEL (a
GGUF) and SPARKV_WORK_DIR (a folder that lives as long as the build tree).
"""
import fcntl
import http.client
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest

SKIPPED = 77  # ctest's SKIP_RETURN_CODE

BIN_DIR = pathlib.Path(os.environ["SPARKV_BIN_DIR"])
PLUGIN = pathlib.Path(os.environ["SPARKV_PLUGIN"])
MODEL = pathlib.Path(os.environ["SPARKV_MODEL"])
WORK_DIR = pathlib.Path(os.environ["SPARKV_WORK_DIR"])
DOCUMENT = (pathlib.Path(__file__).resolve().parents[3] / "tools/demo/document.txt").read_text()
PROGRAMS = ("llama-bench", "llama-cli", "llama-completion", "llama-perplexity", "llama-quantize",
            "llama-server")
WITH_PLUGIN = ["-dev", "SPARKV", "-ngl", "99"]

CPU_FLAGS = re.search(r"^flags.*", pathlib.Path("/proc/cpuinfo").read_text(), re.M)[0].split()


def main():
    """unittest.main, or one line and SKIPPED when llama.cpp was not built at all."""
    missing = [name for name in PROGRAMS if not (BIN_DIR / name).exists()]
    if missing == list(PROGRAMS):
        skip(f"{BIN_DIR} has no llama.cpp programs: run 'make build'")
    if missing:
        sys.exit(f"{BIN_DIR} lacks {', '.join(missing)}")
    for file in (PLUGIN, MODEL):
        if not file.exists():
            sys.exit(f"{file} does not exist: run 'make build'")
    unittest.main(verbosity=2)


def skip(reason):
    print("skipped:", reason)
    sys.exit(SKIPPED)


def f32_model(model=MODEL):
    """The model with F32 weights, made once: with quantised weights llama.cpp rounds activations
    too, and then equally good runs differ."""
    WORK_DIR.mkdir(parents=True, exist_ok=True)
    target = WORK_DIR / (model.stem + "-f32.gguf")
    with open(WORK_DIR / "f32.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists() or target.stat().st_mtime < model.stat().st_mtime:
            partial = target.with_suffix(".partial")
            subprocess.run(
                [BIN_DIR / "llama-quantize", "--allow-requantize", model, partial, "F32"],
                check=True, capture_output=True, timeout=120)
            partial.rename(target)
    return target


def environment(plugin, **variables):
    """Ours without what would steer llama.cpp or the plugin, plus `variables`."""
    env = {name: value for name, value in os.environ.items()
           if not name.startswith(("SPARKV_", "LLAMA_", "GGML_"))}
    # llama.cpp's threads spin otherwise, which on a shared machine takes ten times as long.
    env["OMP_WAIT_POLICY"] = "passive"
    if plugin:
        env["GGML_BACKEND_PATH"] = str(PLUGIN)
    return env | variables


class Result:
    """What a program that ended left behind."""

    def __init__(self, args, code, out, err, peak_rss, stats):
        self.args = args
        self.code = code  # negative: the signal that killed it
        self.out = out
        self.err = err
        self.peak_rss = peak_rss  # bytes
        self.stats = stats  # SPARKV_STATS, or None when it was not written

    def ours(self):
        """The lines of the plugin."""
        return [line for line in self.err.splitlines() if line.startswith("sparkv: ")]

    def __str__(self):
        command = " ".join(map(str, self.args))
        return f"{command}\nended with {self.code}\n{self.out}\n{self.err[-3000:]}"


def run(program, *args, plugin=True, device=WITH_PLUGIN, timeout=120, before=None, **variables):
    """Runs to the end. `variables` are environment variables, `before` runs in the child."""
    args = [str(BIN_DIR / program), *(device if plugin else []), *map(str, args)]
    with tempfile.TemporaryDirectory() as folder:
        stats = pathlib.Path(folder) / "stats.json"
        if plugin:
            variables = {"SPARKV_STATS": str(stats)} | variables
        with open(folder + "/out", "wb+") as out, open(folder + "/err", "wb+") as err:
            process = subprocess.Popen(args, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                                       env=environment(plugin, **variables), preexec_fn=before)
            killer = threading.Timer(timeout, process.kill)
            killer.start()
            _, status, usage = os.wait4(process.pid, 0)
            killer.cancel()
            process.returncode = os.waitstatus_to_exitcode(status)
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))
        return Result(args, process.returncode, *texts, usage.ru_maxrss * 1024,
                      json.loads(stats.read_text()) if stats.exists() else None)


class Server:
    """One llama-server on a free loopback port. Use with `with`."""

    def __init__(self, model, *args, plugin=True, **variables):
        self.folder = tempfile.TemporaryDirectory()
        path = pathlib.Path(self.folder.name)
        self.stats_file, self.log_file = path / "stats.json", path / "log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        if plugin:
            variables = {"SPARKV_STATS": str(self.stats_file)} | variables
            args = [*args, *WITH_PLUGIN]
        with open(self.log_file, "wb") as log:
            self.process = subprocess.Popen(
                [BIN_DIR / "llama-server", "-m", model, "--host", "127.0.0.1",
                 "--port", str(self.port), "-t", "2", *map(str, args)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=environment(plugin, **variables))

    def __enter__(self):
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.folder.cleanup()

    def _wait_until_ready(self):
        for _ in range(600):
            if self.process.poll() is not None:
                raise RuntimeError(f"llama-server ended early\n{self.log()}")
            try:
                if self.get("/health").get("status") == "ok":
                    return
            except OSError:
                pass
            time.sleep(0.1)
        raise RuntimeError("llama-server is not ready after a minute\n" + self.log())

    def log(self):
        return self.log_file.read_text(errors="replace")

    def ours(self):
        return [line for line in self.log().splitlines() if line.startswith("sparkv: ")]

    def rss(self):
        """Resident bytes now."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+([0-9]+) kB", status)[1]) * 1024

    def stop(self):
        """Ctrl-C. Returns the exit code and SPARKV_STATS."""
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(timeout=60)
        return code, json.loads(self.stats_file.read_text()) if self.stats_file.exists() else None

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=180)

    def get(self, path):
        return self._ask("GET", path, None)

    def post(self, path, **body):
        return self._ask("POST", path, json.dumps(body))

    def _ask(self, method, path, body):
        connection = self.connect()
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = json.loads(answer.read())
            if answer.status != 200 and path != "/health":
                raise RuntimeError(f"{method} {path}: {answer.status} {content}")
            return content
        finally:
            connection.close()

    def complete(self, prompt, n=16, **options):
        """The greedy continuation of `prompt`."""
        options = {"temperature": 0, "ignore_eos": True, "cache_prompt": True} | options
        return self.post("/completion", prompt=prompt, n_predict=n, **options)["content"]


def together(*calls):
    """Results of the calls, all running at once; the first error is raised."""
    results = [None] * len(calls)

    def call(i):
        try:
            results[i] = calls[i]()
        except Exception as error:  # raised again by the caller
            results[i] = error

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results
