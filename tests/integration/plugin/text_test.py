#!/usr/bin/env python3
"""With `exact` and F32 weights the text is llama.cpp's own, however the work is cut up."""
import unittest

import host

TOKENS = 100
PROMPTS = {  # lengths below, above and well above the window and a small micro-batch
    "short": "The capital of France is",
    "question": "Q: Why do ferries float?\nA: Because of the salt merchant's widow, who said:",
    "page": host.DOCUMENT[:900],
}
VARIANTS = {
    "as it comes": (PROMPTS, ["-t", "2"], {}),
    "plain C++, one thread, small micro-batches": (["page"], ["-t", "1", "-ub", "16"],
                                                   {"SPARKV_SIMD": "plain"}),
    "AVX2, two threads, large micro-batches": (["page"], ["-t", "2", "-ub", "512"],
                                               {"SPARKV_SIMD": "avx2"}),
}


def complete(prompt, *args, **options):
    return host.run("llama-completion", "-m", host.f32_model(), "-p", prompt, "-n", TOKENS,
                    "-c", 512, "--temp", 0, "--ignore-eos", "-no-cnv", "--no-warmup",
                    "--no-display-prompt", *args, **options)


class Text(unittest.TestCase):

    def test_exact_writes_what_llama_cpp_writes(self):
        plain = {name: complete(prompt, "-t", 2, "-fa", "off", plugin=False)
                 for name, prompt in PROMPTS.items()}
        for variant, (prompts, args, variables) in VARIANTS.items():
            isa = variables.get("SPARKV_SIMD")
            if isa == "avx2" and not {"avx2", "f16c", "bmi2"} <= set(host.CPU_FLAGS):
                print(f"this CPU cannot run: {variant}")
                continue
            for name in prompts:
                with self.subTest(prompt=name, variant=variant):
                    self.assertEqual(plain[name].code, 0, plain[name])
                    ours = complete(PROMPTS[name], *args, "-fa", "on", SPARKV_PRESET="exact",
                                    **variables)
                    self.assertEqual(ours.code, 0, ours)
                    self.assertEqual(ours.out, plain[name].out)
                    self.assertIsNotNone(ours.stats, ours)
                    self.assertGreaterEqual(ours.stats["tokens"], TOKENS)
                    self.assertEqual(ours.stats["preset"], "exact")
                    if isa:
                        self.assertEqual(ours.stats["isa"], isa)


if __name__ == "__main__":
    host.main()
