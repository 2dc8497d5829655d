#include <string>

#include "capi/guard.h"
#include "method/group_mode.h"
#include "method/observe.h"
#include "method/prune_values.h"
#include "method/recover.h"
#include "method/saliency.h"
#include "method/select.h"
#include "method/think.h"

namespace sparkv {
namespace {

// Collects the first thing wrong with the arguments of one call.
class Arguments {
 public:
  Arguments& Pointer(const char* name, const void* pointer) {
    if (pointer == nullptr) Fail(std::string(name) + ": NULL");
    return *this;
  }
  Arguments& Range(const char* name, int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high)
      Fail(Outside(name, std::to_string(value), std::to_string(low), std::to_string(high)));
    return *this;
  }
  Arguments& HeadDim(int32_t head_dim) { return Range("head_dim", head_dim, 1, kMaxSelect); }
  Arguments& Ratio(double ratio) {
    if (!(ratio >= 0.0 && ratio <= 1.0)) Fail(Outside("ratio", Text(ratio), "0", "1"));
    return *this;
  }
  Arguments& TopP(double top_p) {
    if (!(top_p > 0.0 && top_p <= 1.0)) Fail("top_p: " + Text(top_p) + " is outside (0, 1]");
    return *this;
  }
  // Call after HeadDim: reads the weights only if everything before was right.
  Arguments& Weights(const float* u, int32_t head_dim) {
    Pointer("u", u);
    for (int j = 0; status_.ok() && j < head_dim; ++j) {
      if (u[j] < 0.0f) Fail("u[" + std::to_string(j) + "]: " + Text(u[j]) + " is negative");
    }
    return *this;
  }
  template <typename Body>
  Status Then(Body&& body) {
    if (status_.ok()) body();
    return std::move(status_);
  }

 private:
  static std::string Text(double x) {
    char text[32];
    std::snprintf(text, sizeof(text), "%g", x);
    return text;
  }
  static std::string Outside(const char* name, const std::string& value, const std::string& low,
                             const std::string& high) {
    return std::string(name) + ": " + value + " is outside [" + low + ", " + high + "]";
  }
  void Fail(std::string text) {
    if (status_.ok()) status_ = Status::Invalid(std::move(text));
  }
  Status status_;
};

constexpr int32_t kMaxGroup = 4096, kMaxTokens = 1 << 30;

}  // namespace
}  // namespace sparkv

using sparkv::Arguments;
using sparkv::Guard;
using sparkv::Status;

sparkv_status sparkv_channel_weight(const float* q, int32_t group, int32_t n_queries,
                                    int32_t head_dim, int32_t how, float* u, sparkv_error* error) {
  return Guard(error, [&]() -> Status {
    return Arguments()
        .Pointer("q", q)
        .Pointer("u", u)
        .HeadDim(head_dim)
        .Range("group", group, 1, sparkv::kMaxGroup)
        .Range("n_queries", n_queries, 1, sparkv::kMaxTokens)
        .Range("how", how, 0, SPARKV_GROUP_ENERGY)
        .Then([&] { sparkv::ChannelWeight(q, group, n_queries, head_dim, sparkv_group(how), u); });
  });
}

sparkv_status sparkv_select(const float* k, const float* u, int32_t head_dim, int32_t kept,
                            uint8_t* mask, sparkv_error* error) {
  return Guard(error, [&]() -> Status {
    return Arguments()
        .Pointer("k", k)
        .Pointer("mask", mask)
        .HeadDim(head_dim)
        .Weights(u, head_dim)
        .Range("kept", kept, 0, head_dim)
        .Then([&] { sparkv::SelectChannels(k, u, head_dim, kept, mask); });
  });
}

sparkv_status sparkv_recover_key(const float* k, const float* u, const uint8_t* mask,
                                 int32_t head_dim, int32_t how, float* out, sparkv_error* error) {
  return Guard(error, [&]() -> Status {
    return Arguments()
        .Pointer("k", k)
        .Pointer("mask", mask)
        .Pointer("out", out)
        .HeadDim(head_dim)
        .Weights(u, head_dim)
        .Range("how", how, 0, SPARKV_RECOVER_PAPER)
        .Then([&] { sparkv::RecoverKey(k, u, mask, head_dim, sparkv_recover(how), out); });
  });
}

sparkv_status sparkv_group_mode(const float* k, const float* u, int32_t head_dim, int32_t how,
                                int32_t* group_id, uint8_t* mask, float* out, sparkv_error* error) {
  return Guard(error, [&]() -> Status {
    return Arguments()
        .Pointer("k", k)
        .Pointer("group_id", group_id)
        .Pointer("mask", mask)
        .Pointer("out", out)
        .HeadDim(head_dim)
        .Weights(u, head_dim)
        .Range("how", how, 0, SPARKV_RECOVER_PAPER)
        .Then([&] {
          *group_id = sparkv::SelectGroup(k, u, head_dim, mask);
          sparkv::RecoverKey(k, u, mask, head_dim, sparkv_recover(how), out);
        });
  });
}

sparkv_status sparkv_prune_values(const float* v, int32_t n_tokens, int32_t head_dim, double ratio,
                                  int32_t how, uint8_t* mask, float* out, sparkv_error* error) {
  return Guard(error, [&]() -> Status {
    return Arguments()
        .Pointer("v", v)
        .Pointer("mask", mask)
        .Pointer("out", out)
        .HeadDim(head_dim)
        .Range("n_tokens", n_tokens, 0, sparkv::kMaxTokens)
        .Ratio(ratio)
        .Range("how", how, 0, SPARKV_RECOVER_MEAN)
        .Then([&] {
          sparkv::PruneValues(v, n_tokens, head_dim, ratio, sparkv_recover(how), mask, out);
        });
  });
}

sparkv_status sparkv_prune_values_top_p(const float* v, int32_t n_tokens, int32_t head_dim,
                                        double top_p, int32_t how, uint8_t* mask, float* out,
                                        sparkv_error* error) {
  return Guard(error, [&]() -> Status {
    return Arguments()
        .Pointer("v", v)
        .Pointer("mask", mask)
        .Pointer("out", out)
        .HeadDim(head_dim)
        .Range("n_tokens", n_tokens, 0, sparkv::kMaxTokens)
        .TopP(top_p)
        .Range("how", how, 0, SPARKV_RECOVER_MEAN)
        .Then([&] {
          sparkv::PruneValuesTopP(v, n_tokens, head_dim, top_p, sparkv_recover(how), mask, out);
        });
  });
}

sparkv_status sparkv_think(const float* q, int32_t group, int32_t n_queries, const float* k,
                           int32_t n_tokens, int32_t head_dim, double ratio, uint8_t* mask,
                           sparkv_error* error) {
  return Guard(error, [&]() -> Status {
    return Arguments()
        .Pointer("q", q)
        .Pointer("k", k)
        .Pointer("mask", mask)
        .HeadDim(head_dim)
        .Range("group", group, 1, sparkv::kMaxGroup)
        .Range("n_queries", n_queries, 1, sparkv::kMaxTokens)
        .Range("n_tokens", n_tokens, 0, sparkv::kMaxTokens)
        .Ratio(ratio)
        .Then([&] { sparkv::ThinkMask(q, group, n_queries, k, n_tokens, head_dim, ratio, mask); });
  });
}
