// The matrix registers of AMX: eight of 16 rows of 64 bytes. Included inside a namespace. Assembly,
// because gcc 12 takes a register's number only as a literal. Where SPARKV_EMULATED_AMX is defined,
// plain loops do the same, so that tests reach what uses them on machines that have AVX-512 with
// bf16 alone.

// What the registers hold: rows of them, bytes of a row.
struct alignas(64) AmxShape {
  uint8_t palette = 0, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(AmxShape) == 64);

#ifdef SPARKV_EMULATED_AMX
struct EmulatedAmx {
  AmxShape shape;
  uint8_t bytes[8][16][64];
};
inline thread_local EmulatedAmx emulated_amx;

inline void SetAmx(const AmxShape& shape) { emulated_amx.shape = shape; }
inline AmxShape GetAmx() { return emulated_amx.shape; }
inline void ReleaseAmx() { emulated_amx.shape = {}; }
template <int kTo>
inline void AmxZero() {
  std::memset(emulated_amx.bytes[kTo], 0, sizeof(emulated_amx.bytes[kTo]));
}
template <int kTo>
inline void AmxLoad(const void* from, size_t stride) {
  const AmxShape& shape = emulated_amx.shape;
  AmxZero<kTo>();
  for (int i = 0; i < shape.rows[kTo]; ++i) {
    std::memcpy(emulated_amx.bytes[kTo][i], static_cast<const uint8_t*>(from) + size_t(i) * stride,
                shape.row_bytes[kTo]);
  }
}
template <int kFrom>
inline void AmxStore(void* to, size_t stride) {
  const AmxShape& shape = emulated_amx.shape;
  for (int i = 0; i < shape.rows[kFrom]; ++i) {
    std::memcpy(static_cast<uint8_t*>(to) + size_t(i) * stride, emulated_amx.bytes[kFrom][i],
                shape.row_bytes[kFrom]);
  }
}
template <int kSum, int kA, int kB>
inline void AmxAddProducts() {
  const AmxShape& shape = emulated_amx.shape;
  float b[32][16];
  for (int k = 0; k < shape.row_bytes[kA] / 2; ++k) {
    for (int j = 0; j < 16; ++j) {
      uint32_t pair;
      std::memcpy(&pair, &emulated_amx.bytes[kB][k / 2][4 * j], 4);
      b[k][j] = std::bit_cast<float>(k % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
    }
  }
  for (int i = 0; i < shape.rows[kSum]; ++i) {
    float sum[16];
    std::memcpy(sum, emulated_amx.bytes[kSum][i], sizeof(sum));
    for (int k = 0; k < shape.row_bytes[kA] / 2; ++k) {
      uint16_t a;
      std::memcpy(&a, &emulated_amx.bytes[kA][i][2 * k], 2);
      for (int j = 0; j < 16; ++j) sum[j] += std::bit_cast<float>(uint32_t{a} << 16) * b[k][j];
    }
    std::memcpy(emulated_amx.bytes[kSum][i], sum, sizeof(sum));
  }
}
#else
inline void SetAmx(const AmxShape& shape) { asm volatile("ldtilecfg %0" : : "m"(shape)); }
inline AmxShape GetAmx() {
  AmxShape shape;
  asm volatile("sttilecfg %0" : "=m"(shape));
  return shape;
}
inline void ReleaseAmx() { asm volatile("tilerelease"); }
template <int kTo>
[[gnu::always_inline]] inline void AmxZero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTo));
}
// Row i lies at i * stride bytes.
template <int kTo>
[[gnu::always_inline]] inline void AmxLoad(const void* from, size_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTo) : "memory");
}
template <int kFrom>
[[gnu::always_inline]] inline void AmxStore(void* to, size_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kFrom) : "memory");
}
// sum[i][j] += sum_k a[i][k] b[k / 2][j][k % 2], bf16 into float.
template <int kSum, int kA, int kB>
[[gnu::always_inline]] inline void AmxAddProducts() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
}
#endif

// The registers for as long as it lives. The program may use them as well, set up once for a
// thread: its shape comes back, what they held does not.
class Amx {
 public:
  Amx() : before_(GetAmx()) {}
  ~Amx() {
    if (before_.palette != 0) {
      SetAmx(before_);
    } else {
      ReleaseAmx();
    }
  }
  Amx(const Amx&) = delete;
  Amx& operator=(const Amx&) = delete;
  // Registers 0 .. 5 get this many rows, the others 16.
  void SetRows(int rows) {
    if (rows == rows_) return;
    AmxShape shape;
    shape.palette = 1;
    for (int i = 0; i < 8; ++i) {
      shape.row_bytes[i] = 64;
      shape.rows[i] = uint8_t(i < 6 ? rows : 16);
    }
    SetAmx(shape);
    rows_ = rows;
  }

 private:
  AmxShape before_;
  int rows_ = 0;
};
