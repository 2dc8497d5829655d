#!/usr/bin/env python3
"""golden.py must pass on files that lack arrays and fail, with one line, on damage."""

import contextlib
import io
import os
import subprocess
import sys
import tempfile
import unittest

import numpy as np

import golden

HERE = os.path.dirname(os.path.abspath(__file__))


def run(directory):
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = golden.main([directory])
    return code, output.getvalue()


def arrays_of(name):
    with np.load(os.path.join(HERE, name), allow_pickle=False) as data:
        return {key: data[key] for key in data.files}


class GoldenTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.dir = folder.name

    def path(self, name="case.npz"):
        return os.path.join(self.dir, name)

    def expect(self, code, text):
        got, output = run(self.dir)
        self.assertEqual(got, code, output)
        self.assertIn(text, output)

    def test_one_changed_value_in_any_array_fails(self):
        for name in ("d64_g8_sampled.npz", "d64_g1.npz"):
            arrays = arrays_of(name)
            for key in arrays:
                if key in ("meta", "K", "Q", "V", "exp_unit", "normal_z"):
                    continue
                with self.subTest(file=name, array=key):
                    changed = dict(arrays)
                    changed[key] = arrays[key].copy()
                    flat = changed[key].reshape(-1)
                    flat[flat.size // 2] = flat[flat.size // 2] ^ 1 if flat.dtype == np.uint8 else \
                        flat[flat.size // 2] * np.float32(1.0625) + np.float32(0.001)
                    np.savez(self.path(), **changed)
                    code, output = run(self.dir)
                    self.assertEqual(code, 1)
                    self.assertRegex(output, rf"case.npz {key}: 1 mismatches.*: FAIL")

    def test_the_exit_code_is_that_of_the_comparison(self):
        command = [sys.executable, os.path.join(HERE, "golden.py")]
        self.assertEqual(subprocess.run(command + [HERE], stdout=subprocess.DEVNULL, check=False).returncode, 0)
        self.assertEqual(subprocess.run(command + [self.dir], stdout=subprocess.DEVNULL, check=False).returncode, 1)

    def test_a_truncated_file_fails(self):
        with open(os.path.join(HERE, "d64_g1.npz"), "rb") as source:
            data = source.read()
        for size in (0, 1, 100, len(data) // 2, len(data) - 1):
            with self.subTest(size=size):
                with open(self.path(), "wb") as target:
                    target.write(data[:size])
                self.expect(1, "case.npz: FAIL: damaged")

    def test_a_changed_byte_fails(self):
        with open(os.path.join(HERE, "d64_g8_sampled.npz"), "rb") as source:
            data = bytearray(source.read())
        for position in range(1000, len(data) - 5000, len(data) // 7):
            with self.subTest(position=position):
                damaged = bytearray(data)
                damaged[position] ^= 0x10
                with open(self.path(), "wb") as target:
                    target.write(damaged)
                self.expect(1, "case.npz: FAIL: damaged")

    def test_an_empty_or_missing_directory_fails(self):
        self.expect(1, "holds no .npz file")
        self.dir = os.path.join(self.dir, "missing")
        self.expect(1, "No such file or directory")

    def test_wrong_contents_fail_by_name(self):
        arrays = arrays_of("d64_g8_sampled.npz")
        without_meta = {key: arrays[key] for key in arrays if key != "meta"}
        for text, changed in (
                ("meta: missing", without_meta),
                ("meta: ", {**arrays, "meta": np.array([1, 2], np.int64)}),
                ("K: shape", {**arrays, "K": arrays["K"][..., :32]}),
                ("K: type float64", {**arrays, "K": arrays["K"].astype(np.float64)}),
                ("FAIL: unknown array", {**arrays, "other": arrays["K"]}),
                ("needs exp_unit", {key: arrays[key] for key in arrays if key != "exp_unit"}),
                ("inputs only", {key: arrays[key] for key in ("meta", "K", "Q")}),
                ("damaged or not", {**arrays, "K": np.array([{}], dtype=object)})):
            with self.subTest(text=text):
                np.savez(self.path(), **changed)
                self.expect(1, text)

    def test_files_may_lack_arrays(self):
        arrays = arrays_of("d64_g1.npz")
        for keys in (("meta", "V", "vmask_r30", "vtopp90_mean"), ("meta", "K", "q_norm", "kmean_r50"),
                     ("meta", "Q", "q_norm"), ("meta", "K", "Q", "group_id")):
            with self.subTest(keys=keys):
                np.savez(self.path(), **{key: arrays[key] for key in keys})
                self.expect(0, " 0 failures")


if __name__ == "__main__":
    unittest.main()
