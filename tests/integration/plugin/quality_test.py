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

    def divergence(self, preset, **variables):
        """Mean KL divergence and SPARKV_STATS."""
        if preset:
            variables["SPARKV_PRESET"] = preset
        ours = self.perplexity("--kl-divergence-base", self.base, "--kl-divergence", "-fa", "on",
                               **variables)
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

    def test_what_heads_lose_is_told_and_falls_with_bits(self):
        means = []
        for preset in ("tiers-7432", "tiers-4210"):
            divergence, stats = self.divergence(preset, SPARKV_ERRORS="1")
            errors = stats["caches"][0]["errors"]
            self.assertEqual([layer["layer"] for layer in errors], list(range(30)))
            for kind in ("keys", "values"):
                self.assertEqual({len(layer[kind]) for layer in errors}, {3})
                self.assertGreater(min(min(layer[kind]) for layer in errors), 1e-3)
            means.append([sum(sum(layer[kind]) for layer in errors) / 90
                          for kind in ("keys", "values")])
            plain, stats = self.divergence(preset)
            self.assertNotIn("errors", stats["caches"][0])
            self.assertEqual(divergence, plain)
        self.assertGreater(means[1][0], 1.5 * means[0][0])
        self.assertGreater(means[1][1], 2 * means[0][1])

    def test_recent_rows_take_bits_and_loss_between_window_and_packed(self):
        packed, packed_stats = self.divergence("tiers-4210", SPARKV_WINDOW="16")
        staged, stats = self.divergence("tiers-4210", SPARKV_WINDOW="16",
                                        SPARKV_RECENT="64:i8+q8,192:t7432+t4")
        print(f"{packed:.4f} at {packed_stats['bits_per_element']:.2f} bits, with stages "
              f"{staged:.4f} at {stats['bits_per_element']:.2f}")
        self.assertLess(staged, packed / 2)
        self.assertGreater(stats["bits_per_element"], packed_stats["bits_per_element"] + 0.5)
        self.assertLess(stats["bits_per_element"], packed_stats["bits_per_element"] + 3)

    def test_the_chosen_presets_lose_more_for_fewer_bits(self):
        ladder = []
        for preset in ("safe", "balanced", "small", "tiny"):
            divergence, stats = self.divergence(preset)
            ladder.append((divergence, stats["bits_per_element"]))
        print(ladder)
        # A short text lies in the same first stage in balanced and small.
        for (less, more_bits), (more, less_bits) in zip(ladder, ladder[1:]):
            self.assertLessEqual(less, more)
            self.assertLess(less_bits, more_bits + 0.001)
        self.assertLess(2 * ladder[2][0], ladder[3][0])
        self.assertLess(2 * ladder[0][0], ladder[1][0])
        self.assertLess(ladder[-1][0], 0.1)


if __name__ == "__main__":
    host.main()
