#!/usr/bin/env python3
"""How far the distribution of the next token is from an f32 cache's, by llama-perplexity."""
import pathlib
import re
import tempfile
import unittest

import host


class Quality(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.folder.cleanup)
        cls.text = pathlib.Path(cls.folder.name) / "text"
        cls.text.write_text(host.DOCUMENT[:6000])
        cls.base = pathlib.Path(cls.folder.name) / "base"
        plain = cls.perplexity("--kl-divergence-base", cls.base, "-fa", "off", "-ctk", "f32",
                               "-ctv", "f32", plugin=False)
        assert plain.code == 0 and cls.base.exists(), plain

    @classmethod
    def perplexity(cls, *args, **options):
        return host.run("llama-perplexity", "-m", host.f32_model(), "-f", cls.text, "-c", 512,
                        "--chunks", 2, "-t", 2, *args, **options)

    def divergence(self, preset):
        """Mean KL divergence and SPARKV_STATS."""
        ours = self.perplexity("--kl-divergence-base", self.base, "--kl-divergence", "-fa", "on",
                               **{"SPARKV_PRESET": preset} if preset else {})
        self.assertEqual(ours.code, 0, ours)
        mean = re.search(r"Mean +KLD: +(-?[0-9.]+)", ours.out + ours.err)
        self.assertIsNotNone(mean, ours)
        return float(mean[1]), ours.stats

    def test_exact_is_exact(self):
        divergence, stats = self.divergence("exact")
        self.assertLessEqual(divergence, 1e-5)
        self.assertGreaterEqual(stats["tokens"], 512)

    def test_the_default_preset_loses_little_and_packs(self):
        divergence, stats = self.divergence(None)
        self.assertGreaterEqual(divergence, 1e-5, "is anything packed at all?")
        self.assertLessEqual(divergence, 0.1)
        self.assertGreaterEqual(stats["tokens"], 512)
        self.assertLess(stats["bits_per_element"], 8)


if __name__ == "__main__":
    host.main()
