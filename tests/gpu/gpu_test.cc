// The GPU's kernels on a GPU, against attention in double precision over the same rows. Skipped
// where there is none; tests/unit/gpu_test.cc runs the same kernels on the CPU.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include "gpu_case.h"

namespace sparkv::test {
namespace {

class Device {
 public:
  ~Device() {
    for (void* p : owned_) cudaFree(p);
  }
  // NULL stays NULL.
  template <typename T>
  T* Put(const T* host, size_t n) {
    if (host == nullptr) return nullptr;
    void* p = nullptr;
    EXPECT_EQ(cudaMalloc(&p, std::max<size_t>(n * sizeof(T), 16)), cudaSuccess);
    owned_.push_back(p);
    EXPECT_EQ(cudaMemcpy(p, host, n * sizeof(T), cudaMemcpyHostToDevice), cudaSuccess);
    return static_cast<T*>(p);
  }

 private:
  std::vector<void*> owned_;
};

double ErrorOf(const GpuShape& shape, unsigned seed) {
  const GpuCase c(shape, seed);
  std::vector<sparkv_gpu_rows> rows;
  std::vector<float> out;
  sparkv_gpu_step step = c.Step(&rows, &out);
  Device device;
  for (size_t i = 0; i < rows.size(); ++i) {
    const GpuCase::Store& store = c.stores[i];
    rows[i].key_pages = device.Put(store.key_pages.data(), store.key_pages.size());
    rows[i].value_pages = device.Put(store.value_pages.data(), store.value_pages.size());
    rows[i].weights = device.Put(rows[i].weights, store.weights.size());
    rows[i].pages = device.Put(rows[i].pages, store.pages.size());
    rows[i].rows = device.Put(rows[i].rows, store.rows.size());
    rows[i].n_rows = device.Put(rows[i].n_rows, store.n_rows.size());
  }
  step.q = device.Put(c.q.data(), c.q.size());
  float* device_out = device.Put(out.data(), out.size());
  step.out = device_out;
  step.workspace_size = sparkv_gpu_workspace_bytes(&step);
  EXPECT_GT(step.workspace_size, 0u);
  const std::vector<uint8_t> dirt(step.workspace_size, 0xff);
  step.workspace = device.Put(dirt.data(), dirt.size());
  sparkv_error error{};
  EXPECT_EQ(sparkv_gpu_attend(&step, &error), SPARKV_OK) << error.text;
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_EQ(cudaMemcpy(out.data(), device_out, out.size() * sizeof(float), cudaMemcpyDeviceToHost),
            cudaSuccess);
  return c.Error(out);
}

constexpr double kNear = 1e-4;

class GpuDevice : public testing::Test {
 protected:
  void SetUp() override {
    int n = 0;
    const cudaError_t error = cudaGetDeviceCount(&n);
    if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver || n == 0)
      GTEST_SKIP() << "no GPU on this machine";
    ASSERT_EQ(error, cudaSuccess) << cudaGetErrorString(error);
  }
};

TEST_F(GpuDevice, EqualsTheReferenceForEveryRowFormat) {
  for (const int dim : {64, 128, 256}) {
    for (const auto& [keys, values] : kPageFormats) {
      for (const int group : {1, 3, 8}) {
        GpuShape shape;
        shape.head_dim = dim;
        shape.kv_heads = 2;
        shape.group = group;
        shape.stores = {{keys, values, {77, 500}}};
        const double error = ErrorOf(shape, unsigned(group));
        EXPECT_LT(error, kNear) << dim << " " << keys << " " << group;
        RecordProperty("error_" + std::to_string(dim) + "_" + std::to_string(keys) + "_" +
                           std::to_string(group),
                       std::to_string(error));
      }
    }
  }
}

TEST_F(GpuDevice, EqualsTheReferenceForGroupsSequencesAndHoles) {
  for (const int group : kGroups)
    EXPECT_LT(ErrorOf(ShapeOfGroup(group, {1, 0, 32, 300, 2000}), 2), kNear) << group;
}

TEST_F(GpuDevice, EqualsTheReferenceOverAllStoresTogether) {
  EXPECT_LT(ErrorOf(ShapeOfAllStores(500, 900), 3), kNear);
}

// A warp has many pages, and its stages are used again and again.
TEST_F(GpuDevice, EqualsTheReferenceForLongRows) {
  for (const int dim : {64, 128, 256}) {
    for (const auto& [keys, values] :
         {std::pair(SPARKV_TIERS_6321, SPARKV_TRELLIS3),
          std::pair(SPARKV_TIERS_7432, SPARKV_TRELLIS4), std::pair(SPARKV_INT8, SPARKV_INT8),
          std::pair(SPARKV_F16, SPARKV_F16)}) {
      for (const int group : {2, 8}) {
        GpuShape shape;
        shape.head_dim = dim;
        shape.kv_heads = 2;
        shape.group = group;
        shape.repeat = 500;
        shape.stores = {{keys, values, {320, 0, 64}}};
        EXPECT_LT(ErrorOf(shape, 7), kNear) << dim << " " << keys << " " << group;
      }
    }
  }
}

TEST_F(GpuDevice, RowsThatAreNotFiniteSpoilTheirSequenceAlone) {
  for (const GpuShape& shape : ShapesThatAreNotFinite(400))
    EXPECT_LT(ErrorOf(shape, 4), kNear) << shape.stores[0].keys;
}

TEST_F(GpuDevice, PagesWithoutRowsAreNotRead) { EXPECT_LT(ErrorOf(ShapeWithoutAPage(), 6), kNear); }

}  // namespace
}  // namespace sparkv::test
