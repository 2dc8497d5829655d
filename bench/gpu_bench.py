"""Decode attention on a GPU over packed pages, beside dense f16: our own kernel and PyTorch's. One run, sides
taking turns, medians; each as a replayed graph, so that launching costs all sides alike. Needs PyTorch with a GPU.

  python3 bench/gpu_bench.py LIBSPARKV_CUDA [--json FILE] [--quick]

Pages hold random bits under gains of one size: time does not depend on what rows say. A step is replayed on one layer:
pages that fit into the GPU's cache (one sequence of 8,192 tokens) are read from there, which those of a model are not.
"""
import argparse
import ctypes as c
import json
import statistics
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

F16, INT8, TIERS, TRELLIS = 0, 1, 5, 10
# Steps of 3/4 dB by which the energies of tiers fall. Steep: bits as most heads of a model have them, those in the
# names.
STEEP, FLAT = (16, 8, 8), (4, 2, 2)
T7543, T7432, T6321, T5321, T4210 = range(TIERS, TIERS + 5)
T4, T3, T2, T1 = range(TRELLIS, TRELLIS + 4)
REST = 0
# name -> stores of (keys, values, falls, rows)
SIDES = {
    "exact": [(F16, F16, STEEP, REST)],
    "int8": [(INT8, INT8, STEEP, REST)],
    "tiers-7543": [(T7543, T4, STEEP, REST)],
    "tiers-6321": [(T6321, T3, STEEP, REST)],
    "tiers-6321 flat": [(T6321, T3, FLAT, REST)],
    "tiers-5321": [(T5321, T2, STEEP, REST)],
    "tiers-4210": [(T4210, T1, STEEP, REST)],
    # Presets with their windows and stages, in layers outside the middle.
    "safe": [(T7543, T4, STEEP, REST), (INT8, INT8, STEEP, 416), (F16, F16, STEEP, 64)],
    "balanced": [(T5321, T2, STEEP, REST), (T7543, T4, STEEP, 800), (F16, F16, STEEP, 32)],
    "small": [(T4210, T1, STEEP, REST), (T5321, T2, STEEP, 1120), (T7543, T4, STEEP, 240), (F16, F16, STEEP, 32)],
    "tiny": [(T4210, T1, STEEP, REST), (T5321, T2, STEEP, 480), (T7543, T4, STEEP, 120), (F16, F16, STEEP, 8)],
}
SUMS = {TIERS: 19, TIERS + 1: 16, TIERS + 2: 12, TIERS + 3: 11, TIERS + 4: 7}
BITS = {TRELLIS: 4, TRELLIS + 1: 3, TRELLIS + 2: 2, TRELLIS + 3: 1}


class Rows(c.Structure):
    _fields_ = [("struct_size", c.c_size_t), ("keys", c.c_int32), ("values", c.c_int32), ("key_pages", c.c_void_p),
                ("value_pages", c.c_void_p), ("weights", c.c_void_p), ("pages", c.c_void_p), ("rows", c.c_void_p),
                ("n_rows", c.c_void_p), ("max_pages", c.c_int32)]


class Step(c.Structure):
    _fields_ = [("struct_size", c.c_size_t), ("sequences", c.c_int32), ("kv_heads", c.c_int32), ("group", c.c_int32),
                ("head_dim", c.c_int32), ("scale", c.c_float), ("softcap", c.c_float), ("q", c.c_void_p),
                ("out", c.c_void_p), ("stores", c.c_void_p), ("n_stores", c.c_int32), ("workspace", c.c_void_p),
                ("workspace_size", c.c_size_t), ("stream", c.c_void_p)]


class Error(c.Structure):
    _fields_ = [("text", c.c_char * 512)]


def row_bytes(kind, dim, values):
    if kind == F16:
        return 2 * dim
    if kind == INT8:
        return 2 + dim
    return 1 + BITS[kind] * dim // 8 if values else 3 + SUMS[kind] * dim // 32


def store_of(sequences, heads, dim, keys, values, falls, tokens):
    """A store of random rows, what must outlive it, and the bytes of its pages."""
    n_pages = tokens // 32
    buffers = []
    for kind, is_value in ((keys, False), (values, True)):
        page = 32 * row_bytes(kind, dim, is_value)
        if kind == F16:
            pages = torch.randn(sequences * n_pages * heads, page // 2, dtype=torch.float16, device="cuda")
        else:
            pages = torch.randint(0, 256, (sequences * n_pages * heads, page), dtype=torch.uint8, device="cuda")
            if kind == INT8:  # scales
                pages[:, 0:64:2] = 0
                pages[:, 1:64:2] = 2 if not is_value else 8
            elif is_value:
                pages[:, :32] = 160
            else:  # gains of 32 in all tiers
                pages[:, 0:64:2], pages[:, 1:64:2], pages[:, 64:96] = 0x20, 0x08, 0x82
        buffers.append(pages)
    weights = torch.full((sequences * heads, dim), 0x3C00, dtype=torch.int32)
    weights += torch.arange(dim) * 4 // dim
    for tier, fall in enumerate(falls):
        for bit in range(5):
            weights[:, 5 * tier + bit] |= (fall >> bit & 1) << 2
    weights = weights.to(torch.int16).cuda()
    table = torch.randperm(sequences * n_pages, device="cuda").to(torch.int32).reshape(sequences, n_pages)
    n_rows = torch.full((sequences,), tokens, dtype=torch.int32, device="cuda")
    rows = Rows(c.sizeof(Rows), keys, values, buffers[0].data_ptr(), buffers[1].data_ptr(), weights.data_ptr(),
                table.data_ptr(), None, n_rows.data_ptr(), n_pages)
    return rows, (buffers, weights, table, n_rows), sum(b.numel() * b.element_size() for b in buffers)


def packed(lib, name, sequences, heads, group, dim, tokens, q):
    """A function that queues one decode step, and the bytes that it reads."""
    others = sum(rows for _, _, _, rows in SIDES[name])
    made = [store_of(sequences, heads, dim, keys, values, falls, rows or tokens - others)
            for keys, values, falls, rows in SIDES[name]]
    stores = (Rows * len(made))(*(rows for rows, _, _ in made))
    out = torch.empty_like(q)
    step = Step(c.sizeof(Step), sequences, heads, group, dim, dim**-0.5, 0.0, q.data_ptr(), out.data_ptr(),
                c.addressof(stores), len(made), None, 0, None)
    workspace = torch.empty(lib.sparkv_gpu_workspace_bytes(c.byref(step)), dtype=torch.uint8, device="cuda")
    step.workspace, step.workspace_size = workspace.data_ptr(), workspace.numel()
    kept = (made, stores, out, workspace)

    def run(_=kept):
        step.stream = torch.cuda.current_stream().cuda_stream
        error = Error()
        if lib.sparkv_gpu_attend(c.byref(step), c.byref(error)):
            raise RuntimeError(error.text.decode())

    return run, sum(size for _, _, size in made)


def torch_sides(sequences, heads, group, dim, tokens, q):
    """PyTorch's attention with the queries of a group as rows, which is the fastest way to ask it."""
    k = torch.randn(sequences, heads, tokens, dim, dtype=torch.float16, device="cuda")
    v = torch.randn_like(k)
    queries = q.view(sequences, heads, group, dim).half()
    sides = {}
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        def run(backend=backend):
            with sdpa_kernel(backend):
                F.scaled_dot_product_attention(queries, k, v)
        sides["torch " + name] = (run, 2 * k.numel() * 2)
    return sides


def graph_of(run):
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def microseconds(graph, times):
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(times):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1000 / times


def bandwidth_of_copies():
    """Bytes per microsecond, read and written; readers alone may be faster."""
    x = torch.ones(1 << 30, dtype=torch.float32, device="cuda")
    y = torch.empty_like(x)
    graph = graph_of(lambda: y.copy_(x))
    return 2 * x.numel() * 4 / min(microseconds(graph, 5) for _ in range(3))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("library")
    parser.add_argument("--json")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", help="one side of the first shape, for a profiler")
    args = parser.parse_args()
    lib = c.CDLL(args.library)
    lib.sparkv_gpu_workspace_bytes.restype = c.c_size_t
    # sequences, KV heads, group, head size, tokens
    shapes = [(1, 8, 4, 128, 131072), (32, 8, 4, 128, 8192), (1, 8, 1, 128, 131072), (32, 8, 8, 128, 8192),
              (1, 8, 4, 128, 8192), (64, 3, 3, 64, 8192), (32, 1, 4, 256, 8192)]
    if args.only:
        q = torch.randn(1, 32, 128, device="cuda")
        run, _ = packed(lib, args.only, 1, 8, 4, 128, 131072, q)
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        return
    bandwidth = bandwidth_of_copies()
    device = torch.cuda.get_device_name()
    print(f"{device}, copies at {bandwidth / 1e6:.2f} TB/s")
    results = []
    for sequences, heads, group, dim, tokens in shapes[: 2 if args.quick else None]:
        q = torch.randn(sequences, heads * group, dim, device="cuda")
        sides = {name: packed(lib, name, sequences, heads, group, dim, tokens, q) for name in SIDES}
        graphs = {name: (graph_of(run), size) for name, (run, size) in sides.items()}
        for name, (run, size) in torch_sides(sequences, heads, group, dim, tokens, q).items():
            try:
                graphs[name] = (graph_of(run), size)
            except RuntimeError as error:
                print(f"{name}: {str(error).splitlines()[0]}")
        times = {name: [] for name in graphs}
        for _ in range(5):
            for name, (graph, _) in graphs.items():
                times[name].append(microseconds(graph, 10))
        best = min(statistics.median(t) for name, t in times.items() if name == "exact" or "torch" in name)
        print(f"\n{sequences} x {tokens} tokens, {heads} KV heads of {dim}, group {group}")
        for name, t in times.items():
            median = statistics.median(t)
            size = graphs[name][1]
            row = {"shape": [sequences, heads, group, dim, tokens], "side": name, "us": round(median, 1),
                   "spread": round(max(t) / min(t), 3), "MiB": round(size / 2**20, 1),
                   "copy_us": round(size / bandwidth, 1), "best_dense_over": round(best / median, 2)}
            results.append(row)
            print(f"  {name:16} {median:9.1f} us  spread {row['spread']:.2f}  {row['MiB']:8.1f} MiB  "
                  f"{median * bandwidth / size:5.2f} x a copy's time for its bytes  {best / median:5.2f} x the best dense")
        del graphs, sides
        torch.cuda.empty_cache()
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"device": device, "copy_TB_s": round(bandwidth / 1e6, 3), "date": time.strftime("%Y-%m-%d"),
                       "rows": results}, file, indent=1)


if __name__ == "__main__":
    main()
