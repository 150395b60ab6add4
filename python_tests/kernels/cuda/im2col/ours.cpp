// What csrc/tensor_map.h gives the driver for the activations of a convolution, in the numbers of witness.cpp.
#include <tensor_map.h>

#include <cstdio>

int main() {
  cudaSetDevice(0);
  int pixels, channels, n, c, h, w, k, r, s, pad[4], stride_h, stride_w, dilation_h, dilation_w;
  while (std::scanf("%d %d %d %d %d %d %d %d %d %d %d %d %d %d %d %d %d", &pixels, &channels, &n, &c, &h, &w, &k, &r,
                    &s, &pad[0], &pad[1], &pad[2], &pad[3], &stride_h, &stride_w, &dilation_h, &dilation_w) == 17) {
    alignas(128) static int8_t memory[128];
    ldmq_gemm gemm = {};
    gemm.x = memory;
    gemm.samples = n, gemm.channels = c, gemm.height = h, gemm.width = w;
    gemm.kernel_height = r, gemm.kernel_width = s;
    gemm.pad_top = pad[0], gemm.pad_left = pad[2];
    gemm.stride_height = stride_h, gemm.stride_width = stride_w;
    gemm.dilation_height = dilation_h, gemm.dilation_width = dilation_w;
    gemm.out_height = (h + pad[0] + pad[1] - (r - 1) * dilation_h - 1) / stride_h + 1;
    gemm.out_width = (w + pad[2] + pad[3] - (s - 1) * dilation_w - 1) / stride_w + 1;
    CUtensorMap map;
    if (ldmq::encode_im2col(&map, gemm, pixels, channels) != cudaSuccess) return 1;
    std::printf("%u %u %u %d", map.rank, map.channels, map.pixels, static_cast<int>(map.swizzle));
    for (unsigned i = 0; i < 4; ++i) std::printf(" %llu", static_cast<unsigned long long>(map.size[i]));
    for (unsigned i = 1; i < 4; ++i) std::printf(" %llu", static_cast<unsigned long long>(map.stride[i]));
    for (unsigned i = 0; i < 2; ++i) std::printf(" %d %d", map.lower[i], map.upper[i]);
    for (unsigned i = 0; i < 4; ++i) std::printf(" %u", map.step[i]);
    std::printf("\n");
  }
}
