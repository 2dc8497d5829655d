#!/usr/bin/env python3
"""What cannot work says so in one line and ends the program cleanly; what can, works."""
import json
import os
import pathlib
import resource
import struct
import subprocess
import tempfile
import unittest

import host

PROMPT = host.DOCUMENT[:300]


def complete(*args, model=host.MODEL, **options):
    return host.run("llama-completion", "-m", model, "-p", PROMPT, "-n", 4, "-c", 512, "--temp", 0,
                    "-no-cnv", "--no-warmup", "--no-display-prompt", "-t", 2, *args, **options)


def checked(calibration):
    """The bytes with the checksum that they need."""
    checksum = 0xcbf29ce484222325
    for byte in calibration[16:]:
        checksum = (checksum ^ byte) * 0x100000001b3 & (1 << 64) - 1
    return bytes(calibration[:8]) + struct.pack("<Q", checksum) + bytes(calibration[16:])


def reversed_floats(data):
    return struct.pack(f"<{len(data) // 4}f", *struct.unpack(f"<{len(data) // 4}f", data)[::-1])


class Refused(unittest.TestCase):

    def check(self, result, *words, ours=True):
        """One line of ours that holds the words, or one of the host's alone."""
        self.assertGreater(result.code, 0, result)  # not a success, not a signal
        self.assertEqual(result.out.strip(), "", result)
        errors = [line for line in result.ours() if line.startswith("sparkv: error: ")]
        self.assertEqual(len(errors), 1 if ours else 0, result)
        for word in words:
            self.assertIn(word, errors[0] if ours else result.err)

    def test_settings_name_variable_and_value(self):
        for name, value in (("SPARKV_RATIO", "2"), ("SPARKV_RATIO", "-0.1"),
                            ("SPARKV_RATIO", "nan"), ("SPARKV_PRESET", "foo"),
                            ("SPARKV_KEPT", "i7"), ("SPARKV_VALUES", "q5"), ("SPARKV_WINDOW", "1e9"),
                            ("SPARKV_SINKS", "-1"), ("SPARKV_THREADS", "many"),
                            ("SPARKV_SEAL", "later"), ("SPARKV_SIMD", "neon"),
                            ("SPARKV_RECOVER", "median"), ("SPARKV_LOG", "loud"),
                            ("SPARKV_LAYERS", "3"), ("SPARKV_LAYERS", "3=spark-2"),
                            ("SPARKV_BUDGET", "4"), ("SPARKV_BUDGET", "-1bpe"),
                            ("SPARKV_SENSITIVITY", "3"), ("SPARKV_BASELINE", "kivi-3"),
                            ("SPARKV_PROTECT", "first"), ("SPARKV_PROTECT", "last:-1"),
                            ("SPARKV_FOO", "1")):
            with self.subTest(**{name: value}):
                result = complete("-fa", "on", **{name: value})
                # Of an unknown variable the name alone is at fault.
                self.check(result, name if name == "SPARKV_FOO" else f"{name}={value}")

    def test_settings_that_do_not_go_together(self):
        for words, variables in (
            ('evict: 1 tokens are not above', {"SPARKV_EVICT": "snapkv:1", "SPARKV_SIMD": "auto"}),
            ('baseline: "kivi-2" goes with', {"SPARKV_BASELINE": "kivi-2"}),
            ('baseline: "kivi-2" goes with', {"SPARKV_BASELINE": "kivi-2", "SPARKV_BUDGET": "5bpe",
                                              "SPARKV_PRESET": "exact"})):
            with self.subTest(**variables):
                self.check(complete("-fa", "on", **variables), "sparkv: error: " + words)

    def test_a_layer_that_the_model_does_not_have(self):
        self.check(complete("-fa", "on", SPARKV_LAYERS="29-40=exact,30=exact"),
                   "layers: 30 is none of the model's 30 layers")

    def test_a_budget_below_the_least(self):
        for budget in ("2bpe", "100KiB"):
            self.check(complete("-fa", "on", SPARKV_BUDGET=budget), f'budget: "{budget}" is below')

    def test_calibrations_that_do_not_fit(self):
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            good = folder / "good"
            result = complete("-fa", "on", SPARKV_CALIBRATE=str(good))
            self.assertEqual(result.code, 0, result)
            result = complete("-fa", "on", SPARKV_CALIBRATION=str(good))
            self.assertEqual(result.code, 0, result)
            whole = good.read_bytes()
            bad = folder / "bad"
            for name, data in (("cut", whole[:-1]), ("flipped", whole[:-1] + b"\x7f"),
                               ("empty", b""), ("noise", os.urandom(5000))):
                with self.subTest(name):
                    bad.write_bytes(data)
                    self.check(complete("-fa", "on", SPARKV_CALIBRATION=str(bad)),
                               f"SPARKV_CALIBRATION={bad}: calibration")
            missing = folder / "missing"
            self.check(complete("-fa", "on", SPARKV_CALIBRATION=str(missing)),
                       f"SPARKV_CALIBRATION={missing}: no such file")
            self.check(complete("-fa", "on", SPARKV_CALIBRATION=str(folder)),
                       f"SPARKV_CALIBRATION={folder}: not a regular file")
            # Layers of another model, in bytes that are good in themselves.
            layer = 16 + 2 * 3 * 64 * 4
            fewer = bytearray(whole[:-layer])
            fewer[656:660] = struct.pack("<I", 29)
            bad.write_bytes(checked(fewer))
            self.check(complete("-fa", "on", SPARKV_CALIBRATION=str(bad)), "without layer 29")
            turned = bytearray(whole[:664])
            for i in range(30):
                begin = 664 + i * layer
                turned += whole[begin:begin + 16] + reversed_floats(whole[begin + 16:begin + layer])
            bad.write_bytes(checked(turned))
            result = complete("-fa", "on", SPARKV_CALIBRATION=str(bad))
            self.assertGreater(result.code, 0, result)
            self.assertIn("made for another model", result.err)

    def test_cache_types_of_llama_cpp(self):
        self.check(complete("-fa", "on", "-ctk", "q8_0"), "cache_k_l0", "q8_0", "-ctk")
        self.check(complete("-fa", "on", "-ctv", "q4_0"), "cache_v_l0", "q4_0", "-ctv")
        self.check(complete("-fa", "on", "-ctk", "f32", "-ctv", "f32"), "cache_k_l0", "f32", "-ctk")

    def test_no_flash_attention(self):
        self.check(complete("-fa", "off"), "-fa on")

    def test_a_stats_file_that_cannot_be_written(self):
        result = complete("-fa", "on", SPARKV_STATS="/nonexistent/stats.json")
        self.assertEqual(result.code, 0, result)  # the answer is worth more than the report
        self.assertIn("sparkv: error: cannot write /nonexistent/stats.json", result.err)

    def test_a_layer_without_a_picture(self):
        with tempfile.TemporaryDirectory() as folder:
            result = complete("-fa", "on", SPARKV_SALIENCY=folder + "/picture:99:0")
            self.assertEqual(result.code, 0, result)
            self.assertIn("sparkv: error: SPARKV_SALIENCY: no cache has a layer 99", result.err)
            self.assertEqual(os.listdir(folder), [])

    def test_files_that_are_no_files(self):
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            result = complete("-fa", "on", SPARKV_WEIGHTS=str(folder))
            self.assertEqual(result.code, 0, result)
            self.assertIn(f"sparkv: error: cannot read {folder}: not a regular file", result.err)
            (folder / "real").write_text("old")
            (folder / "link").symlink_to(folder / "real")
            os.mkfifo(folder / "pipe")
            reader = subprocess.Popen(["cat", folder / "pipe"], stdout=subprocess.PIPE)
            for name in ("link", "pipe"):
                result = complete("-fa", "on", SPARKV_STATS=str(folder / name))
                self.assertEqual(result.code, 0, result)
            self.assertTrue((folder / "link").is_symlink())
            self.assertIn("bits_per_element", json.loads((folder / "real").read_text()))
            self.assertTrue((folder / "pipe").is_fifo())
            self.assertIn("bits_per_element", json.loads(reader.communicate(timeout=60)[0]))

    def test_files_of_others_are_not_replaced(self):
        with tempfile.TemporaryDirectory() as folder:
            other = pathlib.Path(folder) / "model.gguf"
            other.write_bytes(b"GGUF, or whatever was named by mistake")
            for name in ("SPARKV_WEIGHTS", "SPARKV_CALIBRATE"):
                result = complete("-fa", "on", **{name: str(other)})
                self.check(result, f"{name}={other}: a file that holds no")
            self.assertTrue(other.read_bytes().startswith(b"GGUF, or"))

    def check_model(self, model):
        """llama.cpp ends before its log thread has written the last lines, every other time."""
        for _ in range(10):
            result = complete("-fa", "on", model=model)
            self.check(result, ours=False)
            if model.name in result.err:
                return
        self.fail(f"the host never named {model.name}: {result}")

    def test_models_that_are_missing_or_damaged(self):
        with tempfile.TemporaryDirectory() as folder:
            cut = pathlib.Path(folder) / "cut.gguf"
            whole = host.MODEL.read_bytes()
            for name, data in (("half", whole[:len(whole) // 2]), ("header", whole[:1000]),
                               ("empty", b""), ("noise", b"GGUF" + bytes(range(256)) * 20)):
                cut.write_bytes(data)
                with self.subTest(name):
                    self.check_model(cut)
            with self.subTest("missing"):
                self.check_model(pathlib.Path(folder) / "none.gguf")

    def test_no_memory(self):
        """From where llama.cpp itself has enough to where all have: never a signal."""
        ours = []
        for limit in (560, 620, 680, 740, 800, 4000):
            with self.subTest(limit=f"{limit} MiB"):
                bytes_ = limit << 20
                result = complete("-fa", "on", "-c", 8192, before=lambda: resource.setrlimit(
                    resource.RLIMIT_AS, (bytes_, bytes_)))
                self.assertGreaterEqual(result.code, 0, result)
                errors = [line for line in result.ours() if "error" in line]
                self.assertLessEqual(len(errors), 1, result)
                self.assertTrue(result.code != 0 or not errors, result)
                ours += errors
        self.assertEqual(result.code, 0, "4000 MiB are enough")
        self.assertRegex("\n".join(ours), "cannot reserve [0-9]+ bytes of address space")


class Accepted(unittest.TestCase):

    def check(self, *args, tokens=1, **options):
        result = complete(*args, **options)
        self.assertEqual(result.code, 0, result)
        self.assertTrue(result.out.strip(), result)
        self.assertNotIn("sparkv: error", result.err)
        self.assertIsNotNone(result.stats, result)
        self.assertGreaterEqual(result.stats["tokens"], tokens, result)
        return result

    def test_flash_attention_is_found_by_itself(self):
        self.check("-fa", "auto")
        self.check()

    def test_some_layers(self):
        result = self.check("-fa", "on", "-ngl", 10)
        self.assertIn(result.stats["caches"][0]["layers"], range(9, 11))

    def test_no_layers_said_and_context_fitted(self):
        """-fit, on by default, measures with dummies and then chooses -ngl itself."""
        for fit in ("on", "off"):
            result = self.check("-fa", "on", "-fit", fit, device=["-dev", "SPARKV"])
            self.assertEqual(result.stats["caches"][0]["layers"], 30)

    def test_cache_kept_on_the_host(self):
        result = complete("-fa", "on", "-nkvo")
        self.assertEqual(result.code, 0, result)
        self.assertIn("sparkv: warning: no KV cache was put on device SPARKV (-nkvo", result.err)

    def test_values_at_their_bounds(self):
        self.check("-fa", "on", SPARKV_RATIO="1", SPARKV_SINKS="0", SPARKV_WINDOW="0",
                   SPARKV_PRESET="spark-0.5-i5")
        self.check("-fa", "on", SPARKV_RATIO="0", SPARKV_KEPT="i4", SPARKV_VALUES="q8")
        self.check("-fa", "on", SPARKV_SINKS="0", SPARKV_WINDOW="0", SPARKV_RECENT="1:i8+q8")
        self.check("-fa", "on", SPARKV_SEAL="prefill-end", SPARKV_RECOVER="paper",
                   SPARKV_GROUP="energy")

    def test_a_silent_log(self):
        self.assertEqual(self.check("-fa", "on", SPARKV_LOG="off").ours(), [])


if __name__ == "__main__":
    host.main()
