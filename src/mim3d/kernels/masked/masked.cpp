// Depth-wise 5x5x5 convolution on blocks of visible tokens, and the gradient of its kernel, for CPUs.
//
// Blocks of S^3 voxels, channels last. Around each block a halo of 2 voxels comes from its visible neighbours and is
// zero elsewhere; it is gathered as float for a few channels at a time, so that it stays in the processor's cache, and
// every accumulator stays in a register. Sums are taken in a fixed order: the same input gives the same bits.
//
// Plain C interface, called through ctypes; each call works on blocks [first, last), so that several threads can share
// the blocks. Weights are (125, C), taps in raster order; neighbours are (N, 27), -1 for none.

#include <cstdint>
#include <cstring>

namespace {

constexpr int LANES = 16, KERNEL = 5, RADIUS = KERNEL / 2;
typedef float Vec __attribute__((vector_size(LANES * sizeof(float)), aligned(64)));

struct BFloat16 {
    uint16_t bits;
};

inline float load(float value) { return value; }

inline float load(BFloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline void store(float* target, float value) { *target = value; }

inline void store(BFloat16* target, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    bits += 0x7fffu + ((bits >> 16) & 1u);  // to nearest, ties to even
    target->bits = is_nan ? 0x7fc0u : static_cast<uint16_t>(bits >> 16);
}

// Vectors of channels worked on together, so that small blocks have enough independent accumulators too.
constexpr int vectors_for(int S) { return S >= 8 ? 1 : S == 4 ? 2 : 4; }

// `width` channels from `source` into VECTORS vectors; lanes beyond them are zero.
template <int VECTORS, typename T>
inline void load_row(const T* source, int width, Vec* row) {
    float* lanes = reinterpret_cast<float*>(row);
    if (width == VECTORS * LANES) {
        for (int i = 0; i < VECTORS * LANES; ++i) lanes[i] = load(source[i]);
        return;
    }
    for (int i = 0; i < VECTORS * LANES; ++i) lanes[i] = i < width ? load(source[i]) : 0.0f;
}

// The block with its halo, (H, H, H, VECTORS) vectors.
template <int S, typename T>
void gather(const T* features, const int64_t* neighbours, int64_t channels, int64_t channel, int width, Vec* halo) {
    constexpr int H = S + KERNEL - 1, VECTORS = vectors_for(S);
    for (int x = 0; x < H; ++x)
        for (int y = 0; y < H; ++y)
            for (int z = 0; z < H; ++z, halo += VECTORS) {
                const int nx = (x + S - RADIUS) / S, ny = (y + S - RADIUS) / S, nz = (z + S - RADIUS) / S;
                const int64_t block = neighbours[nx * 9 + ny * 3 + nz];
                if (block < 0) {
                    for (int v = 0; v < VECTORS; ++v) halo[v] = Vec{};
                    continue;
                }
                const int vx = x + S - RADIUS - nx * S, vy = y + S - RADIUS - ny * S, vz = z + S - RADIUS - nz * S;
                const int64_t voxel = ((block * S + vx) * S + vy) * S + vz;
                load_row<VECTORS>(features + voxel * channels + channel, width, halo);
            }
}

template <int S, typename T>
void convolve(const T* features, const float* weight, const float* bias, const int64_t* neighbours, T* out,
              int64_t channels, int64_t first, int64_t last) {
    constexpr int H = S + KERNEL - 1, VECTORS = vectors_for(S), CHUNK = VECTORS * LANES;
    alignas(64) static thread_local Vec halo[H * H * H * VECTORS];
    alignas(64) static thread_local Vec taps[KERNEL * KERNEL * KERNEL * VECTORS];
    for (int64_t channel = 0; channel < channels; channel += CHUNK) {
        const int width = static_cast<int>(channels - channel < CHUNK ? channels - channel : CHUNK);
        for (int tap = 0; tap < KERNEL * KERNEL * KERNEL; ++tap)
            load_row<VECTORS>(weight + tap * channels + channel, width, taps + tap * VECTORS);
        Vec start[VECTORS] = {};
        if (bias) load_row<VECTORS>(bias + channel, width, start);
        for (int64_t n = first; n < last; ++n) {
            gather<S>(features, neighbours + n * 27, channels, channel, width, halo);
            for (int x = 0; x < S; ++x)
                for (int y = 0; y < S; ++y) {
                    Vec sum[S][VECTORS];
                    for (int z = 0; z < S; ++z)
                        for (int v = 0; v < VECTORS; ++v) sum[z][v] = start[v];
                    for (int dx = 0; dx < KERNEL; ++dx)
                        for (int dy = 0; dy < KERNEL; ++dy) {
                            const Vec* line = halo + ((x + dx) * H + y + dy) * H * VECTORS;
                            const Vec* tap = taps + (dx * KERNEL + dy) * KERNEL * VECTORS;
#pragma GCC unroll 5
                            for (int dz = 0; dz < KERNEL; ++dz)
#pragma GCC unroll 8
                                for (int z = 0; z < S; ++z)
#pragma GCC unroll 4
                                    for (int v = 0; v < VECTORS; ++v)
                                        sum[z][v] += line[(z + dz) * VECTORS + v] * tap[dz * VECTORS + v];
                        }
                    T* target = out + ((n * S + x) * S + y) * S * channels + channel;
                    for (int z = 0; z < S; ++z, target += channels)
                        for (int i = 0; i < width; ++i)
                            store(target + i, reinterpret_cast<const float*>(sum[z])[i]);
                }
        }
    }
}

template <int S, typename T>
void weight_gradient(const T* features, const T* grad, const int64_t* neighbours, float* total, int64_t channels,
                     int64_t first, int64_t last) {
    constexpr int H = S + KERNEL - 1, VECTORS = vectors_for(S), CHUNK = VECTORS * LANES;
    alignas(64) static thread_local Vec halo[H * H * H * VECTORS];
    alignas(64) static thread_local Vec grads[S * S * S * VECTORS];
    alignas(64) static thread_local Vec sums[KERNEL * KERNEL * KERNEL * VECTORS];
    for (int64_t channel = 0; channel < channels; channel += CHUNK) {
        const int width = static_cast<int>(channels - channel < CHUNK ? channels - channel : CHUNK);
        std::memset(sums, 0, sizeof sums);
        for (int64_t n = first; n < last; ++n) {
            gather<S>(features, neighbours + n * 27, channels, channel, width, halo);
            for (int voxel = 0; voxel < S * S * S; ++voxel)
                load_row<VECTORS>(grad + (n * S * S * S + voxel) * channels + channel, width, grads + voxel * VECTORS);
            for (int v = 0; v < VECTORS; ++v)
                for (int dx = 0; dx < KERNEL; ++dx)
                    for (int dy = 0; dy < KERNEL; ++dy) {
                        // Two partial sums a tap: additions to one register would wait for each other.
                        Vec even[KERNEL] = {}, odd[KERNEL] = {};
                        for (int x = 0; x < S; ++x)
                            for (int y = 0; y < S; y += 2) {
                                const Vec* line = halo + (((x + dx) * H + y + dy) * H) * VECTORS + v;
                                const Vec* next = line + H * VECTORS;
                                const Vec* g = grads + ((x * S + y) * S) * VECTORS + v;
                                const Vec* g_next = g + S * VECTORS;
#pragma GCC unroll 8
                                for (int z = 0; z < S; ++z)
#pragma GCC unroll 5
                                    for (int dz = 0; dz < KERNEL; ++dz) {
                                        even[dz] += line[(z + dz) * VECTORS] * g[z * VECTORS];
                                        odd[dz] += next[(z + dz) * VECTORS] * g_next[z * VECTORS];
                                    }
                            }
                        for (int dz = 0; dz < KERNEL; ++dz)
                            sums[((dx * KERNEL + dy) * KERNEL + dz) * VECTORS + v] += even[dz] + odd[dz];
                    }
        }
        for (int tap = 0; tap < KERNEL * KERNEL * KERNEL; ++tap)
            for (int i = 0; i < width; ++i)
                total[tap * channels + channel + i] = reinterpret_cast<const float*>(sums + tap * VECTORS)[i];
    }
}

template <typename T>
int convolve_any(const void* features, const float* weight, const float* bias, const int64_t* neighbours, void* out,
                 int64_t edge, int64_t channels, int64_t first, int64_t last) {
    const T* in = static_cast<const T*>(features);
    T* result = static_cast<T*>(out);
    switch (edge) {
        case 2: convolve<2>(in, weight, bias, neighbours, result, channels, first, last); return 0;
        case 4: convolve<4>(in, weight, bias, neighbours, result, channels, first, last); return 0;
        case 8: convolve<8>(in, weight, bias, neighbours, result, channels, first, last); return 0;
        default: return 1;
    }
}

template <typename T>
int weight_gradient_any(const void* features, const void* grad, const int64_t* neighbours, float* total, int64_t edge,
                        int64_t channels, int64_t first, int64_t last) {
    const T* in = static_cast<const T*>(features);
    const T* outer = static_cast<const T*>(grad);
    switch (edge) {
        case 2: weight_gradient<2>(in, outer, neighbours, total, channels, first, last); return 0;
        case 4: weight_gradient<4>(in, outer, neighbours, total, channels, first, last); return 0;
        case 8: weight_gradient<8>(in, outer, neighbours, total, channels, first, last); return 0;
        default: return 1;
    }
}

}  // namespace

extern "C" {

int mim3d_convolve(int is_bfloat16, const void* features, const float* weight, const float* bias,
                   const int64_t* neighbours, void* out, int64_t edge, int64_t channels, int64_t first, int64_t last) {
    return is_bfloat16 ? convolve_any<BFloat16>(features, weight, bias, neighbours, out, edge, channels, first, last)
                       : convolve_any<float>(features, weight, bias, neighbours, out, edge, channels, first, last);
}

int mim3d_weight_gradient(int is_bfloat16, const void* features, const void* grad, const int64_t* neighbours,
                          float* total, int64_t edge, int64_t channels, int64_t first, int64_t last) {
    return is_bfloat16
               ? weight_gradient_any<BFloat16>(features, grad, neighbours, total, edge, channels, first, last)
               : weight_gradient_any<float>(features, grad, neighbours, total, edge, channels, first, last);
}
}
