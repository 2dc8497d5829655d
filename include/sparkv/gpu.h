/* libsparkv-cuda: attention over packed rows in the memory of a GPU.
 *
 * Rows lie in pages of 32 rows of one KV head (docs/format.md, "pages"), found through a table per
 * sequence, as paged caches of servers do it. A layer may have several stores, of one row format
 * each: the dense window, recent rows, packed rows; one call reads them all. Pointers below are to
 * memory of the calling thread's current device unless a comment says host. Nothing is allocated,
 * nothing waits: a call queues kernels on a stream; after a first call of the same kinds, which
 * lets CUDA load them, it may be captured in a graph. Rows are packed by libsparkv
 * (sparkv_pack_key).
 */
#ifndef SPARKV_GPU_H
#define SPARKV_GPU_H

#include "sparkv/sparkv.h"

#ifdef __cplusplus
extern "C" {
#endif

#define SPARKV_PAGE_ROWS 32

/* Rows of one format. Keys with tiers go with trellis-coded values, SPARKV_INT8 with SPARKV_INT8
 * (no channel pruned), SPARKV_F16 with SPARKV_F16. Page i of KV head h is at (i * kv_heads + h) *
 * SPARKV_PAGE_ROWS * bytes of a row, which begins at a multiple of 16 bytes. Pages of f16 rows of
 * 128 or more channels, and of int8 rows of 256, need more than 100 KB of shared memory per block.
 */
typedef struct sparkv_gpu_rows {
  size_t struct_size;
  int32_t keys, values; /* sparkv_number */
  const void* key_pages;
  const void* value_pages;
  const uint16_t* weights; /* [sequences][kv_heads][head_dim] f16, of keys with tiers; else NULL */
  const int32_t* pages;    /* [sequences][max_pages]; negative: gone, its bits in rows must be 0;
                              others    are not checked */
  const uint32_t* rows; /* [sequences][max_pages], bit r: row r of the page counts; NULL: all do */
  const int32_t*
      n_rows;        /* [sequences], rows in those pages; what is beyond max_pages is not read */
  int32_t max_pages; /* 1 or more */
} sparkv_gpu_rows;

/* One query token per sequence. head_dim 64, 128 or 256. Query head i reads KV head i / group. */
typedef struct sparkv_gpu_step {
  size_t struct_size;
  int32_t sequences, kv_heads, group, head_dim;
  float scale;                   /* of q . k */
  float softcap;                 /* 0: none */
  const float* q;                /* [sequences][kv_heads * group][head_dim] */
  float* out;                    /* likewise; 0 where a sequence has no rows */
  const sparkv_gpu_rows* stores; /* host, [n_stores] */
  int32_t n_stores;              /* 1 .. 4 */
  void* workspace;               /* of one step at a time, aligned to 16 bytes */
  size_t workspace_size;
  void* stream; /* cudaStream_t; NULL: the default one */
} sparkv_gpu_step;

/* What a step needs on the current device: it depends on everything but pointers. 0 when the step
 * cannot be computed; sparkv_gpu_attend says why. */
SPARKV_API size_t sparkv_gpu_workspace_bytes(const sparkv_gpu_step* step);
SPARKV_API sparkv_status sparkv_gpu_attend(const sparkv_gpu_step* step, sparkv_error* error);

/* On the host: 32 packed rows, one after the other, into a page of their bytes; the two must not
 * overlap. `config`, `head_dim` and `weights` are those the rows were packed with. */
SPARKV_API sparkv_status sparkv_pack_key_page(const sparkv_config* config, const uint16_t* weights,
                                              int32_t head_dim, const uint8_t* rows, uint8_t* page,
                                              sparkv_error* error);
SPARKV_API sparkv_status sparkv_pack_value_page(const sparkv_config* config, int32_t head_dim,
                                                const uint8_t* rows, uint8_t* page,
                                                sparkv_error* error);

#ifdef __cplusplus
}
#endif
#endif
