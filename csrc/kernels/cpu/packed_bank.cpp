#include "packed_bank.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace saferclip::cpu {
namespace {

constexpr char kMagic[8] = {'S', 'F', 'C', 'B', 'A', 'N', 'K', '8'};
constexpr uint32_t kVersion = 1;
constexpr int64_t kMeanSample = 256;

struct Header {
  char magic[8];
  uint32_t version;
  uint32_t panel_rows;
  int64_t count;
  int64_t dim;
  uint8_t reserved[32];
};
static_assert(sizeof(Header) == 64);

int64_t mean_bytes(int64_t dim) { return (dim * 4 + 63) / 64 * 64; }
int64_t panel_count(int64_t count) { return (count + kPanelRows - 1) / kPanelRows; }

}  // namespace

int64_t packed_size(int64_t count, int64_t dim) {
  return static_cast<int64_t>(sizeof(Header)) + mean_bytes(dim) +
         panel_count(count) * panel_bytes(dim);
}

const uint8_t* packed_mean(const uint8_t* blob) { return blob + sizeof(Header); }

const uint8_t* packed_panels(const uint8_t* blob, int64_t dim) {
  return blob + sizeof(Header) + mean_bytes(dim);
}

bool packed_matches(const uint8_t* blob, int64_t size, int64_t count, int64_t dim) {
  if (size != packed_size(count, dim)) return false;
  Header header;
  std::memcpy(&header, blob, sizeof(header));
  return std::memcmp(header.magic, kMagic, sizeof(kMagic)) == 0 && header.version == kVersion &&
         header.panel_rows == kPanelRows && header.count == count && header.dim == dim;
}

void sample_mean(const Matrix& bank, float* mean) {
  const int64_t samples = std::min(bank.rows, kMeanSample);
  std::fill_n(mean, bank.dim, 0.0f);
  for (int64_t i = 0; i < samples; ++i) {
    kernels().accumulate(bank.row(i * bank.rows / samples), bank.dtype, bank.dim, mean);
  }
  for (int64_t j = 0; j < bank.dim; ++j) {
    mean[j] /= static_cast<float>(samples);
    if (!std::isfinite(mean[j])) mean[j] = 0;
  }
}

void pack_bank(const Matrix& bank, uint8_t* blob, const Parallel& parallel) {
  Header header = {};
  std::memcpy(header.magic, kMagic, sizeof(kMagic));
  header.version = kVersion;
  header.panel_rows = kPanelRows;
  header.count = bank.rows;
  header.dim = bank.dim;
  std::memcpy(blob, &header, sizeof(header));

  std::vector<float> mean(bank.dim + 16);
  sample_mean(bank, mean.data());
  std::memset(blob + sizeof(header), 0, mean_bytes(bank.dim));
  std::memcpy(blob + sizeof(header), mean.data(), bank.dim * 4);

  const Kernels& kernel = kernels();
  uint8_t* panels = blob + sizeof(header) + mean_bytes(bank.dim);
  constexpr int64_t kPanelsPerTask = 16;
  const int64_t total = panel_count(bank.rows);
  parallel((total + kPanelsPerTask - 1) / kPanelsPerTask, [&](int64_t task) {
    std::vector<float> scratch(bank.dim + 16);
    const int64_t end = std::min(total, (task + 1) * kPanelsPerTask);
    for (int64_t p = task * kPanelsPerTask; p < end; ++p) {
      const int64_t rows = std::min<int64_t>(kPanelRows, bank.rows - p * kPanelRows);
      kernel.quantize(bank.row(p * kPanelRows), bank.dtype, static_cast<int>(rows), bank.dim,
                      mean.data(), sum_slack(bank.dim), scratch.data(),
                      panels + p * panel_bytes(bank.dim));
    }
  });
}

}  // namespace saferclip::cpu
