"""The main job of `make demo`: one question over one long document, asked twice of llama-server.

First with llama.cpp's plain f16 cache, then with the sparkv plugin, in the same unmodified program.
Prints a table on stdout and writes build/demo/ (index.html, result.json, saliency.json, server
logs). Standard library only.
"""

import argparse
import json
import math
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import page

ROOT = pathlib.Path(__file__).resolve().parents[2]
SYSTEM = "You are a helpful assistant."
QUESTION = "What was the name of the first boat?"
EXPECTED = "Patient Heron"
CONTEXT = 8192
TWIN_CONTEXT = 256  # the smallest that llama.cpp allocates
ANSWER_TOKENS = 48
DECODE_TOKENS = 48
MIB = 1024 * 1024
SALIENCY = (12, 1)  # layer and head of the picture


class DemoError(Exception):
    pass


def say(text, last=[0.0]):
    """Progress: rewritten in place on a terminal; elsewhere a plain line every three seconds."""
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K" + text)
    elif time.monotonic() - last[0] >= 3:
        sys.stderr.write(text + "\n")
        last[0] = time.monotonic()
    sys.stderr.flush()


class Server:
    """llama-server on a free local port. `environment` and `flags` choose the cache."""

    def __init__(self, options, context, log, environment, flags):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [
            str(options.server),
            "-m",
            str(options.model),
            "-c",
            str(context),
            "-t",
            str(options.threads),
            "-b",
            "512",
            "-ub",
            "128",
            "-np",
            "1",
            "-fa",
            "on",
            "-fit",
            "off",
            "--cache-ram",
            "0",
            "--no-webui",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            *flags,
        ]
        self.log = log
        inherited = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("SPARKV_", "GGML_BACKEND_PATH"))
        }
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={"OMP_WAIT_POLICY": "passive", **inherited, **environment},
            )

    def __enter__(self):
        while True:
            if self.process.poll() is not None:
                raise DemoError(
                    "llama-server ended with exit code %d; the end of %s:\n%s"
                    % (self.process.returncode, self.log, "".join(open(self.log).readlines()[-8:]))
                )
            try:
                with urllib.request.urlopen("http://127.0.0.1:%d/health" % self.port, timeout=5):
                    return self
            except (urllib.error.URLError, OSError):
                time.sleep(0.05)

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def post(self, path, body):
        request = urllib.request.Request(
            "http://127.0.0.1:%d%s" % (self.port, path),
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=1800) as answer:
                return json.load(answer)
        except (urllib.error.URLError, OSError) as error:
            raise DemoError(
                "llama-server does not answer %s (%s); the end of %s:\n%s"
                % (path, error, self.log, "".join(open(self.log).readlines()[-8:]))
            ) from error

    def complete(self, tokens, n_predict, **more):
        return self.post(
            "/completion",
            {
                "prompt": tokens,
                "n_predict": n_predict,
                "temperature": 0,
                "cache_prompt": True,
                "return_tokens": True,
                **more,
            },
        )

    def tokens(self, text, special=True):
        return self.post("/tokenize", {"content": text, "parse_special": special})["tokens"]

    def resident(self):
        """(now, highest so far) of the process, in MiB, as Linux counts it."""
        fields = {}
        for line in open("/proc/%d/status" % self.process.pid):
            name, _, value = line.partition(":")
            if name in ("VmRSS", "VmHWM"):
                fields[name] = int(value.split()[0]) / 1024
        return fields["VmRSS"], fields["VmHWM"]

    def next_token(self, tokens):
        """Log probabilities of all tokens of the vocabulary after `tokens`."""
        answer = self.complete(tokens, 1, n_probs=1 << 20)
        return {
            entry["id"]: entry["logprob"]
            for entry in answer["completion_probabilities"][0]["top_logprobs"]
        }


def prompt_text(document):
    return (
        "<|im_start|>system\n%s<|im_end|>\n"
        "<|im_start|>user\n%s\n\nQuestion: %s<|im_end|>\n<|im_start|>assistant\n"
        % (SYSTEM, document, QUESTION)
    )


def kl_divergence(base, other):
    """Sum over the vocabulary of p (log p - log q), in nats."""
    total = 0.0
    for token, log_p in base.items():
        if log_p > -80:
            total += math.exp(log_p) * (log_p - max(other.get(token, -1e3), -1e3))
    return max(total, 0.0)


def ask(options, name, environment, flags, forced=None):
    """One run: prompt, answer, speed, memory; distributions along `forced`, or its own answer."""
    document = options.document.read_text().strip()
    # The twin is the same program with next to no cache: what it needs is what the cache does not.
    say("%s: a twin with an empty cache, to compare memory" % name)
    with Server(
        options, TWIN_CONTEXT, options.out / (name + "-twin.log"), environment, flags
    ) as twin:
        twin.complete(twin.tokens(document)[: TWIN_CONTEXT - 16], 2)
        twin_now, _ = twin.resident()

    more = dict(environment)
    stats_file = options.out / (name + "-stats.json")
    if environment:
        stats_file.unlink(missing_ok=True)
        more["SPARKV_STATS"] = str(stats_file)
        more["SPARKV_SALIENCY"] = "%s:%d:%d" % (options.out / "saliency.json", *SALIENCY)
    with Server(options, CONTEXT, options.out / (name + ".log"), more, flags) as server:
        tokens = server.tokens(prompt_text(document))
        n_document = len(server.tokens(document, False))
        say("%s: reading %d tokens" % (name, len(tokens)))
        answer = server.complete(tokens, ANSWER_TOKENS)
        now, peak = server.resident()
        say("%s: generating" % name)
        decode = server.complete(tokens + answer["tokens"], DECODE_TOKENS, ignore_eos=True)
        forced = forced if forced is not None else answer["tokens"]
        distributions = []
        for i in range(len(forced)):
            say("%s: distribution of answer token %d of %d" % (name, i + 1, len(forced)))
            distributions.append(server.next_token(tokens + forced[:i]))
    result = {
        "cache": name,
        "answer": answer["content"].strip(),
        "right": EXPECTED.lower() in answer["content"].lower(),
        "document_tokens": n_document,
        "prompt_tokens": len(tokens),
        "prefill_tokens_per_second": answer["timings"]["prompt_per_second"],
        "decode_tokens_per_second": decode["timings"]["predicted_per_second"],
        "kv_resident_mib": now - twin_now,
        "kv_peak_mib": peak - twin_now,
        "process_mib": now,
        "process_peak_mib": peak,
        "twin_mib": twin_now,
        "stats": json.loads(stats_file.read_text()) if environment else None,
    }
    return result, answer["tokens"], distributions


def bits(result, which):
    return 16.0 if result["stats"] is None else result["stats"][which]


def table(report):
    plain, packed = report["results"]
    rows = [
        ("", plain["cache"], packed["cache"]),
        (
            "KV cache resident, measured",
            "%.1f MiB" % plain["kv_resident_mib"],
            "%.1f MiB" % packed["kv_resident_mib"],
        ),
        ("  its peak", "%.1f MiB" % plain["kv_peak_mib"], "%.1f MiB" % packed["kv_peak_mib"]),
        ("  by sparkv's own account", "-", "%.1f MiB" % (packed["stats"]["resident_bytes"] / MIB)),
        (
            "bits per element, K",
            "%.2f" % bits(plain, "keys_bits_per_element"),
            "%.2f" % bits(packed, "keys_bits_per_element"),
        ),
        (
            "bits per element, V",
            "%.2f" % bits(plain, "values_bits_per_element"),
            "%.2f" % bits(packed, "values_bits_per_element"),
        ),
        (
            "prefill, tokens/s",
            "%.1f" % plain["prefill_tokens_per_second"],
            "%.1f" % packed["prefill_tokens_per_second"],
        ),
        (
            "decode, tokens/s",
            "%.1f" % plain["decode_tokens_per_second"],
            "%.1f" % packed["decode_tokens_per_second"],
        ),
        ("mean KL to f16 over the answer", "0", "%.4f" % packed["mean_kl"]),
        ("answer is right", *("yes" if r["right"] else "NO" for r in (plain, packed))),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        "  ".join((row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2].rjust(widths[2])))
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def notes(report):
    stats = report["results"][1]["stats"]
    return [
        "Resident: VmRSS of llama-server with the document in its cache, minus VmRSS of a twin "
        "with the same flags but -c %d. For the peak, VmHWM takes the place of the first."
        % TWIN_CONTEXT,
        "llama.cpp fills an f16 cache with zeros at the start, so all %s cells are resident; the "
        "%s tokens in it need %.1f MiB as f16."
        % (format(CONTEXT, ","), format(stats["tokens"], ","), stats["f16_bytes"] / MIB),
        "KL: the f16 answer (%d tokens) is forced on both; at each token the next-token "
        "distributions over the whole vocabulary are compared, in nats." % report["answer_tokens"],
        "Decode: %d further tokens, with everything before them in the cache. One run each: the "
        "speed varies with the load of the machine (%.1f at the start)."
        % (DECODE_TOKENS, report["load"]),
    ]


def arguments():
    build = ROOT / "build"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=pathlib.Path, default=build / "models" / "smollm2-135m-instruct-q4_1.gguf"
    )
    parser.add_argument(
        "--document", type=pathlib.Path, default=ROOT / "tools" / "demo" / "document.txt"
    )
    parser.add_argument("--server", type=pathlib.Path, default=build / "bin" / "llama-server")
    parser.add_argument("--plugin", type=pathlib.Path, default=build / "lib" / "libggml-sparkv.so")
    parser.add_argument("--sparkv", type=pathlib.Path, default=build / "bin" / "sparkv")
    parser.add_argument(
        "--out", type=pathlib.Path, default=build / "demo", help="folder for the page and the logs"
    )
    parser.add_argument("--preset", default="", help="sparkv preset; its default when empty")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser.parse_args()


def main():
    options = arguments()
    for path in (options.model, options.document, options.server, options.plugin, options.sparkv):
        if not path.is_file():
            raise DemoError("%s: not found; `make build` makes it" % path)
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    load = os.getloadavg()[0]

    plain, answer, base = ask(options, "f16", {}, ["-dev", "none"])
    environment = {"GGML_BACKEND_PATH": str(options.plugin.resolve())}
    if options.preset:
        environment["SPARKV_PRESET"] = options.preset
    packed, _, other = ask(options, "sparkv", environment, ["-dev", "SPARKV", "-ngl", "99"], answer)
    packed["cache"] = packed["stats"]["preset"]
    divergences = [kl_divergence(p, q) for p, q in zip(base, other)]
    packed["mean_kl"] = sum(divergences) / max(len(divergences), 1)

    report = {
        "question": QUESTION,
        "model": options.model.name,
        "document": options.document.name,
        "document_tokens": plain["document_tokens"],
        "context": CONTEXT,
        "threads": options.threads,
        "load": load,
        "answer_tokens": len(answer),
        "kl_by_token": divergences,
        "results": [plain, packed],
        "seconds": time.monotonic() - started,
    }
    report["notes"] = notes(report)
    picture = options.out / "saliency.svg"
    drawn = subprocess.run(
        [
            str(options.sparkv),
            "inspect",
            "--saliency",
            str(options.out / "saliency.json"),
            "-o",
            str(picture),
        ],
        stdout=subprocess.DEVNULL,
    )
    if drawn.returncode != 0:
        raise DemoError("%s inspect --saliency failed" % options.sparkv)
    (options.out / "result.json").write_text(json.dumps(report, indent=2))
    (options.out / "index.html").write_text(page.render(report, picture.read_text()))

    if sys.stderr.isatty():
        say("")
    print(
        "%s, a document of %d tokens, llama-server -c %d, %d threads"
        % (report["model"], report["document_tokens"], CONTEXT, options.threads)
    )
    print("\nQuestion  %s" % QUESTION)
    for result in report["results"]:
        print("%-9s %s" % (result["cache"] if result is plain else "sparkv", result["answer"]))
    print("\n" + table(report) + "\n")
    for note in report["notes"]:
        print(note)
    print("\nPage: %s (%.0f s)" % (options.out / "index.html", report["seconds"]))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server ends with us
    try:
        sys.exit(main())
    except DemoError as error:
        print("demo: %s" % error, file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(1)
