/* sparkv: a packed, query-aware KV cache (SparK, arXiv 2508.15212), as a C ABI.
 *
 * Conventions
 * - Handles are opaque; every function that can fail returns a sparkv_status and, when `error` is
 * not NULL, fills a text that names the field and the value at fault. Nothing prints, aborts or
 * throws across this border.
 * - "row" is what one token stores in one layer: all KV heads, head-major, channels contiguous.
 * - "cell" is a place for one token in every layer of one cache. Cells are numbered stream-major:
 *   cell = stream * cells_per_stream + index. Cells of different streams never see each other.
 * - f16 numbers travel as uint16_t bit patterns (IEEE 754 binary16). Strides are in bytes.
 * - One cache may be used by one thread at a time. Different caches may be used in parallel.
 * - Structs that may grow start with struct_size; set it to sizeof(the struct you were compiled
 * with).
 */
#ifndef SPARKV_SPARKV_H
#define SPARKV_SPARKV_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define SPARKV_API __attribute__((visibility("default")))
#else
#define SPARKV_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define SPARKV_VERSION "0.1.0"
#define SPARKV_FORMAT_VERSION 3

typedef enum sparkv_status {
  SPARKV_OK = 0,
  SPARKV_INVALID = 1,     /* an argument, a name or a number is outside what is allowed */
  SPARKV_NO_MEMORY = 2,   /* address space, pages or heap could not be had */
  SPARKV_UNSUPPORTED = 3, /* legal, but this build or this cache cannot do it */
  SPARKV_CORRUPT = 4      /* bytes from outside do not follow docs/format.md */
} sparkv_status;

typedef struct sparkv_error {
  char text[512]; /* one line, zero-terminated, no newline */
} sparkv_error;

SPARKV_API const char* sparkv_version(void);

/* ---- configuration */

/* How a pruned channel is restored (docs/method.md, section 4). */
typedef enum sparkv_recover {
  SPARKV_RECOVER_ZERO = 0,
  SPARKV_RECOVER_MEAN = 1,
  SPARKV_RECOVER_PAPER = 2
} sparkv_recover;
/* How the query heads of one group become one channel weight: signed mean (reference) or energy
 * (ours). */
typedef enum sparkv_group { SPARKV_GROUP_SIGNED = 0, SPARKV_GROUP_ENERGY = 1 } sparkv_group;
/* Number type of kept key channels and of value rows. All but f16 values are Hadamard-rotated.
 * Tiers (keys only) prune nothing: the channels fall into quarters by saliency, and a head shares
 * the sum of the bits in the name among them as its energies ask for. Trellis (values only): 4, 3
 * or 2 bits (docs/method.md, section 13). */
typedef enum sparkv_number {
  SPARKV_F16 = 0,
  SPARKV_INT8 = 1,
  SPARKV_INT6 = 2,
  SPARKV_INT5 = 3,
  SPARKV_INT4 = 4,
  SPARKV_TIERS_7543 = 5,
  SPARKV_TIERS_7432 = 6,
  SPARKV_TIERS_6321 = 7,
  SPARKV_TIERS_5321 = 8,
  SPARKV_TIERS_4210 = 9,
  SPARKV_TRELLIS4 = 10,
  SPARKV_TRELLIS3 = 11,
  SPARKV_TRELLIS2 = 12,
  SPARKV_TRELLIS1 = 13
} sparkv_number;
typedef enum sparkv_seal { SPARKV_SEAL_STREAM = 0, SPARKV_SEAL_PREFILL_END = 1 } sparkv_seal;
typedef enum sparkv_simd {
  SPARKV_SIMD_AUTO = 0,
  SPARKV_SIMD_PLAIN = 1,
  SPARKV_SIMD_AVX2 = 2,
  SPARKV_SIMD_AVX512 = 3,
  SPARKV_SIMD_NEON = 4,
  SPARKV_SIMD_AMX = 5 /* AVX-512, and matrix registers for many queries at a time */
} sparkv_simd;

/* Which rows of a KV head leave when a prompt has ended, and again whenever 128 more are packed.
 * All keep the dense rows (sinks, window). */
typedef enum sparkv_evict {
  SPARKV_EVICT_NONE = 0,
  SPARKV_EVICT_STREAMINGLLM = 1, /* all but the newest (arXiv 2309.17453) */
  SPARKV_EVICT_TOVA = 2,      /* least read by the newest query, of all heads (arXiv 2401.06104) */
  SPARKV_EVICT_KNORM = 3,     /* largest keys (arXiv 2406.11430) */
  SPARKV_EVICT_KEYDIFF = 4,   /* keys most like the mean key (arXiv 2504.15364) */
  SPARKV_EVICT_SNAPKV = 5,    /* least read by the newest `observe` queries (arXiv 2404.14469) */
  SPARKV_EVICT_PYRAMIDKV = 6, /* SnapKV, more tokens in lower layers (arXiv 2406.02069) */
  SPARKV_EVICT_EXPECTED =
      7 /* least expected of queries like the newest `observe` (arXiv 2510.00636) */
} sparkv_evict;

typedef struct sparkv_config {
  uint32_t struct_size;
  int32_t recover; /* sparkv_recover */
  int32_t group;   /* sparkv_group */
  int32_t kept;    /* sparkv_number of kept key channels */
  int32_t values;  /* sparkv_number of value rows: F16, INT8, INT4 or TRELLIS */
  int32_t seal;    /* sparkv_seal */
  int32_t simd;    /* sparkv_simd */
  double ratio;    /* share of key channels pruned, [0, 1]; kept = D - int(ratio * D), the product
                      truncated */
  int32_t sinks;   /* first tokens of a sequence that stay dense, [0, 1024] */
  int32_t window;  /* newest tokens of a sequence that stay dense, [0, 65536] */
  int32_t observe; /* tokens, of those that differ, whose queries make the channel weights,
                      [1, 1024]; nothing is packed before they were seen, or 512 tokens in all */
  int32_t threads; /* 0: as many as the host says, else [1, 256] */
  int32_t protect_first; /* the model's first and last layers that are protected: nothing pruned, */
  int32_t protect_last;  /* 8-bit numbers; [0, 9999] */
  char preset[32];       /* the name the configuration started from, for reports */
  char layers[2048];     /* layers of their own: "0-1=spark-0-i8,29=spark-0.5-i6+q8", "middle=..."
                            (as "balanced" and "small" have); empty: none */
  char budget[32];       /* what all rows may take: "4bpe" (bits per element, dense rows and weights
                            counted), "512MiB", "auto" (what `config` takes without it); empty: none */
  char sensitivity[512]; /* what a budget takes from which layer: "0-4:0.5,15-19:7.1", layers that
                            are not named count 1; empty: those in the middle 4, all others 1 */
  char recent[96]; /* rows between the window and the packed ones: "256:i8+q8,1024:t7432+t4": rows
                      less than 256 tokens old have 8-bit keys, none pruned, and 8-bit values, then
                      less than 1,024 the next; layers whose packed rows take more bytes than a
                      stage keep packed ones; at most three, fewer where eviction keeps less; empty:
                      none. Ours */
  int32_t evict;   /* sparkv_evict */
  int32_t evict_tokens; /* tokens that stay in a KV head, dense ones counted (a mean over layers for
                           PyramidKV); above sinks + window, 0 without eviction */
  char baseline[32];    /* for comparison only: rows that are packed are coded and decoded as this
                           codec of others would and stored dense; kivi-2, turboquant-3, think-0.5,
                           ... go with preset "exact" alone; empty: none */
} sparkv_config;

/* Fills `config` from a preset: "safe", "balanced", "small", "tiny" (tiers, and recent rows of more
 * bits), "exact", "spark-R" (f16 kept, f16 values), "spark-R-iB" (B in 8, 6, 5, 4; rotated 4-bit
 * values for B <= 6, 8-bit above), R a ratio such as 0.5, or "tiers-ABCD" as SPARKV_TIERS_ABCD.
 * NULL or "" gives the default preset, "balanced". */
SPARKV_API sparkv_status sparkv_config_preset(sparkv_config* config, const char* name,
                                              sparkv_error* error);
/* Sets one parameter by its name (ratio, recover, group, kept, values, sinks, window, observe,
 * seal, simd, threads, layers, protect: "first:2,last:1", budget, sensitivity, recent or
 * "none", evict: "snapkv:512" or "none", baseline) from text. Unknown names and bad values are
 * SPARKV_INVALID and leave `config` as it was. evict also sets window and recent where they are
 * still those of "safe" to "tiny": in proportion, below 4,096 tokens. What is set after it stays.
 * ratio, kept and values hold for all layers: they drop those that a preset gave rows of their own;
 * layers replaces them, "none" drops them. */
SPARKV_API sparkv_status sparkv_config_set(sparkv_config* config, const char* key,
                                           const char* value, sparkv_error* error);
/* *out = `config` as it counts for layer `layer` of a model with n_layers, 0..9999. Entries of
 * config->layers are LAYER=PRESET, FIRST-LAST=PRESET or middle=PRESET (layers from .55 n_layers
 * until before .7 n_layers; a budget overrules it), the last one that has the layer wins; the
 * preset's ratio, kept and values take the place of the configuration's, +q8, +q4 or +f16 behind it
 * the preset's values. An entry that begins beyond n_layers is SPARKV_INVALID. A protected layer is
 * "spark-0-i8" whatever they say. In *out layers is empty and nothing protected; `out` may be
 * `config`. A budget is not looked at: sparkv_config_budget comes first. Ours. */
SPARKV_API sparkv_status sparkv_config_layer(const sparkv_config* config, int32_t layer,
                                             int32_t n_layers, sparkv_config* out,
                                             sparkv_error* error);
/* Stage `stage`, from 0, of config->recent, those inside the window left out: *until as written
 * there, *rows = `config` with the ratio (0), kept and values of its rows. SPARKV_INVALID behind
 * the last one. A layer keeps keys, or values, as packed where those take as many bytes or more.
 * Ours. */
SPARKV_API sparkv_status sparkv_config_recent(const sparkv_config* config, int32_t stage,
                                              int32_t* until, sparkv_config* rows,
                                              sparkv_error* error);
/* One line, e.g. "spark-0.5-i5 ratio 0.5 recover mean kept i5 values q4 sinks 4 window 96 seal
 * stream". Always zero-terminated; returns the length it needed. */
SPARKV_API size_t sparkv_config_text(const sparkv_config* config, char* text, size_t size);

/* ---- the method, one step per function (f32 in, f32 out; docs/method.md) */
/* how: sparkv_group in sparkv_channel_weight, else sparkv_recover; enumerations cross as int32_t,
 * so any value is an error and never undefined. */

/* u[d], [head_dim]: weight of each channel of one KV head from n_queries window queries of its
 * group. q: [group][n_queries][head_dim], contiguous. SPARKV_GROUP_SIGNED is method.md S2. */
SPARKV_API sparkv_status sparkv_channel_weight(const float* q, int32_t group, int32_t n_queries,
                                               int32_t head_dim, int32_t how, float* u,
                                               sparkv_error* error);
/* mask[j] = 1 for the `kept` largest k[j]^2 * u[j]; ties: the smaller channel wins; NaN counts as
 * largest (S3, S4). */
SPARKV_API sparkv_status sparkv_select(const float* k, const float* u, int32_t head_dim,
                                       int32_t kept, uint8_t* mask, sparkv_error* error);
/* out = k with pruned channels restored (S5, S6). Reference-exact for SPARKV_RECOVER_MEAN and
 * _ZERO. */
SPARKV_API sparkv_status sparkv_recover_key(const float* k, const float* u, const uint8_t* mask,
                                            int32_t head_dim, int32_t how, float* out,
                                            sparkv_error* error);
/* SparK-g, method.md 5: *group_id in 0..4, mask of the group's int(a*D) channels, out as
 * sparkv_recover_key. */
SPARKV_API sparkv_status sparkv_group_mode(const float* k, const float* u, int32_t head_dim,
                                           int32_t how, int32_t* group_id, uint8_t* mask,
                                           float* out, sparkv_error* error);
/* Value pruning as the reference has it, method.md 6: v, mask, out [n_tokens][head_dim] of one
 * head. recover MEAN fills with the signed mean of the token's pruned entries, ZERO with 0. */
SPARKV_API sparkv_status sparkv_prune_values(const float* v, int32_t n_tokens, int32_t head_dim,
                                             double ratio, int32_t how, uint8_t* mask, float* out,
                                             sparkv_error* error);
/* The same with one global top-p cut over the head (method.md 6, last lines); top_p in (0, 1]. */
SPARKV_API sparkv_status sparkv_prune_values_top_p(const float* v, int32_t n_tokens,
                                                   int32_t head_dim, double top_p, int32_t how,
                                                   uint8_t* mask, float* out, sparkv_error* error);
/* ThinK's structured baseline (method.md 10): one channel mask [head_dim] for all tokens of the
 * head. q: [group][n_queries][head_dim], k: [n_tokens][head_dim]. */
SPARKV_API sparkv_status sparkv_think(const float* q, int32_t group, int32_t n_queries,
                                      const float* k, int32_t n_tokens, int32_t head_dim,
                                      double ratio, uint8_t* mask, sparkv_error* error);

/* ---- packed rows (docs/format.md) */

/* Bytes of one packed key or value row of one head; 0 when the shape is not allowed
 * (head_dim 32..512 in steps of 8). */
SPARKV_API size_t sparkv_key_row_bytes(const sparkv_config* config, int32_t head_dim);
SPARKV_API size_t sparkv_value_row_bytes(const sparkv_config* config, int32_t head_dim);
/* Weight table of one head from u: f16 [head_dim], what is stored once per sequence, layer and
 * head. key_energy: sums of squares of some keys per channel, for tiers; else not read, NULL. */
SPARKV_API sparkv_status sparkv_make_table(const sparkv_config* config, const float* u,
                                           const float* key_energy, int32_t head_dim,
                                           uint16_t* table, sparkv_error* error);
/* One row of one head, f16 in, packed bytes out and back. `table` may be NULL when nothing is
 * pruned. `row_size` must be the exact row bytes. Unpacking treats the bytes as hostile:
 * SPARKV_CORRUPT names the field. */
SPARKV_API sparkv_status sparkv_pack_key(const sparkv_config* config, const uint16_t* table,
                                         const uint16_t* k, int32_t head_dim, uint8_t* row,
                                         size_t row_size, sparkv_error* error);
SPARKV_API sparkv_status sparkv_unpack_key(const sparkv_config* config, const uint16_t* table,
                                           const uint8_t* row, size_t row_size, int32_t head_dim,
                                           uint16_t* k, sparkv_error* error);
SPARKV_API sparkv_status sparkv_pack_value(const sparkv_config* config, const uint16_t* v,
                                           int32_t head_dim, uint8_t* row, size_t row_size,
                                           sparkv_error* error);
SPARKV_API sparkv_status sparkv_unpack_value(const sparkv_config* config, const uint8_t* row,
                                             size_t row_size, int32_t head_dim, uint16_t* v,
                                             sparkv_error* error);

/* ---- cache */

typedef struct sparkv_cache sparkv_cache;

typedef struct sparkv_layer_shape {
  int32_t n_kv_heads; /* 1..1024 */
  int32_t k_dim;      /* 32..512 in steps of 8 */
  int32_t v_dim;
} sparkv_layer_shape;

typedef struct sparkv_shape {
  uint32_t struct_size;
  int32_t n_layers;
  const sparkv_layer_shape* layers; /* [n_layers], copied */
  int64_t cells_per_stream;
  int32_t n_streams;
  const int32_t* layer_numbers; /* [n_layers], copied: the model's number of each layer, which
                                   config.layers names; NULL: 0, 1, ... */
  int32_t n_model_layers; /* layers of the model, for protect; 0: the highest number and one */
} sparkv_shape;

/* *out = `config` with config->budget turned into layers of their own: of all layers of the
 * `n_shapes` caches (1..64, no layer twice) those with most to lose per byte get more bits until
 * the budget is spent, at full caches. Layers that config->layers names and protected ones stay
 * as they are and count. SPARKV_INVALID when the cheapest rows take more than the budget. Without a
 * budget *out is `config`; `out` may be `config`. Ours. */
SPARKV_API sparkv_status sparkv_config_budget(const sparkv_config* config,
                                              const sparkv_shape* shapes, int32_t n_shapes,
                                              sparkv_config* out, sparkv_error* error);

/* Reserves address space for all cells, commits none. A budget is solved for this cache alone. */
SPARKV_API sparkv_status sparkv_cache_create(const sparkv_config* config, const sparkv_shape* shape,
                                             sparkv_cache** cache, sparkv_error* error);
SPARKV_API void sparkv_cache_free(sparkv_cache* cache);
/* Forgets every cell and gives all pages back. */
SPARKV_API void sparkv_cache_clear(sparkv_cache* cache);
/* Threads that attend may use from now on when the configuration leaves it to the host. */
SPARKV_API void sparkv_cache_set_threads(sparkv_cache* cache, int32_t n_threads);
/* Threads of the host: calls body(data) on at most n_threads threads at once, the caller among
 * them, and returns when all have; flags is 0. GOMP_parallel of an OpenMP runtime is one, but its
 * team is made anew where n_threads changes: sparkv_cache_set_threads must then give what the host
 * computes with. NULL: the cache has threads of its own, as it has when the configuration says how
 * many. */
typedef void (*sparkv_team)(void (*body)(void* data), void* data, unsigned n_threads,
                            unsigned flags);
SPARKV_API void sparkv_cache_set_team(sparkv_cache* cache, sparkv_team team);

typedef enum sparkv_row_type { SPARKV_ROW_F32 = 0, SPARKV_ROW_F16 = 1 } sparkv_row_type;

/* Appends (or overwrites) rows in `cells`, [n_rows], distinct, in token order. The rows of one
 * micro-batch of a layer come in one call for keys and one for values, followed by the
 * sparkv_cache_attend of that layer before the next layer is written; every layer of a micro-batch
 * gets the same cells. row: k_dim * n_kv_heads numbers, contiguous. A negative cell is skipped.
 * type: sparkv_row_type; row_stride: bytes. */
SPARKV_API sparkv_status sparkv_cache_write_keys(sparkv_cache* cache, int32_t layer,
                                                 const int64_t* cells, int64_t n_rows,
                                                 const void* rows, int32_t type, size_t row_stride,
                                                 sparkv_error* error);
SPARKV_API sparkv_status sparkv_cache_write_values(sparkv_cache* cache, int32_t layer,
                                                   const int64_t* cells, int64_t n_rows,
                                                   const void* rows, int32_t type,
                                                   size_t row_stride, sparkv_error* error);

typedef struct sparkv_attend_args {
  uint32_t struct_size;
  int32_t layer;
  int32_t first_stream; /* streams first_stream .. first_stream + n_streams - 1 */
  int32_t n_streams;
  int64_t n_kv; /* cells 0..n_kv-1 of each stream may be seen; the others are known to be dead and
                   are released */
  int64_t n_tokens; /* queries per stream */
  int32_t n_heads;  /* query heads, a multiple of n_kv_heads; head i reads KV head i / (n_heads /
                       n_kv_heads) */
  float scale;
  float max_bias; /* ALiBi; 0 = none */
  float softcap;  /* logit soft-cap; 0 = none */
  const float* q; /* f32, [k_dim] contiguous, strides below */
  size_t q_token_stride, q_head_stride, q_stream_stride;
  const uint16_t* mask; /* f16, [n_kv] contiguous, -inf = not seen; NULL: all of n_kv are seen */
  size_t mask_token_stride, mask_stream_stride;
  const float* sinks; /* [n_heads] extra logits, or NULL */
  float* out;         /* f32, [n_streams][n_tokens][n_heads][v_dim], contiguous */
  /* Channels that RoPE turns together have the same energy in the long run: tiers weigh them alike.
     rope_rot: channels rotated, from channel 0 on, 0: not known; rope_neox: as in sparkv_rope. */
  int32_t rope_rot, rope_neox;
} sparkv_attend_args;

/* Observes the queries, seals what leaves the window, attends. Order within a micro-batch:
 * docs/design.md. */
SPARKV_API sparkv_status sparkv_cache_attend(sparkv_cache* cache, const sparkv_attend_args* args,
                                             sparkv_error* error);

/* Rows of cells first .. first+n-1 as f16, [n][n_kv_heads * dim]; cells that hold nothing read as
 * zeros. */
SPARKV_API sparkv_status sparkv_cache_read_keys(sparkv_cache* cache, int32_t layer, int64_t first,
                                                int64_t n, uint16_t* rows, sparkv_error* error);
SPARKV_API sparkv_status sparkv_cache_read_values(sparkv_cache* cache, int32_t layer, int64_t first,
                                                  int64_t n, uint16_t* rows, sparkv_error* error);
/* Rows that an earlier read gave (a state file): a row that packs to itself under weights this
 * process knows becomes the same packed row again; any other stays dense. Keys of a cell come
 * before its values; restoring keys of a live cell replaces the cell. One sequence per range. */
SPARKV_API sparkv_status sparkv_cache_restore_keys(sparkv_cache* cache, int32_t layer,
                                                   int64_t first, int64_t n, const uint16_t* rows,
                                                   sparkv_error* error);
SPARKV_API sparkv_status sparkv_cache_restore_values(sparkv_cache* cache, int32_t layer,
                                                     int64_t first, int64_t n, const uint16_t* rows,
                                                     sparkv_error* error);
/* Makes stream `to` a copy of stream `from` in one layer, keys or values (llama.cpp copies tensor
 * by tensor). */
SPARKV_API sparkv_status sparkv_cache_copy_keys(sparkv_cache* cache, int32_t layer, int32_t from,
                                                int32_t to, sparkv_error* error);
SPARKV_API sparkv_status sparkv_cache_copy_values(sparkv_cache* cache, int32_t layer, int32_t from,
                                                  int32_t to, sparkv_error* error);
/* Cells first .. first+n-1 hold nothing any more. */
SPARKV_API void sparkv_cache_release(sparkv_cache* cache, int64_t first, int64_t n);

/* RoPE as ggml's GGML_OP_ROPE has it, applied in place to stored keys (context shift). */
typedef struct sparkv_rope {
  uint32_t struct_size;
  int32_t n_rot; /* channels rotated, from channel first_channel of each head */
  int32_t first_channel;
  int32_t neox; /* 1: pairs (j, j + n_rot/2); 0: pairs (2j, 2j+1) */
  int32_t n_ctx_orig;
  float freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow;
  const float* freq_factors; /* [n_rot / 2] or NULL */
} sparkv_rope;

/* Rotates the keys of cell i by delta[i] positions, i in [0, n_cells). A packed row is unpacked,
 * rotated and packed again under its own weights, which costs some accuracy; cells with delta 0 are
 * not touched. */
SPARKV_API sparkv_status sparkv_cache_rotate_keys(sparkv_cache* cache, int32_t layer,
                                                  const int32_t* delta, int64_t n_cells,
                                                  const sparkv_rope* rope, sparkv_error* error);

/* Bytes by kind. The sum of all kinds is what is committed; *_used bytes of pages not filled are in
 * slack. */
typedef struct sparkv_memory {
  uint32_t struct_size;
  int64_t tokens;                                      /* live cells */
  int64_t sealed;                                      /* of them packed in all heads */
  uint64_t key_masks, key_signs, key_scales, key_kept; /* packed key rows */
  uint64_t value_scales, value_codes;                  /* packed value rows */
  uint64_t dense_keys, dense_values; /* sinks, window, rows that must stay dense */
  uint64_t tables;                   /* channel weights */
  uint64_t cells;                    /* bookkeeping per cell */
  uint64_t slack;                    /* committed, holding nothing */
  uint64_t workspace; /* micro-batch in flight, observed queries, attention scratch */
  uint64_t resident;  /* sum of the above */
  uint64_t peak;      /* largest resident so far */
  uint64_t f16_bytes; /* what the live tokens would take as dense f16 */
  double key_bits, value_bits,
      bits; /* per element of live tokens; all kinds but workspace, shared kinds split by size.
               With a baseline: what its codec would store, dense rows as f16, nothing shared */
  int64_t evicted; /* live tokens that only some heads keep, or none */
} sparkv_memory;

SPARKV_API void sparkv_cache_memory(const sparkv_cache* cache, sparkv_memory* memory);
/* The report at the moment of most live tokens so far (after the seal that follows that step). */
SPARKV_API void sparkv_cache_high_water(const sparkv_cache* cache, sparkv_memory* memory);
/* The instruction set in use: "plain", "avx2", "avx512", "amx", "neon". */
SPARKV_API const char* sparkv_cache_isa(const sparkv_cache* cache);
/* Rows restored so far that had to stay dense because no known weights reproduce them. */
SPARKV_API int64_t sparkv_cache_unknown_rows(const sparkv_cache* cache);

/* Weight tables as bytes (docs/format.md, "weights"), so that another process can take packed rows
 * back from a state file. Save returns the size it needs and writes nothing when size is smaller.
 * Load checks everything and takes nothing from damaged bytes or from another shape or
 * configuration. */
SPARKV_API size_t sparkv_cache_save_weights(const sparkv_cache* cache, void* bytes, size_t size);
SPARKV_API sparkv_status sparkv_cache_load_weights(sparkv_cache* cache, const void* bytes,
                                                   size_t size, sparkv_error* error);

/* A calibration (docs/format.md, "calibration") is what a model was measured to do: which channels
 * its queries and keys use, and what a lost bit costs in which layer. start: `cache` sums up what
 * it sees from now on; save: the energies so far, layers in which nothing was seen left out, as
 * sparkv_cache_save_weights. load: sequences of an empty cache take their weights from it instead
 * of from their first queries; bytes of a model of another shape are SPARKV_INVALID, and so is
 * every attend once 32 tokens have shown another model of the same shape. Ours. */
SPARKV_API sparkv_status sparkv_cache_start_calibration(sparkv_cache* cache, sparkv_error* error);
SPARKV_API size_t sparkv_cache_save_calibration(const sparkv_cache* cache, void* bytes,
                                                size_t size);
SPARKV_API sparkv_status sparkv_cache_load_calibration(sparkv_cache* cache, const void* bytes,
                                                       size_t size, sparkv_error* error);
/* One calibration out of `n_parts` (1..64) that share no layer, for the model of that name (at most
 * 127 bytes) and with these sensitivities (as sparkv_config has them; NULL or "": not measured).
 * *size: room in `bytes` before, which may be NULL, bytes needed behind it; nothing is written
 * where the room is too small. */
SPARKV_API sparkv_status sparkv_calibration_join(const void* const* parts, const size_t* part_sizes,
                                                 int32_t n_parts, const char* model,
                                                 const char* sensitivity, void* bytes, size_t* size,
                                                 sparkv_error* error);
/* The name of the model it was made for, zero-terminated. */
SPARKV_API sparkv_status sparkv_calibration_model(const void* bytes, size_t size, char model[128],
                                                  sparkv_error* error);
/* What a calibration says about layers: its sensitivities, where `config` has none, and, where the
 * keys have tiers and neither budget nor layers are given (nor does the preset have some), budget
 * "auto": the same bytes, spent where they count. */
SPARKV_API sparkv_status sparkv_config_calibration(sparkv_config* config, const void* bytes,
                                                   size_t size, sparkv_error* error);

/* What rows lose from f16 to packed, by head. start: measured from the next token on, each row
 * being unpacked again, which costs time; not for a baseline. errors: *keys is the root of the mean
 * square error of q . k over that of q . k, channels of queries taken to be independent, *values
 * that of |value error| over |value|; errors of the stages a row passes add up. SPARKV_INVALID when
 * nothing is measured. Ours. */
SPARKV_API sparkv_status sparkv_cache_start_errors(sparkv_cache* cache, sparkv_error* error);
SPARKV_API sparkv_status sparkv_cache_errors(const sparkv_cache* cache, int32_t layer,
                                             int32_t kv_head, double* keys, double* values,
                                             sparkv_error* error);

/* For pictures: saliency |k| * weight of one head's live cells in cell order, [n_cells][k_dim]
 * scaled to the row's largest, and which channels are kept (all of them in a dense row). Returns
 * the number of live cells written (<= max_cells). */
SPARKV_API int64_t sparkv_cache_saliency(sparkv_cache* cache, int32_t layer, int32_t kv_head,
                                         int64_t max_cells, float* saliency, uint8_t* kept);

#ifdef __cplusplus
}
#endif
#endif
