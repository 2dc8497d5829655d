#!/usr/bin/env python3
"""Compares libsparkv with golden vectors: golden.py [DIR].

DIR holds .npz files as tests/golden/README.md describes them. Every array is computed again by the library (sampled and
quirk_ arrays by the double-precision reference) and compared; one line per array. Exit 0 if all agree, else 1.
SPARKV_LIB and SPARKV_REFERENCE_LIB name the shared libraries when they are not in build/lib.
"""

import ctypes
import functools
import os
import re
import sys
import zipfile

try:
    import numpy as np
except ImportError:
    sys.exit("golden: numpy is missing (apt-get install python3-numpy)")

HERE = os.path.dirname(os.path.abspath(__file__))
BUILT = os.path.join(os.path.dirname(os.path.dirname(HERE)), "build", "lib")
ZERO, MEAN = 0, 1  # sparkv_recover


class Problem(Exception):
    """One line for the user."""


class SparkvError(ctypes.Structure):
    _fields_ = [("text", ctypes.c_char * 512)]


def open_library(variable, default):
    path = os.environ.get(variable) or default
    try:
        return ctypes.CDLL(path)
    except OSError as error:
        raise Problem(f"{variable}: cannot load {path}: {error}") from None


def at(array, *index):
    """Address of array[index] of a contiguous array."""
    return ctypes.c_void_p(array.ctypes.data + sum(i * step for i, step in zip(index, array.strides)))


class Library:
    """The C functions of libsparkv over whole arrays."""

    def __init__(self):
        self.lib = open_library("SPARKV_LIB", os.path.join(BUILT, "libsparkv.so"))
        self.error = SparkvError()

    def call(self, name, *arguments):
        try:
            function = getattr(self.lib, name)
        except AttributeError:
            raise Problem(f"SPARKV_LIB: {name} is missing") from None
        if function(*arguments, ctypes.byref(self.error)) != 0:
            raise Problem(f"{name}: {self.error.text.decode(errors='replace')}")

    def weight(self, q, group):
        """q: [B, Hkv * group, W, D] -> [B, Hkv, D]"""
        b, heads, w, d = q.shape
        u = np.zeros((b, heads // group, d), np.float32)
        for i, h in np.ndindex(u.shape[:2]):
            self.call("sparkv_channel_weight", at(q, i, h * group), group, w, d, 0, at(u, i, h))
        return u

    def select(self, k, u, kept):
        mask = np.zeros(k.shape, np.uint8)
        for i, h, t in np.ndindex(k.shape[:3]):
            self.call("sparkv_select", at(k, i, h, t), at(u, i, h), k.shape[3], kept, at(mask, i, h, t))
        return mask

    def recover(self, k, u, mask, how):
        out = np.zeros_like(k)
        for i, h, t in np.ndindex(k.shape[:3]):
            self.call("sparkv_recover_key", at(k, i, h, t), at(u, i, h), at(mask, i, h, t), k.shape[3], how,
                      at(out, i, h, t))
        return out

    def groups(self, k, u):
        group, mask, out = np.zeros(k.shape[:3], np.int32), np.zeros(k.shape, np.uint8), np.zeros_like(k)
        for i, h, t in np.ndindex(k.shape[:3]):
            self.call("sparkv_group_mode", at(k, i, h, t), at(u, i, h), k.shape[3], MEAN, at(group, i, h, t),
                      at(mask, i, h, t), at(out, i, h, t))
        return group, mask, out

    def values(self, function, v, amount):
        mask, out = np.zeros(v.shape, np.uint8), np.zeros_like(v)
        for i, h in np.ndindex(v.shape[:2]):
            self.call(function, at(v, i, h), v.shape[2], v.shape[3], ctypes.c_double(amount), MEAN, at(mask, i, h),
                      at(out, i, h))
        return mask, out


class Reference:
    """The double-precision oracle, for the modes that cannot be stored."""

    @functools.cached_property
    def lib(self):  # only files with such arrays need it
        return open_library("SPARKV_REFERENCE_LIB", os.path.join(BUILT, "libsparkv_reference.so"))

    def weight(self, q, group):
        b, heads, w, d = q.shape
        u = np.zeros((b, heads // group, d))
        for i, h in np.ndindex(u.shape[:2]):
            self.lib.golden_channel_weight(at(q, i, h * group), group, w, d, at(u, i, h))
        return u

    def sampled(self, k, u, kept, draws, normal, clip):
        out = np.zeros(k.shape)
        for i, h, t in np.ndindex(k.shape[:3]):
            self.lib.golden_recover_sampled(at(k, i, h, t), at(u, i, h), k.shape[3], kept, at(draws, i, h, t), normal,
                                            clip, at(out, i, h, t))
        return out

    def switches_off(self, k, u, ratio):
        out = np.zeros(k.shape)
        for i, h, t in np.ndindex(k.shape[:3]):
            self.lib.golden_recover_switches_off(at(k, i, h, t), at(u, i, h), k.shape[3], ctypes.c_double(ratio),
                                                 at(out, i, h, t))
        return out


class Result:
    """Comparison of one array."""

    def __init__(self, mismatches, tolerance, max_abs=0.0, max_rel=0.0, ok=None):
        self.mismatches, self.tolerance = int(mismatches), tolerance
        self.max_abs, self.max_rel = float(max_abs), float(max_rel)
        self.ok = self.mismatches == 0 if ok is None else bool(ok)


def exact(got, want):
    return Result(np.count_nonzero(got != want), "exact")


def close(got, want, limit, text, bit_exact=None):
    """|got - want| <= limit; entries under the mask `bit_exact` must have the same bits."""
    got64, want64 = got.astype(np.float64), want.astype(np.float64)
    same = (got64 == want64) | (np.isnan(got64) & np.isnan(want64))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        error = np.where(same, 0.0, np.abs(got64 - want64))
        relative = np.where(same, 0.0, error / np.abs(want64))
    error[np.isnan(error)] = np.inf
    relative[np.isnan(relative)] = np.inf
    bad = error > limit
    if bit_exact is not None:
        bits = got.astype(np.float32).view(np.uint32) != want.view(np.uint32)
        bad |= (bit_exact != 0) & bits
        text = "kept bit exact, " + text
    return Result(np.count_nonzero(bad), text, error.max(initial=0.0), relative.max(initial=0.0))


def relative_limit(want):
    return 1e-6 * np.abs(want.astype(np.float64)) + 1e-30


class File:
    """One .npz file: its arrays, checked against meta, and what the library makes of its inputs."""

    INPUTS = ("meta", "K", "Q", "V", "exp_unit", "normal_z")

    def __init__(self, path, library, reference):
        self.library, self.reference = library, reference
        self.arrays = self.load(path)
        self.cache = {}
        if "meta" not in self.arrays:
            raise Problem("meta: missing")
        meta = self.arrays["meta"]
        if meta.ndim != 1 or meta.size < 6 or meta.dtype.kind not in "iu":
            raise Problem(f"meta: {meta.dtype} {meta.shape} is not at least 6 integers")
        if any(int(x) < 1 for x in meta[:6]):
            raise Problem(f"meta: {meta[:6].tolist()} has a size below 1")
        self.b, self.heads, self.group, self.s, self.d, self.w = (int(x) for x in meta[:6])
        for name, array in self.arrays.items():
            self.check_array(name, array)

    @staticmethod
    def load(path):
        try:
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
                if broken is not None:
                    raise Problem(f"damaged: {broken} has a wrong checksum")
            with np.load(path, allow_pickle=False) as data:
                arrays = {name: np.ascontiguousarray(data[name]) for name in data.files}
        except Problem:
            raise
        except Exception as error:  # zipfile, zlib and numpy raise many kinds on damaged bytes
            raise Problem(f"damaged or not an .npz file: {error}") from None
        if not arrays:
            raise Problem("holds no array")
        return arrays

    def check_array(self, name, array):
        tokens = (self.b, self.heads, self.s)
        shape, kinds = tokens + (self.d,), {"f": 4}
        if name == "meta":
            return
        if name == "Q":
            shape = (self.b, self.heads * self.group, self.w, self.d)
        elif name == "q_norm":
            shape = (self.b, self.heads, self.d)
        elif name == "group_id":
            shape, kinds = tokens, {"u": 1}
        elif "mask" in name:
            kinds = {"u": 1}
        if array.shape != shape:
            raise Problem(f"{name}: shape {list(array.shape)}, meta says {list(shape)}")
        if kinds.get(array.dtype.kind) != array.dtype.itemsize:
            raise Problem(f"{name}: type {array.dtype}, not {'float32' if 'f' in kinds else 'uint8'}")

    def get(self, name):
        if name not in self.arrays:
            raise Problem(f"needs {name}, which the file lacks")
        return self.arrays[name]

    def once(self, key, make):
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]

    def kept(self, ratio):
        return self.d - int(ratio * self.d)

    def weight(self):
        if "Q" in self.arrays:
            return self.once("u", lambda: self.library.weight(self.get("Q"), self.group))
        return self.get("q_norm")

    def reference_weight(self):
        if "Q" in self.arrays:
            return self.once("u64", lambda: self.reference.weight(self.get("Q"), self.group))
        return self.get("q_norm").astype(np.float64)

    def mask(self, ratio):
        return self.once(("mask", ratio),
                         lambda: self.library.select(self.get("K"), self.weight(), self.kept(ratio)))

    def recovered(self, ratio, how):
        return self.library.recover(self.get("K"), self.weight(), self.mask(ratio), how)

    def groups(self):
        return self.once("groups", lambda: self.library.groups(self.get("K"), self.weight()))

    def values(self, ratio):
        return self.once(("values", ratio),
                         lambda: self.library.values("sparkv_prune_values", self.get("V"), ratio))

    def values_top_p(self, top_p):
        return self.once(("top_p", top_p),
                         lambda: self.library.values("sparkv_prune_values_top_p", self.get("V"), top_p))

    # The masks of the files are the nonzero pattern of pruned arrays: an exact zero is never in them.

    def compare_q_norm(self, want):
        got = self.library.weight(self.get("Q"), self.group)
        return close(got, want, relative_limit(want), "1e-6 relative")

    def compare_mask(self, want, percent):
        return exact(self.mask(percent / 100) & (self.get("K") != 0), want)

    def compare_kzero(self, want, percent):
        mask = self.mask(percent / 100)
        return close(self.recovered(percent / 100, ZERO), want, 0.0, "zeros exact", mask)

    def compare_kmean(self, want, percent):
        got = self.recovered(percent / 100, MEAN)
        return close(got, want, relative_limit(want), "1e-6 relative", self.mask(percent / 100))

    def compare_group_id(self, want):
        return exact(self.groups()[0], want)

    def compare_group_mask(self, want):
        return exact(self.groups()[1] & (self.get("K") != 0), want)

    def compare_group_kmean(self, want):
        _, mask, got = self.groups()
        return close(got, want, relative_limit(want), "1e-6 relative", mask)

    def compare_vmask(self, want, percent):
        return exact(self.values(percent / 100)[0] & (self.get("V") != 0), want)

    def value_limit(self):
        # A mean of entries that cancel is as exact as float32 holds the largest of them.
        return np.maximum(1e-7, 2e-7 * np.abs(self.get("V")).max(axis=-1, keepdims=True))

    def compare_vmean(self, want, percent):
        mask, got = self.values(percent / 100)
        return close(got, want, self.value_limit(), "1e-7 absolute", mask)

    def top_p_differences(self, want, percent):
        """Entries whose mask differs, and whether all lie within two places of the cut, where float32 may decide."""
        v, top_p = self.get("V"), percent / 100
        differs = (self.values_top_p(top_p)[0] != want) & (v != 0)
        if not differs.any():
            return differs, True
        width = 3.0 / (self.s * self.d)
        below = self.library.values("sparkv_prune_values_top_p", v, max(top_p - width, 1e-9))[0]
        above = self.library.values("sparkv_prune_values_top_p", v, min(top_p + width, 1.0))[0]
        return differs, not (differs & (below == above)).any() and differs.sum(axis=(2, 3)).max() <= 2

    def compare_vtopp_mask(self, want, percent):
        differs, allowed = self.top_p_differences(want, percent)
        stray = np.count_nonzero((want != 0) & (self.get("V") == 0))
        return Result(np.count_nonzero(differs) + stray, "2 at the cut", ok=allowed and stray == 0)

    def compare_vtopp_mean(self, want, percent):
        kept = self.arrays.get(f"vtopp{percent:02d}_mask", (want == self.get("V")).astype(np.uint8))
        differs, allowed = self.top_p_differences(kept, percent)
        mask, got = self.values_top_p(percent / 100)
        agree = ~differs.any(axis=-1, keepdims=True) & np.ones(want.shape, bool)
        got = np.where(agree, got, want)  # a token whose mask differs at the cut has another mean
        result = close(got, want, self.value_limit(), "1e-7 absolute", mask & agree)
        result.ok = result.ok and allowed
        return result

    def compare_sampled(self, want, distribution, over, percent):
        normal = distribution == "norm"
        draws = self.get("normal_z" if normal else "exp_unit")
        got = self.reference.sampled(self.get("K"), self.reference_weight(), self.kept(percent / 100), draws, normal,
                                     over == "clip")
        limit = np.maximum(1e-5, relative_limit(want)) if normal else relative_limit(want)
        return close(got, want, limit, "1e-5 absolute" if normal else "1e-6 relative", self.mask(percent / 100))

    def compare_quirk(self, want, percent):
        got = self.reference.switches_off(self.get("K"), self.reference_weight(), percent / 100)
        return close(got, want, relative_limit(want), "1e-6 relative", self.mask(percent / 100))

    PATTERNS = [(re.compile(pattern), compare) for pattern, compare in (
        (r"q_norm", compare_q_norm), (r"mask_r(\d+)", compare_mask), (r"kzero_r(\d+)", compare_kzero),
        (r"kmean_r(\d+)", compare_kmean), (r"group_id", compare_group_id), (r"group_mask", compare_group_mask),
        (r"group_kmean", compare_group_kmean), (r"vmask_r(\d+)", compare_vmask), (r"vmean_r(\d+)", compare_vmean),
        (r"vtopp(\d+)_mask", compare_vtopp_mask), (r"vtopp(\d+)_mean", compare_vtopp_mean),
        (r"k(exp|norm)_(avg|clip)_r(\d+)", compare_sampled), (r"quirk_thr0_pool0_r(\d+)", compare_quirk))]

    def compare(self, name):
        for pattern, function in self.PATTERNS:
            match = pattern.fullmatch(name)
            if match:
                arguments = [int(part) if part.isdigit() else part for part in match.groups()]
                return function(self, self.arrays[name], *arguments)
        raise Problem("unknown array: nothing to compare it with")


def check_file(path, library, reference):
    """Prints one line per array; returns (arrays compared, failures)."""
    label = os.path.basename(path)
    try:
        file = File(path, library, reference)
    except Problem as problem:
        print(f"{label}: FAIL: {problem}")
        return 0, 1
    compared = failures = 0
    for name in file.arrays:
        if name in File.INPUTS or (name == "q_norm" and "Q" not in file.arrays):
            continue
        compared += 1
        try:
            result = file.compare(name)
        except Problem as problem:
            print(f"{label} {name}: FAIL: {problem}")
            failures += 1
            continue
        print(f"{label} {name}: {result.mismatches} mismatches, max error {result.max_abs:.2e} absolute "
              f"{result.max_rel:.2e} relative, tolerance {result.tolerance}: {'ok' if result.ok else 'FAIL'}")
        failures += not result.ok
    if compared == 0:
        print(f"{label}: FAIL: holds inputs only, nothing to compare")
        return 0, 1
    return compared, failures


def main(arguments):
    if len(arguments) > 1 or arguments[:1] in (["-h"], ["--help"]):
        print(__doc__.strip())
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    directory = arguments[0] if arguments else HERE
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(".npz"))
        if not names:
            raise Problem(f"{directory}: holds no .npz file")
        library, reference = Library(), Reference()
    except OSError as error:
        print(f"golden: FAIL: {directory}: {error.strerror}")
        return 1
    except Problem as problem:
        print(f"golden: FAIL: {problem}")
        return 1
    compared = failures = 0
    for name in names:
        file_compared, file_failures = check_file(os.path.join(directory, name), library, reference)
        compared += file_compared
        failures += file_failures
    print(f"golden: {len(names)} files, {compared} arrays, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
