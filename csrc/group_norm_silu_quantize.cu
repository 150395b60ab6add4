// GroupNorm, SiLU and quantization: how the work is cut, and the call (group_norm_quantize.cuh has the kernels).
#include <algorithm>
#include <numeric>

#include "group_norm_quantize.cuh"

namespace {

using namespace ldmq;

constexpr int kSectorChannels = 32;  // whole sectors of 32 bytes, in 8 bits and wider
constexpr int kLeastChunk = 128;     // channels of a chunk
constexpr int kLeastUnit = 4096;     // values of a unit, 16 to a thread

Mode mode_of(const ldmq_group_norm& norm) {
  return norm.to.inv_scale ? Mode::kStatic : norm.per_token ? Mode::kPerToken : Mode::kPerSample;
}

// Cuts the work so that all blocks have about the same.
Plan cut(const ldmq_group_norm& norm, int multiprocessors) {
  Plan plan = {};
  plan.samples = static_cast<int>(norm.samples);
  plan.pixels = static_cast<int>(norm.pixels);
  plan.channels = static_cast<int>(norm.channels);
  plan.groups = static_cast<int>(norm.groups);
  plan.group = plan.channels / plan.groups;
  const int whole = kSectorChannels / std::gcd(plan.group, kSectorChannels);  // groups that end with a sector
  plan.chunk_groups = std::min(plan.groups, whole * std::max(1, kLeastChunk / (whole * plan.group)));
  plan.chunks = static_cast<int>(ceil_div(plan.groups, plan.chunk_groups));
  const int64_t blocks = kBlocks * multiprocessors, columns = norm.samples * plan.chunks;
  const int64_t chunk = static_cast<int64_t>(plan.chunk_groups) * plan.group;
  const int64_t most = std::clamp<int64_t>(norm.pixels * chunk / kLeastUnit, 1, norm.pixels);
  int64_t least_cost = INT64_MAX;
  const int64_t first_wave = ceil_div(columns, blocks);
  for (int64_t wave = first_wave; wave < first_wave + 4; ++wave) {
    const int64_t parts = std::min(most, wave * blocks / columns);
    const int64_t cost = ceil_div(columns * parts, blocks) * ceil_div(norm.pixels, parts);
    if (cost >= least_cost) continue;
    least_cost = cost;
    plan.part_pixels = static_cast<int>(ceil_div(norm.pixels, parts));
  }
  plan.parts = static_cast<int>(ceil_div(norm.pixels, plan.part_pixels));
  plan.units = columns * plan.parts;
  return plan;
}

// Lays out what blocks tell each other from `scratch` on; returns its bytes.
int64_t lay_out(Plan& plan, Mode mode, char* scratch) {
  const int64_t channels = mode == Mode::kPerSample ? static_cast<int64_t>(plan.samples) * plan.channels : 0;
  const int64_t moments = channels * plan.parts * sizeof(Extremes);
  const int64_t bounds = moments + static_cast<int64_t>(plan.samples) * plan.groups * plan.parts * sizeof(Moments);
  plan.extremes = reinterpret_cast<Extremes*>(scratch);
  plan.moments = reinterpret_cast<Moments*>(scratch + moments);
  plan.bounds = reinterpret_cast<uint32_t*>(scratch + bounds);
  return bounds + channels * sizeof(uint32_t);
}

}  // namespace

extern "C" int ldmq_group_norm_scratch(const ldmq_group_norm* norm, int device, int64_t* bytes) {
  *bytes = 0;
  if (norm->samples == 0 || norm->pixels == 0 || norm->channels == 0) return cudaSuccess;
  int multiprocessors = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  Plan plan = cut(*norm, multiprocessors);
  *bytes = lay_out(plan, mode_of(*norm), nullptr);
  return cudaSuccess;
}

extern "C" int ldmq_group_norm_silu_quantize(const ldmq_group_norm* norm, void* scratch, int device, void* stream) {
  if (norm->samples == 0 || norm->pixels == 0 || norm->channels == 0) return cudaSuccess;
  const Mode mode = mode_of(*norm);
  if (mode == Mode::kPerToken && norm->channels > LDMQ_MAX_PIXEL_CHANNELS) return cudaErrorInvalidValue;
  const DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return guard.error;
  int multiprocessors = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  Task task = {cut(*norm, multiprocessors), norm->weight, norm->bias, Factors(norm->to), norm->eps, norm->silu != 0,
               norm->to.q, norm->to.scale};
  lay_out(task.plan, mode, static_cast<char*>(scratch));
  if (norm->to.q_dtype == LDMQ_INT8) return group_norm_to_int8(*norm, task, mode, multiprocessors, stream);
#if LDMQ_HAS_SM89
  if (norm->to.q_dtype == LDMQ_FLOAT8) return group_norm_to_fp8(*norm, task, mode, multiprocessors, stream);
#endif
  return cudaErrorInvalidValue;
}
