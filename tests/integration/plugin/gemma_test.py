#!/usr/bin/env python3
"""Gemma-3-270m: one KV head of 256 channels, and sliding-window layers in a cache of their own."""
import unittest

import host

MODEL = host.MODEL.parent / "gemma-3-270m-q4_k_m.gguf"


def complete(*args, model=MODEL, **options):
    return host.run("llama-completion", "-m", model, "-n", 40, "-c", 2048, "-ub", 128, "--temp", 0,
                    "--ignore-eos", "-no-cnv", "--no-warmup", "--no-display-prompt", "-t", 2, *args,
                    **options)


class Gemma(unittest.TestCase):

    def test_exact_writes_what_llama_cpp_writes(self):
        prompt = host.DOCUMENT[:3500]  # longer than the sliding window of 512
        model = host.f32_model(MODEL)
        plain = complete("-p", prompt, "-fa", "off", model=model, plugin=False)
        ours = complete("-p", prompt, "-fa", "on", model=model, SPARKV_PRESET="exact")
        self.assertEqual((plain.code, ours.code), (0, 0), ours)
        self.assertEqual(ours.out, plain.out)
        self.assertEqual(len(ours.stats["caches"]), 2)

    def test_each_of_its_two_caches_is_packed(self):
        ours = complete("-p", host.DOCUMENT[:6500], "-fa", "on")
        self.assertEqual(ours.code, 0, ours)
        caches = ours.stats["caches"]
        self.assertEqual(sorted(cache["layers"] for cache in caches), [3, 15])
        for cache in caches:
            self.assertLess(cache["bits_per_element"], 7, cache)
            self.assertEqual(sum(cache["memory"].values()), cache["resident_bytes"])
        self.assertEqual(sum(cache["resident_bytes"] for cache in caches),
                         ours.stats["resident_bytes"])


if __name__ == "__main__":
    if not MODEL.exists():
        host.skip(f"{MODEL} is not there: 'make model-gemma' fetches it and shows its terms")
    host.main()
