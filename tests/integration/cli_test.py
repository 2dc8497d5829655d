#!/usr/bin/env python3
"""The command `sparkv`, with stand-ins for the llama.cpp programs that tell how they were called.

usage: cli_test.py path/to/sparkv
"""

import json
import os
import pathlib
import shlex
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest
import xml.etree.ElementTree

SPARKV = sys.argv.pop(1)

# One program under six names. It writes its arguments and environment to $CALLS and answers as the
# real one would.
STAND_IN = r"""#!%s
import collections, http.server, json, os, pathlib, re, signal, sys, time
name, args = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
if args[-1:] == ["--help"]:
    if "--bogus" in args:
        sys.stderr.write("warn: nothing\nerror: invalid argument: --bogus\n\nusage:\n")
    sys.exit("--bogus" in args)
env = {k: v for k, v in os.environ.items() if k.startswith(("SPARKV_", "GGML_", "OMP_"))}
def tell(call):
    with open(os.environ["CALLS"], "a") as calls:
        calls.write(json.dumps(call) + "\n")
tell({"name": name, "args": args, "env": env, "pid": os.getpid()})
if name == "llama-perplexity" and "OTHER_RUN" in os.environ:
    so_far = json.load(open(os.environ["OTHER_RUN"]))
    so_far["results"]["of another run"] = {}
    json.dump(so_far, open(os.environ["OTHER_RUN"], "w"))
def solve(text):
    # The answer to the last question, found in the text by other means than the generator's.
    text, _, question = text.partition("\n\nQuestion: ")
    if asked := re.match(r"What is (the \w+ of the [a-z ]+)\?", question):
        (found,) = re.findall(asked[1].capitalize() + r" is (\d{4})\.", text)
    elif asked := re.match(r"What is the numeric value of VAR (\w+)\?", question):
        values, found = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text)), asked[1]
        while found in values: found = values[found]
    elif asked := re.match(r"Which word occurs most often in list (\d+)\?", question):
        words = re.search(r"List " + asked[1] + r": ([^.]*)\.", text)[1].split()
        (found, most), (_, next) = collections.Counter(words).most_common(2)
        assert most >= 2 * next
    else:
        return ""
    return found
def value(flag):
    return args[len(args) - 1 - args[::-1].index(flag) + 1]
packed = "SPARKV" in args
if "SPARKV_CALIBRATE" in env:
    for i, part in enumerate(os.environ["PARTS"].split()):
        suffix = ".%%d" %% i if i else ""
        open(env["SPARKV_CALIBRATE"] + suffix, "wb").write(bytes.fromhex(part))
if "SPARKV_STATS" in env:
    stats = {"bits_per_element": 4.5, "keys_bits_per_element": 4.6,
             "values_bits_per_element": 4.4, "resident_bytes": 1000,
             "peak_bytes": 1500, "config": "made up"}
    if env.get("SPARKV_ERRORS") == "1":
        one = lambda layer: {"errors": [{"layer": layer, "keys": [.25, .5], "values": [.1, .2]}]}
        stats["caches"] = [one(1), {}, one(0)]
    json.dump(stats, open(env["SPARKV_STATS"], "w"))
if "SPARKV_SALIENCY" in env:
    picture, layer, head = env["SPARKV_SALIENCY"].rsplit(":", 2)
    json.dump({"layer": int(layer), "head": int(head), "head_dim": 8, "tokens": 600,
               "kept": ["ff"] * 600, "saliency": ["00" * 8] * 600}, open(picture, "w"))
if os.environ.get("FAIL", "--fail") in args:
    sys.stderr.write("stand-in: something went wrong\n")
    sys.exit(7)
if "--die" in args:
    os.kill(os.getpid(), signal.SIGKILL)
if "--wait" in args:
    def interrupted(*_):
        print("interrupted", flush=True)
        sys.exit(0)
    signal.signal(signal.SIGINT, interrupted)
    print("ready", flush=True)
    time.sleep(30)
if name == "llama-bench":
    speed = 20.0 if packed else 10.0
    print(json.dumps([{"n_prompt": 0, "n_gen": 8, "n_depth": d, "avg_ts": speed,
                       "model_filename": "m", "model_type": "t", "n_threads": 2, "n_batch": 512,
                       "n_ubatch": 128, "build_commit": "c"} for d in (0, 64)]))
elif name == "llama-perplexity":
    if "--kl-divergence" not in args:
        open(value("--kl-divergence-base"), "w").write("base")
        print("[1]20.0,")
    else:
        exact = value("-ctk") == "f32" if "-ctk" in args else False
        if os.environ.get("NO_LAYERS", "none") in env.get("SPARKV_LAYERS", "").split("=")[0]:
            sys.exit("stand-in: no such layers")
        if os.environ.get("REFUSE", "-") in env.get("SPARKV_PROTECT", ""):
            sys.exit("stand-in: the plugin refuses")
        settings = env.get("SPARKV_PRESET", "") + " " + env.get("SPARKV_PROTECT", "")
        broken = packed and re.search(os.environ.get("BREAKS", "^$"), settings)
        few = re.match(r"(\d+)-?\d*=", env.get("SPARKV_LAYERS", ""))
        kl = (0.1 * (1 + int(few[1])) if few
              else float(os.environ.get("KL", "0.5")) if broken else 0.005 if packed
              else 0.0 if value("-fa") == "off"
              else float(os.environ.get("FLOOR", "0.0002")) if exact else 0.001)
        print("chunk header\n   1  20.1 +- 1\n\nMean PPL(Q)  :  20.5 +- 0.1\n"
              "Mean PPL(Q)-PPL(base) : 0.5\nMean PPL(Q)/PPL(base)   :  1.025 +- 0.1\n"
              "Mean    KLD:   %%f +- 0.1\n99.0%%%%   KLD:   0.07\n"
              "Median  KLD:   0.002\nMedian  dp:  0.3%%%%\n"
              "Same top p: %%s +- 0.1 %%%%" %% (kl, os.environ.get("TOP", "96.5") if packed else "96.5"))
elif name == "llama-quantize":
    open(args[2], "wb").write(open(args[1], "rb").read())
    sys.exit("no space left" if "DISK_FULL" in os.environ else 0)
elif name == "llama-server" and "--port" in args:
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_): pass
        def reply(self, body):
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        def do_GET(self): self.reply({"status": "ok"})
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/tokenize":
                return self.reply({"tokens": [ord(c) for c in body["content"]]})
            body["prompt"] = "".join(map(chr, body["prompt"]))
            tell({"name": self.path, **body})
            if "SERVER_DIES" in os.environ:
                os.kill(os.getpid(), signal.SIGKILL)
            answer = solve(body["prompt"])
            self.reply({"content": " x0" + answer if packed
                        else ' "' + answer.capitalize() + '".\n\nQuestion 2',
                        "timings": {} if packed else {
                            "prompt_n": 50 if answer else 100, "prompt_ms": 500.0,
                            "predicted_n": 5 if answer else 1, "predicted_ms": 80.0}})
    http.server.HTTPServer(("127.0.0.1", int(value("--port"))), Handler).serve_forever()
else:
    print("Paris. [end of text]")
""" % sys.executable


def gguf(pairs, magic=b"GGUF", version=3, tensors=0, count=None):
    """A GGUF file without weights; values: str, int (u32), list of int (i32), list of str."""

    def text(s):
        return struct.pack("<Q", len(s)) + s.encode()

    out = magic + struct.pack("<IQQ", version, tensors, len(pairs) if count is None else count)
    for key, value in pairs:
        out += text(key)
        if isinstance(value, str):
            out += struct.pack("<I", 8) + text(value)
        elif isinstance(value, int):
            out += struct.pack("<II", 4, value)
        elif value and isinstance(value[0], str):
            out += struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
        else:
            out += struct.pack("<IIQ", 9, 5, len(value)) + struct.pack("<%di" % len(value), *value)
    return out


def calibration(layers, model="", sensitivity=""):
    """Energies of 1; layers: (number, KV heads, key channels)."""
    rest = model.encode().ljust(128, b"\0") + sensitivity.encode().ljust(512, b"\0")
    rest += struct.pack("<II", len(layers), 0)
    for number, heads, dim in layers:
        rest += struct.pack("<iiiI", number, heads, dim, 0)
        rest += struct.pack("<%df" % (2 * heads * dim), *[1.0] * (2 * heads * dim))
    checksum = 0xCBF29CE484222325
    for byte in rest:
        checksum = (checksum ^ byte) * 0x100000001B3 & (1 << 64) - 1
    return b"sparkvc1" + struct.pack("<Q", checksum) + rest


SMALL = [
    ("general.architecture", "llama"),
    ("general.file_type", 0),
    ("llama.block_count", 4),
    ("llama.embedding_length", 576),
    ("llama.context_length", 8192),
    ("llama.attention.head_count", 9),
    ("llama.attention.head_count_kv", 3),
    ("tokenizer.ggml.tokens", ["a", "bc", "def"]),
]


GEMMA = [
    ("general.architecture", "gemma3"),
    ("gemma3.block_count", 6),
    ("gemma3.embedding_length", 640),
    ("gemma3.attention.head_count", 4),
    ("gemma3.attention.head_count_kv", [1, 1, 1, 1, 2, 1]),
    ("gemma3.attention.key_length", 256),
    ("gemma3.attention.value_length", 256),
    ("gemma3.attention.sliding_window", 512),
]


def changed(key, value):
    return [(k, value if k == key else v) for k, v in SMALL]


class Command(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.programs = self.folder / "programs"
        self.programs.mkdir()
        (self.programs / "stand_in").write_text(STAND_IN)
        (self.programs / "stand_in").chmod(0o755)
        for name in ("completion", "cli", "server", "bench", "perplexity", "quantize"):
            (self.programs / ("llama-" + name)).symlink_to("stand_in")
        self.plugin = self.folder / "libggml-sparkv.so"
        self.plugin.write_text("")
        self.model = self.write("model.gguf", gguf(SMALL))
        self.environment = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("SPARKV_", "LLAMA_", "GGML_", "OMP_"))
        }
        self.environment.update(
            SPARKV_LLAMA_BIN=str(self.programs),
            SPARKV_PLUGIN=str(self.plugin),
            CALLS=str(self.folder / "calls"),
            XDG_CACHE_HOME=str(self.folder / "cache"),
        )

    def write(self, name, data):
        path = self.folder / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return str(path)

    def run_sparkv(self, *args, **environment):
        return subprocess.run(
            [SPARKV, *map(str, args)],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=120,
        )

    def calls(self):
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def refuses(self, code, words, *args, **environment):
        done = self.run_sparkv(*args, **environment)
        self.assertEqual(done.returncode, code, done)
        self.assertEqual(done.stdout, "")
        self.assertEqual(len(done.stderr.strip().splitlines()), 1, done.stderr)
        for word in words:
            self.assertIn(word, done.stderr)

    def succeeds(self, *args, **environment):
        done = self.run_sparkv(*args, **environment)
        self.assertEqual(done.returncode, 0, done)
        return done.stdout

    def test_every_sub_command_explains_itself_with_examples(self):
        names = ["run", "serve", "bench", "inspect", "fit", "check", "calibrate"]
        names += ["eval", "report"]
        for command in ([], *([name] for name in names)):
            text = self.succeeds(*command, "--help")
            self.assertIn("Examples", text)
            self.assertIn("sparkv " + command[0] if command else "sparkv run", text)

    def test_it_tells_its_version(self):
        self.assertRegex(self.succeeds("--version"), r"^sparkv \d+\.\d+\.\d+")

    def test_wrong_usage_is_one_line_and_code_two(self):
        for words, args in (
            (["--kv-ratio", "2", "[0, 1]"], ["run", "-m", self.model, "--kv-ratio", "2"]),
            (["--kv-ratio", "nan"], ["run", "-m", self.model, "--kv-ratio=nan"]),
            (["--kv-preset", "sparse"], ["serve", "-m", self.model, "--kv-preset", "sparse"]),
            (["--kv-sinks", "-1"], ["inspect", "-m", self.model, "--kv-sinks=-1"]),
            (["--kv-layers", "preset", "\"x\""], ["inspect", "-m", self.model, "--kv-layers=2=x"]),
            (["--kv-protect", "mid:1"], ["inspect", "-m", self.model, "--kv-protect=mid:1"]),
            (["--kv-evict", "names no tokens"], ["eval", "-m", self.model, "--kv-preset=exact+tova"]),
            (["--kv-colour"], ["run", "-m", self.model, "--kv-colour", "red"]),
            (["--kv-preset"], ["bench", "-m", self.model, "--kv-preset", "exact,,exact"]),
            (["--kv-preset", "'q8_0'"], ["check", "-m", self.model, "--kv-preset", "q8_0"]),
            (["--kv-preset"], ["check", "-m", self.model, "--kv-preset", "exact,spark-0.8"]),
            (["--kv-protect", "mid"], ["check", "-m", self.model, "--kv-protect", "mid:1"]),
            (["--ctx-size"], ["check", "-m", self.model, "--ctx-size", "512"]),
            (["--chunks", "0"], ["eval", "-m", self.model, "--chunks", "0"]),
            (["--ask", "during"], ["eval", "-m", self.model, "--ask", "during"]),
            (["--baselines", "q9_9"], ["eval", "-m", self.model, "--baselines", "q9_9"]),
            (["'q8_0/q9_9'"], ["eval", "-m", self.model, "--baselines", "f16,q8_0/q9_9"]),
            (["'kivi-3'", "kivi-2"], ["eval", "-m", self.model, "--baselines", "f16,kivi-3"]),
            (["'kivi-2'"], ["bench", "-m", self.model, "--baselines", "kivi-2"]),
            (["'q8_0/'"], ["bench", "-m", self.model, "--baselines", "q8_0/"]),
            (["-m"], ["run", "-p", "hello"]),
            (["--json"], ["run", "-m", self.model, "--json"]),
            (["--bogus"], ["bench", "--bogus"]),
            (["llama-completion", "--bogus"], ["run", "-m", self.model, "-p", "x", "--bogus"]),
            (["llama-server", "--bogus"], ["serve", "-m", self.model, "--bogus"]),
            (["-o", "picture.png"], ["inspect", "--saliency", self.model, "-o", "picture.png"]),
            (
                ["--layer", "99", "0..3"],
                ["inspect", "-m", self.model, "--dump-saliency", "-p", "x", "--layer", "99"],
            ),
            (
                ["--head", "3", "0..2"],
                ["inspect", "-m", self.model, "--dump-saliency", "-p", "x", "--head", "3"],
            ),
            (["--groups", "99"], ["calibrate", "-m", self.model, "--groups", "99"]),
            (["--file", "/no/text"], ["calibrate", "-m", self.model, "-f", "/no/text"]),
            (
                ["--kv-calibration", "/no/file"],
                ["run", "-m", self.model, "-p", "x", "--kv-calibration", "/no/file"],
            ),
            (["--memory"], ["fit", "-m", self.model]),
            (["--kv-preset", "sparse"], ["fit", "--memory", "1GiB", "--kv-preset", "sparse"]),
            (["--completion", "tcsh"], ["--completion", "tcsh"]),
            (["sub-command"], []),
        ):
            with self.subTest(args=args):
                self.refuses(2, words, *args)

    def test_what_is_missing_is_named_with_its_path(self):
        self.refuses(1, ["/no/model.gguf"], "run", "-m", "/no/model.gguf", "-p", "x")
        self.refuses(1, ["/no/model.gguf"], "inspect", "-m", "/no/model.gguf")
        self.refuses(1, ["/no/model.gguf"], "fit", "-m", "/no/model.gguf", "--memory", "1GiB")
        self.refuses(
            1, ["/no/plugin.so"], "run", "-m", self.model, "-p", "x", SPARKV_PLUGIN="/no/plugin.so"
        )
        self.refuses(
            1,
            ["/no/programs/llama-server"],
            "serve",
            "-m",
            self.model,
            SPARKV_LLAMA_BIN="/no/programs",
        )
        self.refuses(1, ["/no/model.gguf"], "check", "-m", "/no/model.gguf")
        self.refuses(1, ["/no/model.gguf"], "calibrate", "-m", "/no/model.gguf")
        self.refuses(1, ["/no/text.txt"], "eval", "-m", self.model, "-f", "/no/text.txt")

    def test_run_gives_unknown_options_to_the_program_unchanged_and_in_order(self):
        words = [
            "-m",
            self.model,
            "-ngl",
            "7",
            "-fa",
            "auto",
            "--temp",
            "0",
            "-n",
            "3",
            "-p",
            "two words",
            "--kv-unified",
        ]
        self.assertIn(
            "Paris",
            self.succeeds("run", *words, "--kv-ratio", "0.25", "--", "--json", "--kv-preset"),
        )
        (call,) = self.calls()
        self.assertEqual(call["name"], "llama-completion")
        self.assertEqual(call["args"][-len(words) - 2 :], words + ["--json", "--kv-preset"])

    def test_run_hands_the_plugin_its_settings_and_nothing_it_does_not_know(self):
        self.succeeds(
            "run",
            "-m",
            self.model,
            "-p",
            "x",
            "--kv-preset",
            "spark-0.8",
            "--kv-sinks=8",
            SPARKV_WINDOW="64",
            SPARKV_SINKS="2",
        )
        (call,) = self.calls()
        self.assertEqual(
            call["env"],
            {
                "GGML_BACKEND_PATH": str(self.plugin),
                "SPARKV_PRESET": "spark-0.8",
                "SPARKV_SINKS": "8",
                "SPARKV_WINDOW": "64",
                "OMP_WAIT_POLICY": "passive",
            },
        )
        flags = call["args"]
        self.assertEqual(flags[flags.index("-dev") + 1], "SPARKV")
        self.assertEqual(flags[flags.index("-ngl") + 1], "99")
        self.assertEqual(flags[flags.index("-fa") + 1], "on")

    def test_run_with_f16_leaves_the_plugin_out(self):
        self.succeeds(
            "run", "-m", self.model, "-p", "x", "--kv-preset", "f16", SPARKV_PLUGIN="/no/plugin.so"
        )
        (call,) = self.calls()
        self.assertNotIn("GGML_BACKEND_PATH", call["env"])
        self.assertNotIn("SPARKV", call["args"])

    def test_run_chats_without_a_prompt(self):
        self.succeeds("run", "-m", self.model)
        self.assertEqual(self.calls()[0]["name"], "llama-cli")

    def test_run_uses_the_chat_template_unless_told_otherwise(self):
        self.succeeds("run", "-m", self.model, "-p", "x")
        self.succeeds("run", "-m", self.model, "-p", "x", "-no-cnv")
        self.assertIn("-st", self.calls()[0]["args"])
        self.assertNotIn("-st", self.calls()[1]["args"])

    def test_run_json_is_one_object_with_the_text_and_the_statistics(self):
        report = json.loads(self.succeeds("run", "-m", self.model, "-p", "x", "--json"))
        self.assertEqual(report["text"], "Paris.")
        self.assertEqual(report["stats"]["bits_per_element"], 4.5)
        self.assertIsNone(
            json.loads(
                self.succeeds("run", "-m", self.model, "-p", "x", "--json", "--kv-preset", "f16")
            )["stats"]
        )

    def test_a_program_that_fails_or_dies_gives_code_one_and_its_last_words(self):
        done = self.run_sparkv("run", "-m", self.model, "-p", "x", "--fail")
        self.assertEqual(done.returncode, 1)
        self.assertIn("something went wrong", done.stderr)
        self.assertIn("exit code 7", done.stderr)
        done = self.run_sparkv("run", "-m", self.model, "-p", "x", "--die")
        self.assertEqual(done.returncode, 1)
        self.assertIn("signal 9", done.stderr)
        done = self.run_sparkv("run", "-m", self.model, "-p", "x", "--json", "--fail")
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertIn("something went wrong", done.stderr)

    def test_an_interrupt_reaches_the_program(self):
        process = subprocess.Popen(
            [SPARKV, "run", "-m", self.model, "-p", "x", "--wait"],
            env=self.environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.assertEqual(process.stdout.readline(), "ready\n")
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        self.assertEqual(process.stdout.read(), "interrupted\n")
        self.assertIn(process.wait(), (0, 1))
        self.assertLess(time.monotonic() - started, 10)
        process.stdout.close()

    def start_and_wait(self, **options):
        """A run that its program makes last; the program's own process, too."""
        (self.folder / "tmp").mkdir(exist_ok=True)
        (self.folder / "calls").unlink(missing_ok=True)
        process = subprocess.Popen(
            [SPARKV, "run", "-m", self.model, "-p", "x", "--json", "--wait"],
            env={**self.environment, "TMPDIR": str(self.folder / "tmp")},
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        self.addCleanup(process.stderr.close)
        self.addCleanup(process.kill)
        for _ in range(200):
            running = [call for call in self.calls() if "--help" not in call["args"]]
            if running:
                return process, running[0]["pid"]
            time.sleep(0.05)
        self.fail("the program never started")

    def assertEnds(self, pid):
        for _ in range(200):
            try:
                stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
            except OSError:
                return
            if stat.rpartition(")")[2].split()[0] == "Z":  # nobody waits for an orphan here
                return
            time.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
        self.fail("the program outlives the command")

    def test_nothing_is_left_when_a_terminal_is_closed(self):
        for number in (signal.SIGHUP, signal.SIGTERM):
            process, program = self.start_and_wait()
            process.send_signal(number)
            self.assertEqual(process.wait(timeout=20), 1)
            self.assertEqual(process.stderr.read().splitlines()[-1], "sparkv: interrupted")
            self.assertEnds(program)
            self.assertEqual(list((self.folder / "tmp").iterdir()), [])

    def test_no_program_outlives_a_command_that_was_killed(self):
        process, program = self.start_and_wait()
        process.kill()
        process.wait()
        self.assertEnds(program)

    def test_signals_that_are_to_be_ignored_are(self):
        process, _ = self.start_and_wait(
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        )
        process.send_signal(signal.SIGHUP)
        with self.assertRaises(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
        process.terminate()
        self.assertEqual(process.wait(timeout=20), 1)

    def test_what_a_full_disk_does_not_take_is_no_success(self):
        for words in (["fit", "--memory", "1GiB"], ["inspect", "--json"]):
            with open("/dev/full", "w") as full:
                done = subprocess.run(
                    [SPARKV, *words, "-m", self.model],
                    env=self.environment,
                    stdout=full,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            self.assertEqual(done.returncode, 1)
            self.assertRegex(done.stderr, r"^sparkv: stdout: .+\n$")

    def test_what_is_no_file_is_not_read_as_an_empty_one(self):
        for what in (self.folder, "/dev/full"):
            for code, words in (
                (1, ["eval", "-m", self.model, "-f"]),
                (1, ["eval", "-m", self.model, "--resume"]),
                (1, ["report"]),
                (2, ["run", "-m", self.model, "-p", "x", "--kv-calibration"]),
            ):
                with self.subTest(what=what, words=words):
                    self.refuses(code, [str(what), "not a file"], *words, what)

    def test_serve_listens_here_only_and_keeps_weights_beside_the_slots(self):
        self.run_sparkv("serve", "-m", self.model, "--slot-save-path", self.folder, "--fail")
        (call,) = self.calls()
        self.assertEqual(call["args"][call["args"].index("--host") + 1], "127.0.0.1")
        self.assertEqual(call["env"]["SPARKV_WEIGHTS"], str(self.folder / "weights.sparkv"))
        self.run_sparkv("serve", "-m", self.model, "--host", "0.0.0.0", "--fail")
        call = self.calls()[1]
        self.assertEqual(call["args"].count("--host"), 1)
        self.assertNotIn("SPARKV_WEIGHTS", call["env"])

    def test_bench_lets_the_caches_take_turns_and_pairs_their_ratios(self):
        report = json.loads(
            self.succeeds(
                "bench",
                "-m",
                self.model,
                "-p",
                "0",
                "-n",
                "8",
                "-d",
                "0,64",
                "-r",
                "2",
                "-ub",
                "128",
                "--json",
            )
        )
        rows = report["results"]
        self.assertEqual(
            [(row["n_depth"], row["cache"], row["avg_ts"], row["ratio"]) for row in rows],
            [
                (0, "f16", 10, 1),
                (0, rows[1]["cache"], 20, 2),
                (64, "f16", 10, 1),
                (64, rows[1]["cache"], 20, 2),
            ],
        )
        self.assertEqual(
            ["SPARKV" in call["args"] for call in self.calls()], [False, True, True, False]
        )
        self.assertEqual({call["env"]["OMP_WAIT_POLICY"] for call in self.calls()}, {"passive"})
        self.assertEqual(
            {call["args"][call["args"].index("-ub") + 1] for call in self.calls()}, {"128"}
        )
        self.assertIn("cpu", report["machine"])

    def test_bench_writes_the_same_rows_as_table_and_csv(self):
        table = self.succeeds("bench", "-m", self.model, "-r", "1")
        self.assertIn("tg8 @ d64", table)
        self.assertIn("2.00", table)
        lines = self.succeeds("bench", "-m", self.model, "-r", "1", "-o", "csv").splitlines()
        self.assertEqual(len(lines), 5)
        self.assertEqual({len(line.split(",")) for line in lines}, {len(lines[0].split(","))})

    def test_bench_says_what_waits_for_the_first_token_generated(self):
        words = ["bench", "-m", self.model, "-r", "1"]
        for option, word in (("--kv-evict=snapkv:512", "evicts"), ("--kv-seal=prefill-end", "packs")):
            done = self.run_sparkv(*words, option)
            self.assertIn(f" {word} at the first token that is generated", done.stderr)
        self.assertNotIn("at the first token", self.run_sparkv(*words).stderr)

    def test_eval_compares_all_caches_against_one_base(self):
        report = json.loads(
            self.succeeds("eval", "-m", self.model, "--json", "--kv-preset", "spark-0.5-i8,exact")
        )
        rows = {row["cache"]: row for row in report["results"]}
        self.assertEqual(list(rows), ["f16", "q8_0", "q4_0", "spark-0.5-i8", "exact"])
        self.assertEqual(rows["f16"]["mean_kld"], 0.001)
        self.assertEqual(rows["exact"]["mean_kld"], 0.005)
        self.assertEqual(rows["exact"]["median_kld"], 0.002)
        self.assertEqual(rows["exact"]["kld_99"], 0.07)
        self.assertAlmostEqual(rows["exact"]["top1_agreement"], 0.965)
        self.assertEqual(rows["exact"]["perplexity"], 20.5)
        self.assertEqual(rows["exact"]["perplexity_ratio"], 1.025)
        self.assertEqual(
            [rows[name]["bits_per_element"] for name in rows], [16, 8.5, 4.5, 4.5, 4.5]
        )
        base = next(call for call in self.calls() if call["name"] == "llama-perplexity")
        self.assertEqual(base["args"][base["args"].index("-ctk") + 1], "f32")
        self.assertEqual(
            [a for f, a in zip(base["args"], base["args"][1:]) if f == "-fa"][-1], "off"
        )

    def test_baselines_may_have_keys_and_values_apart(self):
        report = self.eval_tasks("--baselines", "q8_0/q4_0,f16/q5_1,q8_0/q8_0,q8_0")
        self.assertEqual(
            [(row["cache"], row["bits_per_element"]) for row in report["results"][:-1]],
            [("q8_0/q4_0", 6.5), ("f16/q5_1", 11), ("q8_0", 8.5)],
        )
        called = [c for c in self.calls() if "q8_0" in c.get("args", [])]
        self.assertEqual(
            [(c["name"], c["args"][c["args"].index("-ctv") + 1]) for c in called[:2]],
            [("llama-perplexity", "q4_0"), ("llama-server", "q4_0")],
        )

    def test_codecs_of_others_are_rows_that_the_plugin_stands_in_for(self):
        report = self.eval_tasks("--baselines", "kivi-2,think-0.25", "--questions", "0")
        self.assertEqual(
            [(row["cache"], row["bits_per_element"]) for row in report["results"][:-1]],
            [("kivi-2", 4.5), ("think-0.25", 4.5)],  # from the plugin's statistics
        )
        env = next(c["env"] for c in self.calls() if "SPARKV_BASELINE" in c.get("env", {}))
        self.assertEqual((env["SPARKV_PRESET"], env["SPARKV_WINDOW"]), ("exact", "96"))
        self.assertEqual(env["SPARKV_BASELINE"], "kivi-2")

    def test_where_heads_evict_all_readings_let_tokens_come_alone(self):
        words = ["--questions", "1", "--kv-preset", "exact+snapkv:512,exact,balanced+tova:256"]
        report = self.eval_tasks(*words)
        self.assertEqual(report["alone_every"], 128)
        self.assertEqual(
            [row["cache"] for row in report["results"]],
            ["f16", "exact+snapkv:512", "exact", "balanced+tova:256"],
        )
        readings = [c for c in self.calls() if c["name"] == "llama-perplexity"]
        settings = [(c["env"].get("SPARKV_PRESET"), c["env"].get("SPARKV_EVICT")) for c in readings]
        self.assertEqual(
            settings[3:],  # behind the base and the noise floor
            [(None, None), ("exact", "snapkv:512"), ("exact", None), ("balanced", "tova:256")],
        )

        def sizes(name):
            args = [c["args"] for c in self.calls() if c["name"] == name]
            return {(a[a.index("-b") + 1], a[a.index("-ub") + 1]) for a in args}

        self.assertEqual(sizes("llama-perplexity"), {("128", "127")})
        self.assertEqual(sizes("llama-server"), {("512", "128")})  # prompts end by themselves
        results = self.write("eval.json", json.dumps(report))
        table = str(self.folder / "table.csv")
        self.succeeds("report", results, "-o", str(self.folder / "x.html"), "--csv", table)
        self.assertIn("\nbalanced+tova:256,sparkv,", pathlib.Path(table).read_text())

        words = ["eval", "-m", self.model, "--questions", "0", "--ubatch-size", "64"]
        said = "; heads evict: every 64th token comes alone\n"
        self.assertIn(said, self.succeeds(*words, "--kv-evict", "snapkv:512"))
        self.assertIn(said, self.succeeds(*words, SPARKV_EVICT="snapkv:512"))
        (self.folder / "calls").unlink()
        self.assertNotIn("alone", self.succeeds(*words))
        self.assertEqual(sizes("llama-perplexity"), {("512", "64")})

    def test_eval_says_when_heads_evict_too_late_to_be_scored(self):
        words = ["eval", "-m", self.model, "--questions", "0", "--kv-preset"]
        late = self.run_sparkv(*words, "exact+snapkv:512,exact+snapkv:1000")
        self.assertNotIn("heads evict", late.stderr)
        late = self.run_sparkv(*words, "exact+snapkv:1024")
        self.assertIn(
            "sparkv: exact+snapkv:1024: heads evict from token 1152 on, those from 1024 to 2048",
            late.stderr,
        )

    def test_check_judges_a_cache_that_has_evicted(self):
        self.check(0, "--kv-evict", "snapkv:256")
        args = [c["args"] for c in self.calls() if c["name"] == "llama-perplexity"]
        self.assertEqual({a[a.index("-ub") + 1] for a in args}, {"127"})

    def test_eval_scores_what_the_heads_of_the_demo_model_keep(self):
        model = self.use_demo_model()
        words = ["--questions", "0", "-c", "512", "--chunks", "1", "--ubatch-size", "64"]
        words += ["--kv-preset", "exact,exact+snapkv:128,balanced+snapkv:128"]
        report = json.loads(
            self.succeeds("eval", "-m", model, "--json", "--baselines", "f16", *words)
        )
        f16, exact, evicted, packed = report["results"]
        self.assertLess(exact["mean_kld"], 3 * f16["mean_kld"] + 1e-3)
        self.assertGreater(evicted["mean_kld"], 3 * exact["mean_kld"])
        # Of 512 tokens 128 stay, and up to 127 may come before the next eviction.
        share = evicted["bits_per_element"] / exact["bits_per_element"]
        self.assertGreater(share, 0.24)
        self.assertLess(share, 0.5)
        self.assertLess(packed["bits_per_element"], 0.5 * evicted["bits_per_element"])

    def test_eval_measures_its_noise_floor_with_two_exact_runs(self):
        words = ["eval", "-m", self.model, "--questions", "0", "--baselines", "f32"]
        report = json.loads(self.succeeds(*words, "--json"))
        self.assertEqual(report["noise_floor"], {"same_run": 0, "flash_attention": 0.0002})
        self.assertEqual(report["results"][0]["mean_kld"], 0.0002)  # f32 is a row like any other
        self.assertIn(
            "noise floor, mean KL of an exact f32 cache: 0.000000 the same run again, 0.000200",
            self.succeeds(*words),
        )

    ALL_TASKS = "passcode,multikey,variables,words"

    def eval_tasks(self, *words):
        if "--baselines" not in words:
            words += ("--baselines", "f16")
        return json.loads(self.succeeds("eval", "-m", self.model, "--json", *words))

    def test_eval_counts_an_answer_only_when_it_begins_with_what_is_expected(self):
        report = self.eval_tasks("--questions", "5", "--tasks", self.ALL_TASKS)
        self.assertEqual(report["tasks"], self.ALL_TASKS.split(","))
        plain, packed = (row["tasks"] for row in report["results"])
        for task in report["tasks"]:
            self.assertEqual((plain[task]["right"], plain[task]["asked"]), (5, 5), plain[task])
            # The stand-in puts a letter and a digit before what is right.
            self.assertEqual((packed[task]["right"], packed[task]["asked"]), (0, 5))
            for answer in packed[task]["answers"]:
                self.assertEqual(answer["answer"], " x0" + answer["expected"])
        table = self.succeeds(
            "eval", "-m", self.model, "--baselines", "f16", "--tasks", "words,passcode"
        )
        self.assertRegex(table, r"\| passcode \| +words \|")
        self.assertRegex(table, r"\| f16 .*\| +8/8 \| +8/8 \|")

    def test_eval_tells_speed_and_memory_of_the_tasks_server(self):
        report = self.eval_tasks("--questions", "3", "--tasks", "passcode,words")
        plain, packed = report["results"]
        self.assertEqual(plain["prefill_tokens_per_s"], 200)  # two texts of 100 tokens, each 0.5 s
        self.assertEqual(plain["decode_tokens_per_s"], 50)  # four steps in 0.08 s
        self.assertGreater(plain["process_resident_mib"], 1)
        self.assertGreaterEqual(plain["process_peak_mib"], plain["process_resident_mib"])
        self.assertIsNone(packed["decode_tokens_per_s"])  # a server that does not tell
        self.assertEqual((packed["resident_bytes"], packed["peak_bytes"]), (1000, 1500))
        table = self.succeeds("eval", "-m", self.model, "--baselines", "f16")
        self.assertRegex(table, r"resident MiB \| peak MiB \| prefill t/s \| decode t/s \|\n")
        self.assertRegex(table, r"\| f16 .* \| +200.0 \| +50.0 \|\n")
        self.assertRegex(table, r"\| +- \| +- \|\n")
        self.assertNotIn(
            "decode t/s",
            self.succeeds("eval", "-m", self.model, "--baselines", "f16", "--questions", "0"),
        )

    def test_eval_asks_different_questions_after_one_reading_of_each_text(self):
        self.eval_tasks("--questions", "3", "--tasks", self.ALL_TASKS, "--kv-preset", "f16")
        asked = [call for call in self.calls() if call["name"] == "/completion"]
        self.assertEqual(len(asked), 4 * (1 + 3))
        for first in range(0, len(asked), 4):
            reading, *questions = asked[first : first + 4]
            self.assertNotIn("Question", reading["prompt"])
            self.assertFalse(reading["cache_prompt"])
            self.assertEqual(len({question["prompt"] for question in questions}), 3)
            for question in questions:
                self.assertTrue(question["cache_prompt"])
                self.assertTrue(question["prompt"].startswith(reading["prompt"] + "\n\nQuestion"))
        server = [call for call in self.calls() if call["name"] == "llama-server"][-1]
        context = int(server["args"][server["args"].index("-c") + 1])
        self.assertEqual(context, max(len(call["prompt"]) for call in asked) + 8)

    def test_eval_asks_before_the_text_too_where_that_is_wanted(self):
        report = self.eval_tasks(
            "--questions", "3", "--tasks", self.ALL_TASKS, "--kv-preset", "f16", "--ask", "before"
        )
        self.assertEqual(report["ask"], "before")
        for task in report["results"][0]["tasks"].values():
            self.assertEqual((task["right"], task["asked"]), (3, 3))
        asked = [call for call in self.calls() if call["name"] == "/completion"]
        self.assertEqual(len(asked), 4 * 3)  # no reading apart from the questions
        for call in asked:
            self.assertFalse(call["cache_prompt"])
            question = call["prompt"].rpartition("\n\n")[2].partition("\nAnswer: ")[0]
            self.assertTrue(question.startswith("Question: "))
            self.assertTrue(call["prompt"].startswith(question + "\n\n"))
            self.assertEqual(call["prompt"].count("Answer:"), 1)
        server = [call for call in self.calls() if call["name"] == "llama-server"][-1]
        context = int(server["args"][server["args"].index("-c") + 1])
        self.assertEqual(context, max(len(call["prompt"]) for call in asked) + 8)
        row = report["results"][0]  # every question reads 50 tokens in 0.5 s
        self.assertEqual((row["prefill_tokens_per_s"], row["decode_tokens_per_s"]), (100, 50))

    def test_eval_says_in_its_table_when_it_asked(self):
        words = ["eval", "-m", self.model, "--baselines", "f16", "--questions"]
        self.assertIn("; questions asked after the text\n", self.succeeds(*words, "1"))
        self.assertIn(
            "; questions asked before the text\n", self.succeeds(*words, "1", "--ask", "before")
        )
        self.assertNotIn("questions asked", self.succeeds(*words, "0"))

    def test_eval_counts_answers_as_a_share_of_those_with_f16(self):
        words = ["--questions", "4", "--tasks", "passcode,words"]
        rows = self.eval_tasks(*words, "--baselines", "q8_0,f16")["results"]
        self.assertEqual([row["right_of_f16"] for row in rows], [1, 1, 0])
        table = self.succeeds("eval", "-m", self.model, *words)
        self.assertRegex(table, r"words \| of f16 \| resident MiB")
        self.assertRegex(table, r"\| q8_0 .*\| +4/4 \| +4/4 \| +1.00 \|")
        self.assertNotIn("right_of_f16", self.eval_tasks(*words, "--baselines", "q8_0")["results"][0])
        none = ["eval", "-m", self.model, "--questions", "0"]
        self.assertNotIn("of f16", self.succeeds(*none))

    def test_the_tasks_of_a_seed_are_the_same_alone_and_together(self):
        def expected(*words):
            done = self.eval_tasks("--kv-preset", "f16", *words)["results"][0]["tasks"]
            return {name: [a["expected"] for a in task["answers"]] for name, task in done.items()}

        together = expected("--tasks", self.ALL_TASKS)
        # Drawn by earlier versions and on other machines, too.
        self.assertEqual(together["passcode"][:4], ["3340", "8302", "6721", "4242"])
        other = expected("--tasks", self.ALL_TASKS, "-s", "2")
        for task in together:
            self.assertEqual(expected("--tasks", task), {task: together[task]})
            self.assertNotEqual(together[task], other[task])
            self.assertGreaterEqual(len(set(together[task])), 7)

    def test_eval_refuses_tasks_that_cannot_be_made(self):
        text = self.write("text.txt", "Far too few words. " * 60)
        for words, args in (
            (["--tasks", "riddle", "passcode"], ["--tasks", "passcode,riddle"]),
            (["--tasks"], ["--tasks", ""]),
            (["--task-words", "1000", "the text has 240"], ["-f", text]),
            (
                ["--task-words", "100", "8 lists of 25"],
                ["--tasks", "words", "--task-words", "100"],
            ),
            (["--questions", "17"], ["--questions", "17"]),
        ):
            with self.subTest(args=args):
                self.refuses(2, words, "eval", "-m", self.model, *args)
        self.assertEqual(self.calls(), [])  # before anything runs
        words = ["'passcode'", "the model is for 8192"]
        self.refuses(2, words, "eval", "-m", self.model, "--task-words", "2000")

    def resumable(self, *words):
        file = self.folder / "so-far.json"
        return file, ["eval", "-m", self.model, "--resume", file, "--json", *words]

    def perplexity_caches(self):
        calls = [call["args"] for call in self.calls() if call["name"] == "llama-perplexity"]
        (self.folder / "calls").unlink(missing_ok=True)
        return [c[c.index("-ctk") + 1] if "-ctk" in c else "packed" for c in calls]

    def test_eval_goes_on_where_it_was_stopped(self):
        file, words = self.resumable()
        done = self.run_sparkv(*words, FAIL="q8_0")
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertEqual(self.perplexity_caches(), ["f32", "f32", "f32", "f16", "q8_0"])
        self.assertEqual(list(json.loads(file.read_text())["results"]), ["f16", "noise floor"])

        done = self.run_sparkv(*words)
        self.assertIn("1 of 4 caches are done already", done.stderr)
        self.assertEqual(self.perplexity_caches(), ["f32", "q8_0", "q4_0", "packed"])
        whole = json.loads(self.succeeds(*words))
        self.assertEqual(self.calls(), [])  # nothing was left to do
        fresh = json.loads(self.succeeds("eval", "-m", self.model, "--json"))
        for report in (whole, fresh, json.loads(done.stdout)):
            report.pop("machine", None)
            for row in report["results"]:
                for field in ("resident", "peak"):  # differ by pages from run to run
                    row.pop(f"process_{field}_mib", None)
            self.assertEqual(report, whole)
        # Another list of caches adds to the file.
        self.perplexity_caches()
        more = json.loads(self.succeeds(*words, "--kv-preset", "exact"))
        self.assertEqual(self.perplexity_caches(), ["f32", "packed"])
        self.assertEqual(more["results"][0]["tasks"], whole["results"][0]["tasks"])
        self.assertEqual(list(self.folder.glob("*.partial")), [])

    def test_two_evaluations_may_fill_one_file(self):
        file, words = self.resumable("--baselines", "f16", "--questions", "0")
        self.succeeds(*words, OTHER_RUN=str(file))
        names = ["balanced", "f16", "noise floor", "of another run"]
        self.assertEqual(sorted(json.loads(file.read_text())["results"]), names)

    def test_results_so_far_may_be_behind_a_link(self):
        file, words = self.resumable("--baselines", "f16", "--questions", "0")
        self.succeeds(*words)
        file.rename(self.folder / "elsewhere.json")
        file.symlink_to("elsewhere.json")
        self.succeeds(*words, "--kv-preset", "exact")
        self.assertTrue(file.is_symlink())
        self.assertIn("exact", json.loads(file.read_text())["results"])

    def test_a_server_that_dies_is_told_by_its_signal(self):
        done = self.run_sparkv("eval", "-m", self.model, "--baselines", "f16", SERVER_DIES="1")
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertIn("llama-server: ended by signal 9 (Killed)", done.stderr.splitlines()[-1])

    def test_tasks_need_a_text_in_utf_8(self):
        text = self.write("latin1.txt", "na\u00efve ".encode("latin-1") * 2000)
        words = ["eval", "-m", self.model, "--baselines", "f16", "-f", text]
        self.refuses(2, ["--file", text, "UTF-8"], *words)
        self.succeeds(*words, "--questions", "0")

    def test_eval_never_mixes_results_of_other_settings(self):
        file, words = self.resumable("--baselines", "f16", "--kv-preset", "exact")
        self.succeeds(*words)
        kept = file.read_text()
        other_text = self.write("text.txt", "Words of another text. " * 300)
        for field, args in (
            ("ctx-size 2048, not 1024", ["-c", "1024"]),
            ("chunks -1, not 1", ["--chunks", "1"]),
            ("seed 1, not 2", ["-s", "2"]),
            ("tasks", ["--tasks", "words"]),
            ("task-words", ["--task-words", "500"]),
            ("questions", ["--questions", "2"]),
            ("ask \"after\", not \"before\"", ["--ask", "before"]),
            ("text", ["-f", other_text]),
            ("kv options", ["--kv-window", "32"]),
            ("a token alone every 0, not 128", ["--kv-evict", "snapkv:512"]),
        ):
            with self.subTest(field=field):
                self.refuses(2, ["--resume", str(file), "with " + field], *words, *args)
        os.utime(self.model, (1, 1))
        self.refuses(2, ["with model"], *words)
        os.utime(self.plugin, (1, 1))
        self.refuses(2, ["with "], *words)
        self.assertEqual(file.read_text(), kept)

    def test_a_damaged_file_of_results_is_refused_by_its_field(self):
        file, words = self.resumable("--baselines", "f16", "--kv-preset", "exact")
        self.succeeds(*words)
        whole = json.loads(file.read_text())

        def without(name, *path):
            data = json.loads(file_text)
            entry = data["results"][name]
            for key in path[:-1]:
                entry = entry[key]
            entry[path[-1]] = "?"
            return json.dumps(data)

        file_text = json.dumps(whole)
        for expected, text in (
            ("no JSON object", ""),
            ("no JSON object", file_text[:-10]),
            ("no JSON object", "[]"),
            ("'settings'", "{}"),
            ("'results'", json.dumps({**whole, "results": 1})),
            ("'f16/mean_kld'", without("f16", "mean_kld")),
            ("'exact/tasks/passcode/right'", without("exact", "tasks", "passcode", "right")),
            ("'noise floor/same_run'", without("noise floor", "same_run")),
            ("'f16/", json.dumps({**whole, "results": {"f16": 3}})),
        ):
            with self.subTest(expected=expected):
                file.write_text(text)
                self.refuses(1, [str(file), expected], *words)
                self.assertEqual(file.read_text(), text)
        self.refuses(1, ["/no/folder"], *words[:3], "--resume", "/no/folder/x.json")

    def test_eval_warns_of_quantised_weights_and_makes_f32_ones_once(self):
        model = self.write("quantised.gguf", gguf(changed("general.file_type", 3)))
        done = self.run_sparkv("eval", "-m", model, "--questions", "0", "--baselines", "f16")
        self.assertIn("quantised", done.stderr)
        for _ in range(2):
            self.succeeds(
                "eval", "-m", model, "--questions", "0", "--baselines", "f16", "--requantize-f32"
            )
        names = [call["name"] for call in self.calls()]
        self.assertEqual(names.count("llama-quantize"), 1)

    def test_weights_that_were_not_written_whole_are_not_kept(self):
        model = self.write("quantised.gguf", gguf(changed("general.file_type", 3)))
        words = ["check", "-m", model, "--requantize-f32"]
        self.assertEqual(self.run_sparkv(*words, DISK_FULL="1").returncode, 1)
        self.assertEqual(list((self.folder / "cache" / "sparkv").iterdir()), [])
        self.succeeds(*words)
        # Of two runs at once each writes a file of its own.
        written = [c["args"][2] for c in self.calls() if c["name"] == "llama-quantize"]
        self.assertEqual(len(set(written)), 2)

    def check(self, code, *args, **environment):
        done = self.run_sparkv("check", "-m", self.model, "--json", *args, **environment)
        self.assertEqual(done.returncode, code, done)
        return json.loads(done.stdout)

    def test_check_passes_in_one_line_after_three_readings(self):
        done = self.succeeds("check", "-m", self.model)
        self.assertEqual(
            done,
            "passes: --kv-preset balanced at 4.50 bits/element, KL median 0.002000, mean "
            "0.005000, perplexity x 1.0250, top-1 0.965 (limits: mean KL 0.0500, top-1 0.820; "
            "unquantised weights, noise floor 0.000200)\n",
        )
        self.assertEqual(self.perplexity_caches(), ["f32", "f32", "packed"])
        report = self.check(0)
        self.assertTrue(report["passes"] and report["result"]["passes"])
        self.assertEqual((report["tried"], report["proposal"]), ([], None))
        for call in self.calls():
            self.assertEqual(call["args"][call["args"].index("-c") + 1], "1024")
            self.assertEqual(call["args"][call["args"].index("--chunks") + 1], "1")

    def calibrate(self, *args, parts=None, **environment):
        parts = parts or [calibration([(i, 3, 64) for i in range(4)])]
        return self.run_sparkv(
            *("calibrate", "-m", self.model, *args),
            PARTS=" ".join(part.hex() for part in parts),
            **environment,
        )

    def test_calibrate_judges_groups_of_layers_and_writes_a_file_beside_the_model(self):
        done = self.calibrate("--groups", "2", "--json")
        self.assertEqual(done.returncode, 0, done)
        report = json.loads(done.stdout)
        path = self.folder / "model.calibration"
        self.assertEqual(report["output"], str(path))
        # The stand-in loses .1 in layers 0-1 and .3 in layers 2-3, beside .005 of noise.
        self.assertEqual(report["sensitivity"], "0-1:0.49,2-3:1.51")
        whole = calibration([(i, 3, 64) for i in range(4)], "llama ", report["sensitivity"])
        self.assertEqual(path.read_bytes(), whole)
        packed = [call for call in self.calls() if "SPARKV" in call["args"]]
        self.assertEqual(
            [call["env"].get("SPARKV_LAYERS") for call in packed],
            [None, "0-1=tiers-5321+t2", "2-3=tiers-5321+t2"],
        )

    def test_calibrate_joins_what_several_caches_saw(self):
        parts = [calibration([(0, 3, 64), (2, 3, 64)]), calibration([(1, 3, 64), (3, 3, 64)])]
        output = self.folder / "joined"
        done = self.calibrate("--groups", "0", "-o", output, parts=parts)
        self.assertEqual(done.returncode, 0, done)
        self.assertEqual(
            output.read_bytes(), calibration([(i, 3, 64) for i in (0, 2, 1, 3)], "llama ")
        )
        self.assertIn("--kv-calibration %s" % output, done.stdout)

    def test_calibrate_says_when_noise_hides_the_layers(self):
        self.write("model.gguf", gguf(changed("general.file_type", 3)))
        done = self.calibrate("--groups", "4", BREAKS="exact", KL="0.2")
        self.assertEqual(done.returncode, 0, done)
        self.assertIn("noise (0.200000) hides", done.stderr)
        self.assertIn("--requantize-f32", done.stderr)
        expected = calibration([(i, 3, 64) for i in range(4)], "llama ")
        self.assertEqual((self.folder / "model.calibration").read_bytes(), expected)

    def test_calibrate_leaves_out_layers_that_the_plugin_does_not_know(self):
        output = self.folder / "rest"
        done = self.calibrate("--groups", "2", "-o", output, NO_LAYERS="2-3")
        self.assertEqual(done.returncode, 0, done)
        self.assertIn("layers 2-3 are left out", done.stderr)
        expected = calibration([(i, 3, 64) for i in range(4)], "llama ", "0-1:1.00")
        self.assertEqual(output.read_bytes(), expected)

    def test_calibrate_knows_a_place_that_cannot_be_written_before_it_works(self):
        for place in ("/no/folder/x", str(self.folder)):
            words = ["calibrate", "-m", self.model, "-o", place]
            self.refuses(1, [place, "cannot be written"], *words)
        before = pathlib.Path(self.model).read_bytes()
        self.refuses(2, ["-o", self.model], "calibrate", "-m", self.model, "-o", self.model)
        self.assertEqual(pathlib.Path(self.model).read_bytes(), before)
        self.assertEqual(self.calls(), [])

    def test_calibrate_without_a_measurement_writes_nothing(self):
        for parts in ([b"\0"], [calibration([(0, 3, 64)])[:-1]]):
            done = self.calibrate("--groups", "1", parts=parts)
            self.assertEqual(done.returncode, 1, done)
            self.assertIn("calibration", done.stderr)
            self.assertFalse((self.folder / "model.calibration").exists())

    def test_a_calibration_reaches_the_plugin_and_chooses_layers(self):
        good = calibration([(i, 3, 64) for i in range(4)], "llama ", "0-1:0.1,2-3:3")
        path = self.write("good", good)
        self.succeeds("run", "-m", self.model, "-p", "x", "--kv-calibration", path)
        self.assertEqual(self.calls()[-1]["env"]["SPARKV_CALIBRATION"], path)
        args = ["inspect", "-m", self.model, "-c", "4096", "--json", "--kv-preset", "safe"]
        plain = json.loads(self.succeeds(*args))["caches"][-1]
        chosen = json.loads(self.succeeds(*args, "--kv-calibration", path))["caches"][-1]
        self.assertLessEqual(chosen["bits_per_element"], plain["bits_per_element"])
        self.assertGreater(chosen["bits_per_element"], plain["bits_per_element"] - 0.2)
        self.assertNotEqual(chosen, plain)

    def test_a_calibration_of_another_model_or_a_damaged_one_is_refused(self):
        layers = [(i, 3, 64) for i in range(4)]
        other = self.write("other", calibration(layers, "llama Another"))
        good = calibration(layers, "llama ")
        damaged = {
            "cut": good[:-1],
            "longer": good + b"\0",
            "flipped": good[:700] + b"\1" + good[701:],
            "magic": b"x" + good[1:],
            "empty": b"",
            "layers": calibration([(0, 3, 64), (0, 3, 64)]),
            "size": calibration([(0, 3, 60)]),
        }
        for command in (
            ["run", "-p", "x"],
            ["serve"],
            ["check"],
            ["eval"],
            ["bench"],
            ["inspect"],
            ["fit", "--memory", "1GiB"],
        ):
            command += ["-m", self.model, "--kv-calibration"]
            self.refuses(2, ["--kv-calibration", "'llama Another'", "'llama '"], *command, other)
            for name, data in damaged.items():
                with self.subTest(name, command=command[0]):
                    path = self.write(name, data)
                    self.refuses(2, ["--kv-calibration", path, "calibration"], *command, path)

    def deep_model(self):
        self.model = self.write("deep.gguf", gguf(changed("llama.block_count", 30)))

    def test_check_proposes_the_first_layers_to_protect_that_pass(self):
        self.deep_model()
        args = ["--kv-preset", "spark-0.9-i4", "--kv-window", "0"]
        report = self.check(1, *args, BREAKS=r"spark-0.9-i4 (first:1)?$")
        self.assertFalse(report["passes"])
        self.assertEqual([row["passes"] for row in report["tried"]], [False, True])
        proposal = "--kv-preset spark-0.9-i4 --kv-protect first:2,last:1 --kv-window 0"
        self.assertEqual(report["proposal"], proposal)
        # What it says is what passes.
        self.check(0, *proposal.split(), BREAKS=r"spark-0.9-i4 (first:1)?$")
        done = self.run_sparkv("check", "-m", self.model, *args, BREAKS=r"spark-0.9-i4 (first:1)?$")
        lines = done.stdout.splitlines()
        self.assertEqual([line.split()[0] for line in lines[:3]], ["breaks:", "breaks:", "passes:"])
        self.assertEqual(lines[3:], ["use " + proposal])

    def test_check_protects_more_than_was_protected_and_never_all_layers(self):
        self.deep_model()
        tried = self.check(1, "--kv-protect", "first:3,last:2", BREAKS=".")["tried"]
        self.assertEqual(
            [row["options"].split()[3] for row in tried[:2]], ["first:4,last:2", "first:8,last:4"]
        )
        self.model = self.write("small.gguf", gguf(SMALL))  # 4 layers
        self.assertEqual(
            [row["options"] for row in self.check(1, BREAKS=".")["tried"]],
            [
                "--kv-preset balanced --kv-protect first:1",
                "--kv-preset balanced --kv-protect first:2,last:1",
                "--kv-preset safe",
                "--kv-preset spark-0-i8",
                "--kv-preset exact",
            ],
        )

    def test_check_proposes_words_that_a_shell_reads_as_they_are(self):
        self.deep_model()
        path = self.write("it's mine", calibration([(i, 3, 64) for i in range(30)], "llama "))
        args = ["--kv-calibration", path]
        report = self.check(1, *args, BREAKS="balanced $")
        self.assertIn(path, shlex.split(report["proposal"]))

    def test_check_then_proposes_a_better_preset_as_it_is_meant(self):
        args = ["--kv-preset", "spark-0.9-i4", "--kv-recover", "zero", "--kv-threads", "1"]
        report = self.check(1, *args, BREAKS="0.9|balanced")
        self.assertEqual(report["proposal"], "--kv-preset safe --kv-threads 1")
        done = self.run_sparkv("check", "-m", self.model, *args, BREAKS="0.9|balanced")
        self.assertTrue(
            done.stdout.endswith(
                "\nuse --kv-preset safe --kv-threads 1 (without --kv-recover)\n"
            )
        )
        tried = self.check(1, "--kv-preset", "spark-0.5-i6", BREAKS=".")["tried"]
        self.assertEqual([row["cache"] for row in tried[2:]], ["safe", "spark-0-i8", "exact"])

    def test_check_refuses_a_model_that_nothing_saves(self):
        done = self.run_sparkv("check", "-m", self.model, BREAKS=".")
        self.assertEqual(done.returncode, 1)
        self.assertEqual(done.stdout.count("breaks: "), 6)
        self.assertIn("\nnothing that was tried passes", done.stdout)

    def test_check_goes_on_where_a_proposal_cannot_run(self):
        done = self.run_sparkv("check", "-m", self.model, BREAKS="balanced $", REFUSE="first:1")
        self.assertEqual(done.returncode, 1)
        self.assertIn("the plugin refuses", done.stderr)
        self.assertIn("\nuse --kv-preset balanced --kv-protect first:2,last:1\n", done.stdout)
        done = self.run_sparkv("check", "-m", self.model, "--kv-protect=first:1", REFUSE="first:1")
        self.assertEqual((done.returncode, done.stdout), (1, ""))

    def test_check_judges_by_divergence_agreement_and_numbers_that_are_none(self):
        for passes, environment in (
            (True, {"KL": "0.05"}),
            (False, {"KL": "0.0501"}),
            (True, {"KL": "0.0501", "FLOOR": "0.02"}),  # within three noise floors
            (False, {"KL": "0.07", "FLOOR": "0.02"}),
            (False, {"KL": "nan"}),
            (False, {"KL": "0.005", "TOP": "82.0"}),  # .85 of 96.5
            (True, {"KL": "0.005", "TOP": "82.1"}),
        ):
            with self.subTest(environment=environment):
                report = self.check(not passes, BREAKS="balanced $", **environment)
                self.assertEqual(report["passes"], passes)
        done = self.run_sparkv("check", "-m", self.model, FLOOR="nan")
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertIn("its perplexity is not finite with an exact f32 cache", done.stderr)

    def test_check_says_which_weights_judged(self):
        self.model = self.write("quantised.gguf", gguf(changed("general.file_type", 3)))
        done = self.run_sparkv("check", "-m", self.model)
        self.assertIn("; quantised weights, noise floor 0.0002", done.stdout)
        self.assertIn("--requantize-f32", done.stderr)
        report = self.check(0, "--requantize-f32")
        self.assertEqual(report["weights"], "requantised to F32")
        self.assertIn("llama-quantize", [call["name"] for call in self.calls()])

    def use_demo_model(self):
        folder = pathlib.Path(SPARKV).resolve().parent
        model = folder.parent / "models" / "smollm2-135m-instruct-q4_1.gguf"
        if not model.exists() or not (folder / "llama-perplexity").exists():
            self.skipTest("no demo model or no llama.cpp beside " + SPARKV)
        for name in ("SPARKV_LLAMA_BIN", "SPARKV_PLUGIN"):
            self.environment.pop(name)
        return model

    def test_check_passes_on_the_demo_model(self):
        self.assertRegex(
            self.succeeds("check", "-m", self.use_demo_model()),
            r"^passes: --kv-preset balanced at [45]\.\d\d bits/element, KL median 0\.00\d+, ",
        )

    EVALUATION = {
        "model": "a<b>.gguf",
        "text": "built in",
        "weights": "unquantised",
        "context": 2048,
        "noise_floor": {"same_run": 0, "flash_attention": 1e-6},
        "tasks": ["passcode"],
        "results": [
            {
                "cache": name,
                "bits_per_element": bits,
                "mean_kld": kld,
                "median_kld": kld,
                "kld_99": kld,
                "perplexity_ratio": 1,
                "top1_agreement": 0.97,
                "tasks": {"passcode": {"right": right, "asked": 8}},
            }
            for name, bits, kld, right in (
                ("f16", 16, 0, 8),
                ("q4_0", 4.5, 0.06, 4),
                ("spark-0.5-i5", 4.57, 0.005, 7),
                ("<script>", 3, 2, 0),
            )
        ],
    }

    def test_report_draws_an_evaluation(self):
        results = self.write("eval.json", json.dumps(self.EVALUATION).encode())
        page, table = self.folder / "r.html", self.folder / "r.csv"
        out = self.succeeds("report", results, "-o", page, "--csv", table)
        self.assertEqual(out.split(), [str(page), str(table)])
        html = page.read_text()
        self.assertEqual((html.count("<svg"), html.count("<circle")), (2, 8))
        self.assertIn("a&lt;b&gt;.gguf", html)
        self.assertIn("<td>7/8</td>", html)
        self.assertIn("asked after the text", html)  # as older files mean
        self.assertNotIn("<script>", html)
        self.assertNotIn("nan", html)
        rows = table.read_text().splitlines()
        self.assertEqual(rows[0].split(",")[:3], ["cache", "kind", "bits_per_element"])
        self.assertEqual(rows[3].split(",")[:4], ["spark-0.5-i5", "sparkv", "4.57", "0.005"])
        self.assertEqual(rows[2].split(",")[1], "llama.cpp")

    HEADS = {
        "errors": [
            {"layer": layer, "keys": [0.1 * layer, 0.25], "values": [0.05, 0.06]}
            for layer in (0, 1, 3)
        ],
        "saliency": {
            "layer": 3,
            "head": 1,
            "head_dim": 8,
            "tokens": 2,
            "kept": ["ff", "0f"],
            "saliency": ["00" * 8, "f0" * 8],
        },
    }

    def test_a_cache_that_breaks_is_kept_and_reported(self):
        file, words = self.resumable("--baselines", "f16", "--kv-preset", "exact")
        for _ in range(2):  # measured, and from the file
            report = json.loads(self.succeeds(*words, BREAKS="exact", KL="nan"))
            self.assertIsNone(report["results"][1]["mean_kld"])
        self.assertIn("nan", self.succeeds(*[word for word in words if word != "--json"]))
        page, table = self.folder / "r.html", self.folder / "r.csv"
        results = self.write("eval.json", json.dumps(report))
        self.succeeds("report", results, "-o", page, "--csv", table)
        self.assertEqual(page.read_text().count("<circle"), 3)  # no place in the first plot
        self.assertIn(",nan,", table.read_text())

    def test_report_draws_what_heads_lose(self):
        evaluation = json.loads(json.dumps(self.EVALUATION))
        evaluation["results"][2] |= self.HEADS
        evaluation["results"][1] |= {"errors": None, "saliency": None}
        results = self.write("eval.json", json.dumps(evaluation).encode())
        page = self.folder / "r.html"
        self.succeeds("report", results, "-o", page)
        html = page.read_text()
        self.assertEqual(html.count("<svg"), 4)
        self.assertEqual(html.count("<title>layer "), 12)
        self.assertIn("<title>layer 3, head 0: 0.3000</title>", html)
        self.assertIn("darkest 0.300", html)
        self.assertIn("darkest 0.060", html)
        self.assertIn("Keys of layer 3, KV head 1", html)

    def test_eval_keeps_what_heads_lose(self):
        report = self.eval_tasks("--baselines", "f16", "--questions", "0")
        plain, packed = report["results"]
        self.assertNotIn("errors", plain)
        self.assertEqual([layer["layer"] for layer in packed["errors"]], [0, 1])
        self.assertEqual(packed["errors"][0]["keys"], [0.25, 0.5])
        picture = packed["saliency"]
        self.assertEqual((picture["layer"], picture["head"], picture["tokens"]), (2, 0, 512))
        self.assertEqual((len(picture["kept"]), len(picture["saliency"])), (512, 512))

    def test_report_has_its_plots_drawn_as_a_picture(self):
        results = self.write("eval.json", json.dumps(self.EVALUATION).encode())
        page, picture = self.folder / "r.html", self.folder / "r.png"
        self.refuses(
            1, ["--png", "rsvg-convert"], "report", results, "-o", page, "--png", picture, PATH=""
        )
        convert = self.folder / "bin" / "rsvg-convert"
        convert.parent.mkdir()
        convert.write_text('#!/bin/sh\n{ echo picture; cat "$5"; } > "$4"\n')
        convert.chmod(0o755)
        path = "%s:%s" % (convert.parent, os.environ["PATH"])
        out = self.succeeds("report", results, "-o", page, "--png", picture, PATH=path)
        self.assertEqual(out.split(), [str(page), str(picture)])
        first, svg = picture.read_text().split("\n", 1)
        self.assertEqual(first, "picture")
        root = xml.etree.ElementTree.fromstring(svg)
        self.assertEqual((root.get("width"), root.get("height")), ("880", "800"))
        self.assertEqual(svg.count("<circle"), 8)

    def test_report_refuses_what_is_no_evaluation_and_writes_nothing(self):
        page = self.folder / "none.html"

        def changed(change):
            copy = json.loads(json.dumps(self.EVALUATION))
            change(copy)
            return json.dumps(copy)

        for words, text in (
            (["not a JSON object"], "[1, 2"),
            (["/model", "missing"], "{}"),
            (["/ask", "no text"], changed(lambda e: e.update(ask=3))),
            (["/results", "empty"], changed(lambda e: e.update(results=[]))),
            (["/results/1/mean_kld"], changed(lambda e: e["results"][1].update(mean_kld="x"))),
            (["/results/0/tasks/passcode"], changed(lambda e: e["results"][0].update(tasks={}))),
            (["/tasks", "names"], changed(lambda e: e.update(tasks=["a/~b"]))),
            (["bits_per_element"], changed(lambda e: e["results"][0].update(bits_per_element=0))),
            (["/results/0/errors", "layers"], changed(lambda e: e["results"][0].update(errors=3))),
            (
                ["/results/1/errors/0/keys", "errors"],
                changed(
                    lambda e: e["results"][1].update(
                        errors=[{"layer": 0, "keys": [-1], "values": []}]
                    )
                ),
            ),
            *(
                (
                    ["/results/1/errors/0/layer"],
                    changed(
                        lambda e: e["results"][1].update(
                            errors=[{"layer": layer, "keys": [], "values": []}]
                        )
                    ),
                )
                for layer in (-1, 1 << 16, (1 << 64) - 1, 0.5, "0")
            ),
            (["nested too deeply"], '{"errors": ' + "[" * 200000),
            (
                ["nested too deeply"],
                json.dumps(self.EVALUATION | {"results": [{"errors": 0}]}).replace(
                    '"errors": 0', '"errors": ' + "[" * 100000 + "]" * 100000
                ),
            ),
            (
                ["/results/2/saliency", "head"],
                changed(lambda e: e["results"][2].update(saliency={"layer": 0})),
            ),
        ):
            with self.subTest(words=words):
                results = self.write("bad.json", text.encode())
                self.refuses(2, ["bad.json", *words], "report", results, "-o", page)
                self.assertFalse(page.exists())
        self.refuses(1, ["/no/eval.json"], "report", "/no/eval.json", "-o", page)
        good = self.write("good.json", json.dumps(self.EVALUATION))
        self.refuses(1, ["/no/x.csv"], "report", good, "-o", page, "--csv", "/no/x.csv")
        self.assertFalse(page.exists())

    def test_inspect_gives_the_bytes_of_every_layer(self):
        report = json.loads(
            self.succeeds(
                "inspect", "-m", self.model, "--kv-preset", "exact", "-c", "1024", "--json"
            )
        )
        (layers,) = report["layers"]
        self.assertEqual(
            (layers["first_layer"], layers["last_layer"], layers["kv_heads"]), (0, 3, 3)
        )
        self.assertEqual(layers["bytes_per_token"], 3 * (128 + 128))
        f16 = report["caches"][0]
        self.assertEqual(
            (f16["cache"], f16["mib"], f16["bits_per_element"]),
            ("f16", 4 * 3 * 256 * 1024 / 2**20, 16),
        )
        packed = json.loads(self.succeeds("inspect", "-m", self.model, "-c", "4096", "--json"))[
            "caches"
        ][-1]
        self.assertLess(packed["bits_per_element"], 5)

    def test_inspect_solves_a_budget_as_the_plugin_does(self):
        def bits(model, *args):
            report = json.loads(self.succeeds("inspect", "-m", model, *args, "--json"))
            return report["caches"][-1]["bits_per_element"], report["layers"]

        args = ["-c", "8192", "--kv-budget"]
        for model in (self.model, self.write("g.gguf", gguf(GEMMA))):
            for budget in (4.8, 5.5, 7, 16):
                got, _ = bits(model, *args, f"{budget}bpe")
                self.assertLessEqual(got, budget + 1e-6)
                self.assertGreater(got, budget - 0.5)
        _, layers = bits(self.model, *args, "4.8bpe", "--kv-sensitivity", "2:50")
        rows = {g["first_layer"]: g["key_row_bytes"] for g in layers}
        self.assertGreater(rows[2], rows[0])
        inspect = ["inspect", "-m", self.model, *args]
        self.refuses(2, ["--kv-budget", "1.5bpe", "least"], *inspect, "1.5bpe")
        self.refuses(2, ["--kv-budget", "4 bits"], *inspect, "4 bits")
        self.refuses(2, ["--kv-sensitivity", "2"], *inspect, "5bpe", "--kv-sensitivity", "2")
        self.refuses(
            2, ["--kv-budget", "5bpe"], "fit", "-m", self.model, "--memory", "1GiB", *args[2:], "5bpe"
        )

    def test_inspect_knows_layers_of_their_own(self):
        args = ["inspect", "-m", self.model, "--kv-layers", "2=exact", "--kv-protect", "first:1"]
        args += ["--kv-preset", "spark-0.5-i5"]
        self.assertEqual(
            [
                (g["first_layer"], g["last_layer"], g["key_row_bytes"], g["value_row_bytes"])
                for g in json.loads(self.succeeds(*args, "--json"))["layers"]
            ],
            [(0, 0, 66, 66), (1, 1, 34, 34), (2, 2, 128, 128), (3, 3, 34, 34)],
        )
        self.refuses(2, ["--kv-layers", "4", "4 layers"], *args[:3], "--kv-layers", "4=exact")

    def test_inspect_knows_heads_that_differ_by_layer_and_sliding_windows(self):
        report = json.loads(
            self.succeeds(
                "inspect", "-m", self.write("g.gguf", gguf(GEMMA)), "-c", "32768", "--json"
            )
        )
        self.assertEqual(
            [
                (g["first_layer"], g["last_layer"], g["kv_heads"], g["sliding_window"])
                for g in report["layers"]
            ],
            [(0, 3, 1, True), (4, 4, 2, True), (5, 5, 1, False)],
        )
        self.assertEqual(report["caches"][0]["mib"], (6 * 1024 + 32768) * 1024 / 2**20)

    def fit(self, model, memory, *args):
        done = self.succeeds("fit", "-m", model, "--memory", memory, *args, "--json")
        report = json.loads(done)
        return report, {row["cache"]: row for row in report["caches"]}

    def test_fit_finds_the_context_that_fills_the_memory_to_the_byte(self):
        per_token = 4 * 3 * (64 + 64) * 2
        for memory, context in ((1024, 1024), (1279, 1024), (1280, 1280), (256, 256), (255, 0)):
            self.assertEqual(self.fit(self.model, memory * per_token)[1]["f16"]["context"], context)
        self.assertEqual(self.fit(self.model, 1024 * per_token - 1)[1]["f16"]["context"], 768)
        _, rows = self.fit(self.model, 16384 * per_token)
        presets = ["exact", "safe", "balanced", "small"]
        self.assertEqual(list(rows), ["f16", "q8_0", "q4_0", *presets])
        self.assertEqual((rows["f16"]["times_f16"], rows["f16"]["times_trained"]), (1, 2))
        self.assertEqual(rows["f16"]["bits_per_element"], 16)
        self.assertEqual(rows["q4_0"]["context"], 16384 * 32 // 9 // 256 * 256)
        self.assertEqual(rows["q4_0"]["times_f16"], rows["q4_0"]["context"] / 16384)
        self.assertEqual(rows["exact"]["context"], 16384)

    def test_what_fit_prints_fits_by_inspect_and_one_step_more_does_not(self):
        gemma = self.write("g.gguf", gguf(GEMMA))
        for model, memory, presets in (
            (self.model, "5MiB", "exact,spark-0.5-i8,spark-0.5-i5"),
            (self.model, "3MiB", "safe,balanced,tiny"),
            (self.model, "4GiB", "exact,spark-0.8"),
            (gemma, "100 MB", "spark-0.5-i5,spark-0.5-i4"),
        ):
            report, rows = self.fit(model, memory, "--kv-preset", presets)
            for name, row in rows.items():
                for more, fits in ((0, True), (256, False)):
                    args = ["-c", row["context"] + more, "--kv-preset", name, "--json"]
                    caches = json.loads(self.succeeds("inspect", "-m", model, *args))["caches"]
                    (found,) = (cache for cache in caches if cache["cache"] == name)
                    with self.subTest(model=model, name=name, context=row["context"], more=more):
                        self.assertGreater(row["context"], 0)
                        bytes_there = found["mib"] * 2**20
                        self.assertEqual(bytes_there <= report["memory_bytes"], fits)
                        if fits:
                            self.assertEqual(found["bits_per_element"], row["bits_per_element"])

    def test_fit_says_any_for_windowed_layers_alone_and_less_than_for_no_room(self):
        pattern = ("gemma3.attention.sliding_window_pattern", [1] * 6)
        windows = self.write("w.gguf", gguf(GEMMA + [pattern, ("gemma3.context_length", 8192)]))
        full = 7 * 1024 * 1024  # heads x tokens x bytes: a window and a micro-batch in each
        _, rows = self.fit(windows, full)
        self.assertEqual((rows["f16"]["any_context"], rows["f16"]["context"]), (True, None))
        self.assertEqual(rows["f16"]["bits_per_element"], 16)
        self.assertEqual((rows["exact"]["context"], rows["exact"]["any_context"]), (None, True))
        self.assertEqual(self.fit(windows, full - 1)[1]["f16"]["context"], 768)
        text = self.succeeds("fit", "-m", windows, "--memory", full)
        self.assertRegex(text, r"\nf16 +16\.00 +any +- +-\n")
        self.assertIn("KV cache alone", text)
        self.assertIn("trained for 8192 tokens", text)
        text = self.succeeds("fit", "-m", self.model, "--memory", "700 KB")
        self.assertRegex(text, r"\nf16 +- +less than 256 +- +-\n")
        self.assertNotIn("trained for", text)

    def test_bytes_of_caches_that_evict_are_said_to_be_those_of_a_prompt(self):
        words = ["-m", self.model, "--kv-evict", "snapkv:512"]
        for command in (["fit", "--memory", "5MiB", "--kv-preset", "exact"], ["inspect"]):
            done = self.run_sparkv(*command, *words)
            self.assertEqual(done.returncode, 0)
            self.assertIn("heads evict down to 512 tokens when it has ended", done.stderr)

    def test_fit_reads_sizes_and_refuses_what_is_none(self):
        for text, size in (
            ("4GiB", 2**32),
            ("4 GiB", 2**32),
            ("1.5MiB", 3 * 2**19),
            ("0.5 KiB", 512),
            ("2GB", 2 * 10**9),
            ("2.5 MB", 2500000),
            ("3KB", 3000),
            ("123456789", 123456789),
            ("1048576GiB", 2**50),
        ):
            self.assertEqual(self.fit(self.model, text)[0]["memory_bytes"], size, text)
        for text in (
            *("0", "0.5", "-1", "-4GiB", "nan", "inf", "-inf", "1048577GiB", "9" * 400),
            *("4gib", "4G", "4TiB", "4  GiB", "4GiB ", " 4GiB", "4,5GiB", "4GiBx", "4\nGiB"),
            *("1e9", "0x10", "GiB", " ", "four"),
        ):
            with self.subTest(text=text):
                shown = text.replace("\n", "?")
                words = ["--memory", f"'{shown}'"]
                self.refuses(2, words, "fit", "-m", self.model, f"--memory={text}")

    def test_a_damaged_model_is_refused_by_field_and_value(self):
        key = "llama.attention.head_count_kv"
        for words, data in (
            (["magic"], gguf(SMALL, magic=b"GGML")),
            (["version", "9"], gguf(SMALL, version=9)),
            (["metadata_kv_count", "18446744073709551615"], gguf(SMALL, count=2**64 - 1)),
            (["llama.block_count", "0"], gguf(changed("llama.block_count", 0))),
            (["llama.block_count", "4294967295"], gguf(changed("llama.block_count", 2**32 - 1))),
            ([key, "3 items for 4 layers"], gguf(changed(key, [3, 3, 3]))),
            ([key, "-1"], gguf(changed(key, [3, 3, 3, -1]))),
            (["llama.block_count"], gguf(changed("llama.block_count", "four"))),
            (["general.architecture"], gguf([("x", 1)])),
            (["twice"], gguf(SMALL + [("llama.block_count", 4)])),
            (
                ["llama.embedding_length", "is missing"],
                gguf([p for p in SMALL if p[0] != "llama.embedding_length"]),
            ),
            (["tokenizer.ggml.tokens"], gguf(SMALL)[:-1]),
            (["key_length 7"], gguf(SMALL + [("llama.attention.key_length", 7)])),
        ):
            with self.subTest(words=words):
                self.refuses(1, words, "inspect", "-m", self.write("bad.gguf", data))

    def test_no_cut_and_no_flipped_byte_of_a_model_crashes_inspect(self):
        whole = gguf(SMALL)
        for cut in range(0, len(whole), 3):
            self.refuses(1, ["bad.gguf"], "inspect", "-m", self.write("bad.gguf", whole[:cut]))
        for at in range(0, len(whole), 2):
            flipped = whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]
            done = self.run_sparkv("inspect", "-m", self.write("bad.gguf", flipped))
            self.assertIn(done.returncode, (0, 1), (at, done))

    def saliency(self, **changes):
        data = {
            "layer": 2,
            "head": 1,
            "head_dim": 16,
            "tokens": 3,
            "kept": ["ffff", "0f00", "f00f"],
            "saliency": ["00" * 16, "ff" * 16, "80" * 16],
        }
        data.update(changes)
        return self.write("saliency.json", json.dumps(data))

    def test_the_picture_of_a_head_is_well_formed_and_self_contained(self):
        for suffix in ("svg", "html"):
            picture = self.folder / ("head." + suffix)
            self.assertEqual(
                self.succeeds("inspect", "--saliency", self.saliency(), "-o", picture).strip(),
                str(picture),
            )
            text = picture.read_text()
            svg = text[text.index("<svg") : text.index("</svg>") + 6]
            xml.etree.ElementTree.fromstring(svg)
            self.assertNotIn("src=", text)
            self.assertIn("layer 2, KV head 1", text)
            self.assertIn("3 tokens x 16 channels; 1 tokens dense", text)

    def test_a_damaged_picture_file_is_refused_by_field_and_value(self):
        for words, changes in (
            (["tokens", "0"], {"tokens": 0}),
            (["head_dim", "100000"], {"head_dim": 100000}),
            (["kept"], {"kept": ["ffff"]}),
            (["kept[1]"], {"kept": ["ffff", "0f", "f00f"]}),
            (["saliency[2]", "'g'"], {"saliency": ["00" * 16, "ff" * 16, "g0" * 16]}),
            (["layer"], {"layer": "two"}),
        ):
            with self.subTest(changes=changes):
                self.refuses(
                    1,
                    words,
                    "inspect",
                    "--saliency",
                    self.saliency(**changes),
                    "-o",
                    self.folder / "x.svg",
                )
        self.refuses(
            1,
            ["not a JSON object"],
            "inspect",
            "--saliency",
            self.write("broken.json", "{"),
            "-o",
            "x.svg",
        )

    def test_completion_scripts_know_commands_and_options(self):
        for shell in ("bash", "zsh", "fish"):
            script = self.succeeds("--completion", shell)
            for word in ("inspect", "fit", "kv-ratio", "requantize-f32", "memory"):
                self.assertIn(word, script)
        script = self.succeeds("--completion", "bash")
        for words, offers in (
            ("sparkv ins", "inspect"),
            ("sparkv fi", "fit"),
            ("sparkv ch", "check"),
            ("sparkv check --requ", "--requantize-f32"),
            ("sparkv eval --ask b", "before"),
            ("sparkv fit --mem", "--memory"),
            ("sparkv bench --kv-pre", "--kv-preset"),
            ("sparkv bench --kv-recover m", "mean"),
            ("sparkv run --kv-preset spark-0.8", "spark-0.8"),
            ("sparkv eval --baselines kivi", "kivi-2 kivi-4"),
            ("sparkv run -m mod", ""),  # the shell offers files
        ):
            ask = f'COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}}-1)); _sparkv; '
            done = subprocess.run(
                ["bash", "-c", script + ask + 'echo "${COMPREPLY[@]}"'],
                capture_output=True,
                text=True,
                check=True,
            )
            self.assertEqual(done.stdout.strip(), offers)


if __name__ == "__main__":
    unittest.main()
