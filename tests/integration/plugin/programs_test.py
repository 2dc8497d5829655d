#!/usr/bin/env python3
"""The programs that no other test here runs."""
import json
import re
import unittest

import host


class Programs(unittest.TestCase):

    def test_llama_bench_at_depth(self):
        bench = host.run("llama-bench", "-m", host.MODEL, "-p", 64, "-n", 8, "-d", 256, "-r", 2,
                         "-t", 2, "-fa", 1, "-o", "json")
        self.assertEqual(bench.code, 0, bench)
        rows = json.loads(bench.out)
        self.assertEqual([row["n_prompt"] for row in rows], [64, 0])
        for row in rows:
            self.assertGreater(row["avg_ts"], 0)
        self.assertIsNotNone(bench.stats, bench)
        self.assertEqual(max(cache["tokens"] for cache in bench.stats["caches"]), 256 + 64)
        # llama-bench fills the depth once and gives its state to later contexts.
        self.assertNotIn("restored rows", bench.err)
        for cache in bench.stats["caches"]:
            if cache["tokens"] > 256:
                self.assertLess(cache["bits_per_element"], 10, cache)

    def test_llama_cli_answers_once(self):
        def ask(*args, **options):
            cli = host.run("llama-cli", "-m", host.f32_model(), "-p", "Name three rivers.", "-st",
                           "-n", 24, "-c", 512, "--temp", 0, "-t", 2, *args, **options)
            self.assertEqual(cli.code, 0, cli)
            answer = re.search(r"Name three rivers\.\n(.*?)\[ Prompt:", cli.out, re.S)
            self.assertIsNotNone(answer, cli)
            return answer[1], cli.stats

        plain, _ = ask("-fa", "off", plugin=False)
        exact, stats = ask("-fa", "on", SPARKV_PRESET="exact")
        self.assertEqual(exact, plain)
        self.assertGreater(stats["tokens"], 30)
        packed, stats = ask("-fa", "on", SPARKV_WINDOW="16")
        self.assertTrue(packed.strip())
        self.assertLess(stats["bits_per_element"], 16)


if __name__ == "__main__":
    host.main()
