// Attention kernels of every instruction set against attention in double precision over the same
// rows.
#include <gtest/gtest.h>

#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <numeric>
#include <set>

#include "cache/weight_tables.h"
#include "cache_model.h"
#include "hard_rows.h"
#include "ops/hadamard.h"

namespace sparkv::test {
namespace {

// What every instruction set has to keep to; numbers that are not hard leave room.
constexpr double kBar = 1e-4, kKernelSums = 1e-5;
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Shape {
  KeyLayout key;
  ValueLayout value;
  int group = 1, n_tokens = 1;
  float scale = 0.125f, softcap = 0.0f, max_bias = 0.0f;
  int n_rows() const { return n_tokens * group; }
};

Shape MakeShape(int k_dim, int v_dim, int group, int n_tokens, double ratio = 0.5,
                sparkv_number kept = SPARKV_INT5, sparkv_number values = SPARKV_INT4) {
  Shape shape;
  shape.key = KeyLayout::Make(k_dim, k_dim - int(ratio * k_dim), kept, SPARKV_RECOVER_MEAN);
  shape.value = ValueLayout::Make(v_dim, values);
  shape.group = group;
  shape.n_tokens = n_tokens;
  shape.scale = 1.0f / std::sqrt(float(k_dim));
  return shape;
}

// Tiers share their bits as those of some head would.
void ShareAtRandom(std::mt19937& rng, KeyLayout* key) {
  std::vector<uint16_t> weights(static_cast<size_t>(key->head_dim));
  for (int t = 0; t < kTiers - 1; ++t) SetTierFall(t, int(rng() % 32), weights.data());
  *key = key->Under(weights.data());
}

// AVX-512 multiplies integer rows with queries and weights of two or three bytes, AMX numbers of
// two bf16.
double Sums(const OpTable* ops) {
  const bool plain = ops == CpuOps(SPARKV_SIMD_PLAIN) || ops == CpuOps(SPARKV_SIMD_AVX2) ||
                     ops == CpuOps(SPARKV_SIMD_NEON);
  return plain ? kKernelSums : 2 * kKernelSums;
}

// Row t of a tile: 0 .. 63. Packed bytes end where a cache lets readers overrun; dense rows end
// sharply.
class Tile {
 public:
  Tile(const Shape& shape, const OpTable* ops, uint64_t rows, bool dense, std::mt19937& rng)
      : rows(rows), dense(dense) {
    const KeyLayout& key = shape.key;
    const size_t dim = size_t(key.head_dim), v_dim = size_t(shape.value.head_dim);
    std::normal_distribution<float> normal;
    std::vector<uint16_t> restore(dim);
    for (uint16_t& x : restore) x = FloatToHalf(std::exp(0.5f * normal(rng)));
    table.resize(size_t(kWeightParts) * dim + 16);
    ExpandTable(restore.data(), key.head_dim, table.data());
    for (int t = 0; t < kTile; ++t) {
      std::vector<uint16_t> k(dim), v(v_dim);
      for (uint16_t& x : k) x = FloatToHalf(normal(rng));
      for (uint16_t& x : v) x = FloatToHalf(normal(rng));
      Set(shape, ops, t, k, v);
    }
  }
  void Set(const Shape& shape, const OpTable* ops, int t, const std::vector<uint16_t>& k,
           const std::vector<uint16_t>& v) {
    keys[t] = k;
    values[t] = v;
    for (auto [run, bytes] : {std::pair(&packed_keys[t / 16], shape.key.bytes),
                              std::pair(&packed_values[t / 16], shape.value.bytes)})
      run->resize(16 * size_t(bytes) + 128, 0xee);
    PackKey(ops, shape.key, table.data(), k.data(), const_cast<uint8_t*>(Key(shape, t)));
    PackValue(ops, shape.value, v.data(), const_cast<uint8_t*>(Value(shape, t)));
  }
  const uint8_t* Key(const Shape& shape, int t) const {
    return packed_keys[t / 16].data() + size_t(t % 16) * shape.key.bytes;
  }
  const uint8_t* Value(const Shape& shape, int t) const {
    return packed_values[t / 16].data() + size_t(t % 16) * shape.value.bytes;
  }

  uint64_t rows;
  bool dense;
  std::vector<float> table;
  std::vector<uint16_t> keys[kTile], values[kTile];
  std::vector<uint8_t> packed_keys[kTile / 16], packed_values[kTile / 16];
};

struct State {
  State(const Shape& shape)
      : stride(PadTo16(shape.value.head_dim)),
        o(size_t(shape.n_rows()) * stride, 0.0f),
        m(size_t(shape.n_rows()), -kInf),
        d(size_t(shape.n_rows()), 0.0f) {}
  AttentionState view() { return {o.data(), m.data(), d.data()}; }
  size_t stride;
  std::vector<float> o, m, d;
};

std::vector<float> Slopes(float max_bias, int n_heads) {
  std::vector<float> slopes(size_t(n_heads), 1.0f);
  const int power = int(std::bit_floor(unsigned(n_heads)));
  for (int h = 0; h < n_heads && max_bias > 0.0f; ++h) {
    slopes[size_t(h)] =
        float(h < power ? std::pow(2.0, -double(max_bias) / power * (h + 1))
                        : std::pow(2.0, -double(max_bias) / 2 / power * (2 * (h - power) + 1)));
  }
  return slopes;
}

// One call of the kernel. q: [n_rows][k_dim]; visible: [n_tokens]; mask: [n_tokens][64] or empty.
void Attend(const Shape& shape, const OpTable* ops, const Tile& tile, const std::vector<float>& q,
            const std::vector<uint64_t>& visible, const std::vector<uint16_t>& mask, State& state) {
  std::vector<float> floats(
      ScratchFloats(shape.key.head_dim, shape.value.head_dim, size_t(shape.n_rows())) + 16, 0.0f);
  const auto at = reinterpret_cast<uintptr_t>(floats.data());
  const Scratch s = MakeScratch(reinterpret_cast<float*>((at + 63) & ~uintptr_t{63}),
                                shape.key.head_dim, shape.value.head_dim, size_t(shape.n_rows()));
  const std::vector<float> slopes = Slopes(shape.max_bias, shape.group);
  QueryBlock block{};
  block.q = q.data();
  block.q_stride = size_t(shape.key.head_dim);
  block.n_rows = shape.n_rows();
  block.group = shape.group;
  block.k_dim = shape.key.head_dim;
  block.v_dim = shape.value.head_dim;
  block.o_stride = int(state.stride);
  block.scale = shape.scale;
  block.softcap = shape.softcap;
  block.slope = mask.empty() ? nullptr : slopes.data();
  std::vector<const uint16_t*> masks(size_t(shape.n_tokens));
  for (size_t t = 0; t < masks.size(); ++t)
    masks[t] = mask.empty() ? nullptr : mask.data() + t * kTile;
  if (tile.dense) {
    DenseTile in{};
    in.rows = tile.rows;
    for (int t = 0; t < kTile; ++t) {
      in.key[t] = tile.rows >> t & 1 ? tile.keys[t].data() : nullptr;
      in.value[t] = tile.rows >> t & 1 ? tile.values[t].data() : nullptr;
    }
    const KeyLayout half =
        KeyLayout::Make(shape.key.head_dim, shape.key.head_dim, SPARKV_F16, SPARKV_RECOVER_ZERO);
    ops->prepare_queries(half, nullptr, block, s);
    ops->attend_dense(block, in, visible.data(), masks.data(), s, state.view());
  } else {
    PackedTile in{};
    in.rows = tile.rows;
    for (int run = 0; run < kTile / 16; ++run) {
      const bool used = (tile.rows >> (16 * run) & 0xffff) != 0;
      in.key[run] = used ? tile.packed_keys[run].data() : nullptr;
      in.value[run] = used ? tile.packed_values[run].data() : nullptr;
    }
    in.table = shape.key.needs_table() ? tile.table.data() : nullptr;
    ops->prepare_queries(shape.key, in.table, block, s);
    ops->attend_packed(shape.key, shape.value, block, in, visible.data(), masks.data(), s,
                       state.view());
  }
}

// Row t as the kernel reads it: a query that is a unit vector scores one channel, and alone its
// weight is 1.
void Probe(const Shape& shape, const OpTable* ops, const Tile& tile, int t, std::vector<float>* k,
           std::vector<float>* v) {
  Shape probe = shape;
  probe.group = 1;
  probe.n_tokens = shape.key.head_dim;
  probe.scale = 1.0f;
  probe.softcap = probe.max_bias = 0.0f;
  const size_t dim = size_t(shape.key.head_dim);
  std::vector<float> q(dim * dim, 0.0f);
  for (size_t j = 0; j < dim; ++j) q[j * dim + j] = 1.0f;
  State state(probe);
  Attend(probe, ops, tile, q, std::vector<uint64_t>(dim, uint64_t{1} << t), {}, state);
  *k = state.m;
  v->assign(state.o.begin(), state.o.begin() + shape.value.head_dim);
  if (!tile.dense && shape.value.rotated())
    Rotate(v->data(), shape.value.head_dim, RotationBlock(shape.value.head_dim));
}

struct Case {
  Shape shape;
  std::vector<Tile> tiles;                     // packed ones first, as in the cache
  std::vector<std::vector<uint64_t>> visible;  // [tile][token]
  std::vector<std::vector<uint16_t>> mask;     // [tile][token][64], or empty
  std::vector<float> q;
  std::vector<float> sinks;  // only for the reference: the cache adds them
};

std::vector<float> Output(Case& c, const OpTable* ops) {
  State state(c.shape);
  bool rotated = c.shape.value.rotated();
  const auto unrotate = [&] {
    for (int r = 0; rotated && r < c.shape.n_rows(); ++r) {
      Rotate(&state.o[size_t(r) * state.stride], c.shape.value.head_dim,
             RotationBlock(c.shape.value.head_dim));
    }
    rotated = false;
  };
  for (size_t i = 0; i < c.tiles.size(); ++i) {
    if (c.tiles[i].dense) unrotate();
    Attend(c.shape, ops, c.tiles[i], c.q, c.visible[i],
           c.mask.empty() ? std::vector<uint16_t>{} : c.mask[i], state);
  }
  unrotate();
  std::vector<float> out;
  for (size_t r = 0; r < size_t(c.shape.n_rows()); ++r) {
    for (size_t j = 0; j < size_t(c.shape.value.head_dim); ++j) {
      out.push_back(state.d[r] == 0.0f ? 0.0f : state.o[r * state.stride + j] / state.d[r]);
    }
  }
  return out;
}

std::vector<double> Want(const Case& c, const OpTable* ops) {
  std::vector<float> k, v, mask;
  std::vector<std::pair<size_t, int>> columns;
  for (size_t i = 0; i < c.tiles.size(); ++i) {
    for (int t = 0; t < kTile; ++t) {
      if ((c.tiles[i].rows >> t & 1) == 0) continue;
      std::vector<float> key, value;
      Probe(c.shape, ops, c.tiles[i], t, &key, &value);
      k.insert(k.end(), key.begin(), key.end());
      v.insert(v.end(), value.begin(), value.end());
      columns.emplace_back(i, t);
    }
  }
  for (int q = 0; q < c.shape.n_tokens; ++q) {
    for (const auto& [i, t] : columns) {
      const bool sees = c.visible[i][size_t(q)] >> t & 1;
      mask.push_back(!sees            ? -kInf
                     : c.mask.empty() ? 0.0f
                                      : HalfToFloat(c.mask[i][size_t(q * kTile + t)]));
    }
  }
  reference::Attention args;
  args.n_heads = c.shape.group;
  args.n_tokens = c.shape.n_tokens;
  args.n_kv = int(columns.size());
  args.k_dim = c.shape.key.head_dim;
  args.v_dim = c.shape.value.head_dim;
  args.scale = c.shape.scale;
  args.softcap = c.shape.softcap;
  args.max_bias = c.shape.max_bias;
  args.q = c.q.data();
  args.k = k.data();
  args.v = v.data();
  args.mask = mask.data();
  return reference::Attend(args);
}

// Packed tiles with holes, then a dense one; every query sees its own random part.
Case RandomCase(const Shape& shape, const OpTable* ops, int n_packed, int rows_per_tile,
                std::mt19937& rng) {
  Case c{shape, {}, {}, {}, {}, {}};
  std::normal_distribution<float> normal;
  for (int i = 0; i <= n_packed; ++i) {
    uint64_t rows = 0;
    while (std::popcount(rows) < rows_per_tile) rows |= uint64_t{1} << (rng() % 64);
    c.tiles.emplace_back(shape, ops, rows, i == n_packed, rng);
    c.visible.emplace_back();
    for (int t = 0; t < shape.n_tokens; ++t) {
      const uint64_t some = (uint64_t(rng()) << 32 | rng()) | (t % 3 == 0 ? ~uint64_t{0} : 0);
      c.visible.back().push_back(t % 7 == 5 ? 0 : rows & some);
    }
  }
  for (int r = 0; r < shape.n_rows() * shape.key.head_dim; ++r) c.q.push_back(normal(rng));
  return c;
}

// of_norm: how far off a number of a key may be, as a share of the row.
void ExpectReadAsUnpacked(const Shape& shape, const OpTable* ops, const Tile& tile, int t,
                          double of_norm, const std::string& where) {
  std::vector<float> k, v;
  Probe(shape, ops, tile, t, &k, &v);
  std::vector<uint16_t> key(tile.keys[t].size()), value(tile.values[t].size());
  ops->unpack_key(shape.key, tile.table.data(), tile.Key(shape, t), key.data());
  ops->unpack_value(shape.value, tile.Value(shape, t), value.data());
  // Tiers meet queries rotated: what is lost is a share of the row.
  const float norm = std::sqrt(std::inner_product(k.begin(), k.end(), k.begin(), 0.0f));
  for (size_t j = 0; j < key.size(); ++j) {
    ASSERT_NEAR(k[j], HalfToFloat(key[j]), std::fabs(k[j]) * 5e-4 + 4e-6 + norm * of_norm) << where;
  }
  for (size_t j = 0; j < value.size(); ++j)
    ASSERT_NEAR(v[j], HalfToFloat(value[j]), std::fabs(v[j]) * 5e-4 + 1e-5) << where;
}

class AttendOps : public testing::TestWithParam<const OpTable*> {};
INSTANTIATE_TEST_SUITE_P(Isa, AttendOps, testing::ValuesIn(AllOps()),
                         [](const auto& info) { return info.param->name; });

TEST_P(AttendOps, ReadsTheRowsThatUnpackGives) {
  std::mt19937 rng(1);
  for (const int dim : kHeadDims) {
    for (const sparkv_number kept :
         {SPARKV_F16, SPARKV_INT8, SPARKV_INT6, SPARKV_INT5, SPARKV_INT4, SPARKV_TIERS_7543,
          SPARKV_TIERS_7432, SPARKV_TIERS_6321, SPARKV_TIERS_5321, SPARKV_TIERS_4210}) {
      for (const double ratio : {0.0, 0.5, 0.97, 1.0}) {
        if (ratio > 0.0 && TierBits(kept, 0) > 0) continue;
        const sparkv_number values = kept == SPARKV_F16          ? SPARKV_F16
                                     : kept == SPARKV_INT8       ? SPARKV_INT8
                                     : kept < SPARKV_TIERS_7543  ? SPARKV_INT4
                                     : kept == SPARKV_TIERS_4210 ? SPARKV_TRELLIS1
                                     : kept == SPARKV_TIERS_5321 ? SPARKV_TRELLIS2
                                     : kept == SPARKV_TIERS_6321 ? SPARKV_TRELLIS3
                                                                 : SPARKV_TRELLIS4;
        Shape shape =
            MakeShape(dim, kHeadDims[rng() % std::size(kHeadDims)], 1, 1, ratio, kept, values);
        ShareAtRandom(rng, &shape.key);
        const int t = int(rng() % 64);
        const Tile tile(shape, GetParam(), uint64_t{1} << t, false, rng);
        ExpectReadAsUnpacked(shape, GetParam(), tile, t, 1e-6,
                             "D " + std::to_string(dim) + " kept " + std::to_string(kept) +
                                 " ratio " + std::to_string(ratio));
      }
    }
  }
}

// Each has bytes of its own that codes of several tiers share, or none.
TEST_P(AttendOps, ReadsTiersHoweverTheyShareTheirBits) {
  // AMX has numbers of two bf16, and here keys of every kind.
  const double of_norm = std::string_view(GetParam()->name).ends_with("amx") ? 2e-6 : 1e-6;
  std::mt19937 rng(31);
  int n = 0;
  for (const int dim : {64, 128}) {
    for (const sparkv_number kept : {SPARKV_TIERS_7543, SPARKV_TIERS_7432, SPARKV_TIERS_6321,
                                     SPARKV_TIERS_5321, SPARKV_TIERS_4210}) {
      std::set<std::string> known;
      for (int falls = 0; falls < 9 * 9 * 9; ++falls) {
        const sparkv_number values = std::array{SPARKV_TRELLIS1, SPARKV_TRELLIS2, SPARKV_TRELLIS3,
                                                SPARKV_TRELLIS4}[size_t(n % 4)];
        Shape shape = MakeShape(dim, dim, 1, 1, 0.0, kept, values);
        std::vector<uint16_t> weights(static_cast<size_t>(dim));
        for (int t = 0, left = falls; t < kTiers - 1; ++t, left /= 9)
          SetTierFall(t, std::min(4 * (left % 9), kMostFall), weights.data());
        shape.key = shape.key.Under(weights.data());
        std::string bits;
        for (const int b : shape.key.tier_bits) bits += char('0' + b);
        if (!known.insert(bits).second) continue;
        const int t = n++ * 5 % kTile;
        const Tile tile(shape, GetParam(), uint64_t{1} << t, false, rng);
        ExpectReadAsUnpacked(shape, GetParam(), tile, t, of_norm,
                             "D " + std::to_string(dim) + " " + bits);
      }
      EXPECT_GE(known.size(), 4u);
    }
  }
}

TEST_P(AttendOps, EqualsTheReferenceForEveryHeadDim) {
  std::mt19937 rng(2);
  for (const int dim : kHeadDims) {
    for (const int v_dim : {dim, dim == 128 ? 64 : 128, 40}) {
      const Shape shape = MakeShape(dim, v_dim, 1 + int(rng() % 4), 3);
      Case c = RandomCase(shape, GetParam(), 2, 6, rng);
      ASSERT_TRUE(Near(Output(c, GetParam()), Want(c, GetParam()), Sums(GetParam())))
          << "K " << dim << " V " << v_dim;
    }
  }
}

TEST_P(AttendOps, EqualsTheReferenceForEveryNumberType) {
  std::mt19937 rng(3);
  for (const sparkv_number kept :
       {SPARKV_F16, SPARKV_INT8, SPARKV_INT6, SPARKV_INT5, SPARKV_INT4, SPARKV_TIERS_7543,
        SPARKV_TIERS_7432, SPARKV_TIERS_6321, SPARKV_TIERS_5321, SPARKV_TIERS_4210}) {
    for (const sparkv_number values : {SPARKV_F16, SPARKV_INT8, SPARKV_INT4, SPARKV_TRELLIS4,
                                       SPARKV_TRELLIS3, SPARKV_TRELLIS2, SPARKV_TRELLIS1}) {
      for (const double ratio : {0.0, 0.3, 0.8, 1.0}) {
        if (ratio > 0.0 && TierBits(kept, 0) > 0) continue;
        Shape shape = MakeShape(72, 56, 2, 4, ratio, kept, values);
        ShareAtRandom(rng, &shape.key);
        Case c = RandomCase(shape, GetParam(), 2, 20, rng);
        ASSERT_TRUE(Near(Output(c, GetParam()), Want(c, GetParam()), Sums(GetParam())))
            << "kept " << kept << " values " << values << " ratio " << ratio;
      }
    }
  }
}

// One query and many take kernels of their own; with 128 channels a tier without bits may begin
// where a piece of 64 does.
TEST_P(AttendOps, EqualsTheReferenceHoweverTiersShareTheirBits) {
  std::mt19937 rng(7);
  for (const sparkv_number kept : {SPARKV_TIERS_7543, SPARKV_TIERS_7432, SPARKV_TIERS_6321,
                                   SPARKV_TIERS_5321, SPARKV_TIERS_4210}) {
    for (const int dim : {64, 128, 160}) {
      for (const int n_tokens : {1, 4}) {
        Shape shape = MakeShape(dim, 56, 2, n_tokens, 0.0, kept, SPARKV_TRELLIS3);
        ShareAtRandom(rng, &shape.key);
        Case c = RandomCase(shape, GetParam(), 1, 20, rng);
        ASSERT_TRUE(Near(Output(c, GetParam()), Want(c, GetParam()), Sums(GetParam())))
            << "kept " << kept << " D " << dim << " queries " << n_tokens;
      }
    }
  }
}

// Queries are hard as well: outliers, one channel alone, the whole range of f16. Scores reach 10,
// no more: f32 has to hold them.
TEST_P(AttendOps, EqualsTheReferenceOverHardRows) {
  std::mt19937 rng(11);
  const sparkv_number some[] = {SPARKV_INT8, SPARKV_INT4, SPARKV_TRELLIS3};
  for (const sparkv_number kept :
       {SPARKV_INT8, SPARKV_INT5, SPARKV_INT4, SPARKV_TIERS_7432, SPARKV_TIERS_5321}) {
    for (const int dim : {64, 128}) {
      for (int kind = 0; kind < kKinds - 1; ++kind) {
        const sparkv_number values = some[rng() % std::size(some)];
        const double ratio = TierBits(kept, 0) > 0 ? 0.0 : rng() % 3 * 0.5;
        Shape shape = MakeShape(dim, 64, 2, 2, ratio, kept, values);
        ShareAtRandom(rng, &shape.key);
        Case c = RandomCase(shape, GetParam(), 1, 20, rng);
        c.q.clear();
        for (int r = 0; r < shape.n_rows(); ++r) {
          for (const uint16_t x : HardRow(dim, r % 2 == 0 ? 0 : kind, rng))
            c.q.push_back(HalfToFloat(x));
        }
        double largest = 1e-9;
        for (Tile& tile : c.tiles) {
          for (int t = 0; t < kTile; ++t) {
            const std::vector<uint16_t> k = HardRow(dim, kind, rng), v = HardRow(64, kind, rng);
            tile.Set(shape, GetParam(), t, k, v);
            for (int r = 0; r < shape.n_rows(); ++r) {
              double score = 0.0;
              for (int j = 0; j < dim; ++j)
                score += double(c.q[size_t(r * dim + j)]) * double(HalfToFloat(k[size_t(j)]));
              largest = std::max(largest, std::fabs(score));
            }
          }
        }
        c.shape.scale = float(10.0 / largest);
        ASSERT_TRUE(Near(Output(c, GetParam()), Want(c, GetParam()), kBar))
            << "kept " << kept << " values " << values << " D " << dim << " ratio " << ratio
            << " kind " << kind;
      }
    }
  }
}

// Tokens of less than half a bit of the heaviest one's count when there are many. All have one
// value, so that none of their weights may get lost.
TEST_P(AttendOps, ATokenThatOutweighsAllOthersLeavesThemTheirShare) {
  std::mt19937 rng(12);
  for (const sparkv_number values : {SPARKV_INT8, SPARKV_INT4, SPARKV_TRELLIS3}) {
    for (const float lead : {2.0f, 6.0f, 11.8f, 14.0f}) {
      Shape shape = MakeShape(64, 64, 1, 1, 0.0, SPARKV_INT8, values);
      shape.scale = lead / 64.0f;
      Case c = RandomCase(shape, GetParam(), 0, 1, rng);
      Tile& tile = c.tiles[0];
      tile.rows = c.visible[0][0] = ~uint64_t{0};
      tile.dense = false;
      for (int t = 0; t < kTile; ++t) {
        const std::vector<uint16_t> k(64, FloatToHalf(t == 5 ? 2.0f : 1.0f));
        tile.Set(shape, GetParam(), t, k, tile.values[0]);
      }
      c.q.assign(64, 1.0f);
      ASSERT_TRUE(Near(Output(c, GetParam()), Want(c, GetParam()), kBar))
          << "values " << values << " lead " << lead;
    }
  }
}

TEST_P(AttendOps, EqualsTheReferenceForEveryGroupAndNumberOfQueries) {
  std::mt19937 rng(4);
  for (int group = 1; group <= 8; ++group) {
    for (const int n_tokens : {1, 2, 3, 5, 6, 7, 13, 64, 130}) {
      const Shape shape = MakeShape(32, 40, group, n_tokens);
      Case c = RandomCase(shape, GetParam(), 2, 40, rng);
      ASSERT_TRUE(Near(Output(c, GetParam()), Want(c, GetParam()), Sums(GetParam())))
          << "group " << group << " queries " << n_tokens;
    }
  }
}

TEST_P(AttendOps, EveryPlaceInATileAloneGivesItsValue) {
  std::mt19937 rng(5);
  for (const bool dense : {false, true}) {
    const Shape shape = MakeShape(64, 64, 2, 2);
    const Tile tile(shape, GetParam(), ~uint64_t{0}, dense, rng);
    for (int t = 0; t < kTile; ++t) {
      Case c = RandomCase(shape, GetParam(), 0, 1, rng);
      c.tiles = {tile};
      c.visible = {{uint64_t{1} << t, 0}};
      std::vector<float> k, v;
      Probe(shape, GetParam(), tile, t, &k, &v);
      std::vector<float> want = v;
      want.insert(want.end(), v.begin(), v.end());
      want.resize(4 * 64, 0.0f);  // the second query sees nothing
      ASSERT_TRUE(Near(Output(c, GetParam()), want, Sums(GetParam())))
          << "dense " << dense << " place " << t;
    }
  }
}

TEST_P(AttendOps, EqualsTheReferenceWithSoftCapAndSlopesAndMaskValues) {
  std::mt19937 rng(6);
  std::uniform_real_distribution<float> bias(-30.0f, 3.0f);
  for (const float softcap : {0.0f, 5.0f, 50.0f}) {
    for (const float max_bias : {0.0f, 8.0f}) {
      for (const int group : {1, 2, 3, 6, 8}) {
        Shape shape = MakeShape(64, 96, group, 9);
        shape.softcap = softcap;
        shape.max_bias = max_bias;
        shape.scale = 0.5f;
        Case c = RandomCase(shape, GetParam(), 2, 30, rng);
        for (size_t i = 0; i < c.tiles.size(); ++i) {
          c.mask.emplace_back();
          for (int j = 0; j < shape.n_tokens * kTile; ++j) {
            const bool sees = c.visible[i][size_t(j / kTile)] >> (j % kTile) & 1;
            c.mask.back().push_back(sees ? FloatToHalf(bias(rng))
                                         : uint16_t(j % 2 == 0 ? 0xfc00 : 0x7e00));
          }
        }
        ASSERT_TRUE(Near(Output(c, GetParam()), Want(c, GetParam()), 2 * kKernelSums))
            << "softcap " << softcap << " max_bias " << max_bias << " group " << group;
      }
    }
  }
}

TEST_P(AttendOps, NaNAndInfinityReachOnlyTheQueriesThatSeeThem) {
  std::mt19937 rng(7);
  const auto check = [&](const Shape& shape, bool in_key, uint16_t bad, size_t where) {
    Case c = RandomCase(shape, GetParam(), 1, 20, rng);
    Case clean = c;
    const int t = std::countr_zero(c.tiles[where].rows);
    std::vector<uint16_t> k = c.tiles[where].keys[t], v = c.tiles[where].values[t];
    (in_key ? k : v)[17] = bad;
    c.tiles[where].Set(shape, GetParam(), t, k, v);
    const std::vector<float> got = Output(c, GetParam()), want = Output(clean, GetParam());
    const size_t per_token = got.size() / size_t(shape.n_tokens);
    for (size_t token = 0; token < size_t(shape.n_tokens); ++token) {
      const bool sees = c.visible[where][token] >> t & 1;
      bool shows = false;
      for (size_t i = token * per_token; i < (token + 1) * per_token; ++i) {
        shows |= !std::isfinite(got[i]);
        // Rows with such a number may be read in another way, so sums may have another order.
        if (sees) continue;
        ASSERT_NEAR(got[i], want[i], 1e-5) << "in a query that does not see it";
      }
      // An infinite key may lose or win by its sign; a NaN, and any bad value, must show.
      ASSERT_TRUE(shows || !sees || (in_key && bad != 0x7e00));
    }
  };
  for (const auto& [number, ratio] :
       {std::pair(SPARKV_F16, 0.0), {SPARKV_F16, 0.5}, {SPARKV_INT8, 0.5}, {SPARKV_INT5, 0.5}}) {
    for (const int n_tokens : {1, 3, 11}) {
      const Shape shape = MakeShape(64, 64, 2, n_tokens, ratio, number,
                                    number == SPARKV_INT5 ? SPARKV_INT4 : number);
      for (const bool in_key : {true, false}) {
        for (const uint16_t bad : {uint16_t{0x7e00}, uint16_t{0x7c00}, uint16_t{0xfc00}}) {
          for (const size_t where : {size_t{0}, size_t{1}}) {  // packed, dense
            SCOPED_TRACE("key " + std::to_string(in_key) + " tile " + std::to_string(where) +
                         " number " + std::to_string(number) + " ratio " + std::to_string(ratio) +
                         " tokens " + std::to_string(n_tokens));
            ASSERT_NO_FATAL_FAILURE(check(shape, in_key, bad, where));
          }
        }
      }
    }
  }
}

TEST_P(AttendOps, HugeAndEqualScoresDoNotOverflow) {
  std::mt19937 rng(8);
  for (const float scale : {0.0f, 1e3f, -1e3f, 1e30f}) {
    Shape shape = MakeShape(64, 64, 3, 8);
    shape.scale = scale;
    Case c = RandomCase(shape, GetParam(), 2, 30, rng);
    const std::vector<float> got = Output(c, GetParam());
    if (scale == 1e30f) {
      for (const float x : got) ASSERT_TRUE(std::isfinite(x));
    } else {
      // A score of 1e4 has an error of 1e-3 in f32.
      ASSERT_TRUE(Near(got, Want(c, GetParam()), scale == 0.0f ? Sums(GetParam()) : 2e-2)) << scale;
    }
  }
  // A later tile that is far above or below what the state holds.
  for (const float factor : {1e-4f, 1e4f}) {
    Shape shape = MakeShape(32, 32, 1, 1, 0.0, SPARKV_F16, SPARKV_F16);
    Case c = RandomCase(shape, GetParam(), 1, 5, rng);
    for (int t = 0; t < kTile; ++t) {
      std::vector<uint16_t> k = c.tiles[1].keys[t];
      for (uint16_t& x : k) x = FloatToHalf(HalfToFloat(x) * factor);
      c.tiles[1].Set(shape, GetParam(), t, k, c.tiles[1].values[t]);
    }
    ASSERT_TRUE(Near(Output(c, GetParam()), Want(c, GetParam()), 1e-2)) << factor;
  }
}

TEST_P(AttendOps, DoesNotReadRowsThatAreNotInTheTile) {
  std::mt19937 rng(9);
  const Shape shape = MakeShape(64, 64, 4, 3, 0.0, SPARKV_F16, SPARKV_F16);
  for (const uint64_t rows :
       {uint64_t{1}, uint64_t{1} << 63, (uint64_t{1} << 63) | 1, uint64_t{0x8000000100000002}}) {
    Case c = RandomCase(shape, GetParam(), 0, 1, rng);
    for (const bool dense : {false, true}) {
      // Pointers of other rows are NULL; what scratch holds there must not count.
      c.tiles = {Tile(shape, GetParam(), rows, dense, rng)};
      c.visible = {{rows, rows, 0}};
      ASSERT_TRUE(Near(Output(c, GetParam()), Want(c, GetParam()), Sums(GetParam()))) << rows;
    }
  }
}

// ---- through the cache ----

TEST(Attend, SlopesMaskValuesSinksAndSoftCapReachTheKernelsThroughTheCache) {
  std::mt19937 rng(10);
  std::uniform_real_distribution<float> bias(-8.0f, 0.5f), logit(-2.0f, 6.0f);
  for (const int n_heads : {4, 6, 12}) {
    for (const float max_bias : {0.0f, 8.0f}) {
      for (const float softcap : {0.0f, 3.0f}) {
        for (const bool with_sinks : {false, true}) {
          Model model;
          model.layers = {{2, 64, 32, n_heads / 2}};
          model.set = {{"window", "8"}};
          Host host(model);
          host.Feed(0, 1, 0, 70, {70});
          Step step = host.Begin({{0, Content(1, 70)}, {0, Content(1, 71)}, {0, Content(1, 72)}});
          const size_t n_kv = size_t(step.n_kv);
          std::vector<float> mask(3 * n_kv, -kInf);
          for (size_t i = 0; i < mask.size(); ++i) {
            if (step.mask[i] == kHidden) continue;
            step.mask[i] = FloatToHalf(bias(rng));
            mask[i] = HalfToFloat(step.mask[i]);
          }
          std::fill(step.mask.begin() + long(n_kv), step.mask.begin() + long(2 * n_kv),
                    kHidden);  // sees nothing
          std::fill(mask.begin() + long(n_kv), mask.begin() + long(2 * n_kv), -kInf);
          std::vector<float> sinks, q, k, v, out(3 * host.layer(0).out_row(), kNaN);
          for (int h = 0; h < n_heads; ++h) sinks.push_back(logit(rng));
          for (const uint64_t content : step.contents) {
            for (const float x : Numbers(content, kQueries, 0, host.layer(0).q_row()))
              q.push_back(x);
          }
          ASSERT_EQ(host.Write(step, 0, kKeys), SPARKV_OK);
          ASSERT_EQ(host.Write(step, 0, kValues), SPARKV_OK);
          sparkv_attend_args args = host.Args(step, 0, q.data(), out.data());
          args.max_bias = max_bias;
          args.softcap = softcap;
          args.sinks = with_sinks ? sinks.data() : nullptr;
          ASSERT_EQ(sparkv_cache_attend(host.cache, &args, &host.error), SPARKV_OK)
              << host.error.text;
          for (const uint16_t x : host.Read(kKeys, 0, 0, step.n_kv)) k.push_back(HalfToFloat(x));
          for (const uint16_t x : host.Read(kValues, 0, 0, step.n_kv)) v.push_back(HalfToFloat(x));
          reference::Attention want;
          want.n_heads = n_heads;
          want.n_kv_heads = 2;
          want.n_tokens = 3;
          want.n_kv = int(n_kv);
          want.k_dim = 64;
          want.v_dim = 32;
          want.scale = args.scale;
          want.max_bias = max_bias;
          want.softcap = softcap;
          want.q = q.data();
          want.k = k.data();
          want.v = v.data();
          want.mask = mask.data();
          want.sinks = args.sinks;
          ASSERT_TRUE(Near(out, reference::Attend(want), kSums))
              << n_heads << " heads, max_bias " << max_bias << " softcap " << softcap << " sinks "
              << with_sinks;
          for (size_t i = host.layer(0).out_row(); i < 2 * host.layer(0).out_row(); ++i)
            ASSERT_EQ(out[i], 0.0f);
        }
      }
    }
  }
}

TEST(Attend, NoMaskMeansThatAllCellsUpToNKvAreSeen) {
  Model model;
  model.set = {{"window", "8"}};
  Host host(model);
  host.Feed(0, 1, 0, 50, {50});
  Step step = host.Begin({{0, Content(1, 50)}});
  step.n_kv = 51;
  Answer answer;
  for (int l = 0; l < host.n_layers(); ++l) {
    ASSERT_EQ(host.Write(step, l, kKeys), SPARKV_OK);
    ASSERT_EQ(host.Write(step, l, kValues), SPARKV_OK);
    const std::vector<float> q = Numbers(Content(1, 50), kQueries, l, host.layer(l).q_row());
    std::vector<float> out(host.layer(l).out_row());
    sparkv_attend_args args = host.Args(step, l, q.data(), out.data());
    args.mask = nullptr;
    ASSERT_EQ(sparkv_cache_attend(host.cache, &args, &host.error), SPARKV_OK);
    answer.insert(answer.end(), out.begin(), out.end());
  }
  EXPECT_TRUE(Near(answer, host.Expected(step.sees[0]), kSums));
}

}  // namespace
}  // namespace sparkv::test
