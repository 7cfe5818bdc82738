// Attention of one new token per sequence over the keys and values that lie in its slot: softmax(scale * q.K) V.
//
// Flash-decoding (Dao et al., 2023) over slots: `keys` and `values` are [slots, kv_heads, capacity, HEAD_DIM] with any
// strides but the last, row b of the batch is slot b and has `lengths[b]` tokens, the newest included. With grouped
// queries (`group` heads share one key-value head) each key is read once for all heads of a tile.
//
// The sequence is cut into chunks of CHUNK tokens, one block each, whatever the batch: so the GPU is busy with one
// sequence too, and a row's result does not depend on which others are beside it. A block keeps an online softmax in
// float32 and writes its unnormalised sum, its maximum and its weight; `decode_attention_merge` adds the chunks in their
// order. No atomics: the same inputs give the same bits. Lengths are read on the GPU, so that a captured launch stays
// valid while sequences grow; the grid only says how many chunks there may be.
//
// One team of LANES lanes takes one key, 16 bytes a lane, and AHEAD keys are in flight per team. Cost: keys and values
// are read once per tile of QUERIES heads (from L2 after the first), and per chunk and head HEAD_DIM + 2 floats are
// written and read again: 3 % of the bytes of its keys and values at 16 bits and one head per key-value head.
//
// HEAD_DIM, ELEMENT (0 float32, 1 float16, 2 bfloat16), QUERIES and CHUNK are set by the compiler's options: each model
// gets kernels of its own. All pointers are 16-byte aligned and so is every stride. `scale` comes as the bits of a
// float32, times log2(e), because the softmax is taken to the base 2. `window` is how many of the newest tokens count,
// 0 for all.

typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef ELEMENT
#define ELEMENT 2
#endif
#ifndef QUERIES
#define QUERIES 4
#endif
#ifndef CHUNK
#define CHUNK 128
#endif
#define WARPS 4
#define AHEAD 4

#if ELEMENT == 0
typedef float element;
#else
typedef u16 element;
#endif

#define VECTOR (16 / (int)sizeof(element))
#define PARTS (HEAD_DIM / VECTOR)
#define LANES (PARTS > 16 ? 32 : PARTS > 8 ? 16 : PARTS > 4 ? 8 : PARTS > 2 ? 4 : PARTS > 1 ? 2 : 1)
#define PER ((PARTS + LANES - 1) / LANES)
#define WIDTH (PER * VECTOR)
#define TEAMS (WARPS * 32 / LANES)
#define STEP (TEAMS * AHEAD)
#define EMPTY (-__uint_as_float(0x7f800000u))

static_assert(HEAD_DIM % VECTOR == 0 && HEAD_DIM <= 256, "a key is a whole number of 16-byte vectors");

struct alignas(16) Vector {
    element values[VECTOR];
};

__device__ __forceinline__ float to_float(element value) {
#if ELEMENT == 0
    return value;
#elif ELEMENT == 2
    return __uint_as_float((u32)value << 16);
#elif defined(__CUDACC__)
    float found;
    asm("cvt.f32.f16 %0, %1;" : "=f"(found) : "h"(value));
    return found;
#else
    return half_to_float(value);
#endif
}

__device__ __forceinline__ element from_float(float value) {
#if ELEMENT == 0
    return value;
#elif ELEMENT == 2
    const u32 bits = __float_as_uint(value);
    return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0 : (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#elif defined(__CUDACC__)
    u16 found;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(found) : "f"(value));
    return found;
#else
    return float_to_half(value);
#endif
}

// The factors by which two partial softmaxes shrink when they are brought to their common maximum.
__device__ __forceinline__ float common(float mine, float other, float& mine_by, float& other_by) {
    const float high = fmaxf(mine, other);
    const float base = high == EMPTY ? 0.0f : high;
    mine_by = exp2f(mine - base);
    other_by = exp2f(other - base);
    return high;
}

__device__ __forceinline__ u32 first_token(u32 length, u32 window) {
    return window != 0 && length > window ? length - window : 0;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 3)
decode_attention(const element* __restrict__ query, const element* __restrict__ keys, const element* __restrict__ values,
                 const int* __restrict__ lengths, float* __restrict__ partials,
                 u64 query_row, u64 query_head, u64 key_row, u64 key_head, u64 key_token,
                 u64 value_row, u64 value_head, u64 value_token, u64 group, u64 window, u64 scale) {
    __shared__ float sums[WARPS][QUERIES][HEAD_DIM];
    __shared__ float highs[WARPS][QUERIES], weights[WARPS][QUERIES];

    const u32 chunk = blockIdx.x, row = blockIdx.z;
    const u32 tiles = ((u32)group + QUERIES - 1) / QUERIES;
    const u32 kv_head = blockIdx.y / tiles;
    const u32 first_query = blockIdx.y % tiles * QUERIES;
    const u32 left = (u32)group - first_query;
    const u32 queries = left < QUERIES ? left : QUERIES;
    const u32 length = (u32)lengths[row];
    const u32 oldest = first_token(length, (u32)window);
    const u32 begin = chunk * CHUNK > oldest ? chunk * CHUNK : oldest;
    const u32 end = (chunk + 1) * CHUNK < length ? (chunk + 1) * CHUNK : length;
    if (begin >= end) {
        return;  // the whole block; nobody reads what it would have written
    }
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 part = lane % LANES;
    const u32 team = threadIdx.x / LANES;

    float q[QUERIES][WIDTH];
#pragma unroll
    for (int i = 0; i < QUERIES; ++i) {
        const u64 head = (u64)kv_head * group + first_query + i;
#pragma unroll
        for (int p = 0; p < PER; ++p) {
            Vector found = {};
            if ((u32)i < queries && part + p * LANES < PARTS) {
                found = reinterpret_cast<const Vector*>(query + row * query_row + head * query_head)[part + p * LANES];
            }
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) {
                q[i][p * VECTOR + e] = to_float(found.values[e]) * __uint_as_float((u32)scale);
            }
        }
    }

    float sum[QUERIES][WIDTH], high[QUERIES], weight[QUERIES];
#pragma unroll
    for (int i = 0; i < QUERIES; ++i) {
        high[i] = EMPTY;
        weight[i] = 0.0f;
#pragma unroll
        for (int e = 0; e < WIDTH; ++e) {
            sum[i][e] = 0.0f;
        }
    }

    const element* const key = keys + row * key_row + kv_head * key_head;
    const element* const value = values + row * value_row + kv_head * value_head;
    // Which team takes which token follows from the token's place alone.
#pragma unroll 1
    for (u32 step = chunk * CHUNK + (begin - chunk * CHUNK) / STEP * STEP; step < end; step += STEP) {
        Vector k[AHEAD][PER], v[AHEAD][PER];
        bool counts[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
            const u32 token = step + team * AHEAD + a;
            counts[a] = token >= begin && token < end;
#pragma unroll
            for (int p = 0; p < PER; ++p) {
                k[a][p] = Vector{};
                v[a][p] = Vector{};
                if (counts[a] && part + p * LANES < PARTS) {
                    k[a][p] = reinterpret_cast<const Vector*>(key + token * key_token)[part + p * LANES];
                    v[a][p] = reinterpret_cast<const Vector*>(value + token * value_token)[part + p * LANES];
                }
            }
        }
#pragma unroll
        for (int i = 0; i < QUERIES; ++i) {
            float score[AHEAD], top = high[i];
#pragma unroll
            for (int a = 0; a < AHEAD; ++a) {
                float dot = 0.0f;
#pragma unroll
                for (int e = 0; e < WIDTH; ++e) {
                    dot += q[i][e] * to_float(k[a][e / VECTOR].values[e % VECTOR]);
                }
#pragma unroll
                for (int across = LANES / 2; across > 0; across /= 2) {
                    dot += __shfl_xor_sync(0xffffffffu, dot, across);
                }
                score[a] = counts[a] ? dot : EMPTY;
                top = fmaxf(top, score[a]);
            }
            const float base = top == EMPTY ? 0.0f : top;
            const float shrink = exp2f(high[i] - base);
            high[i] = top;
            weight[i] *= shrink;
#pragma unroll
            for (int e = 0; e < WIDTH; ++e) {
                sum[i][e] *= shrink;
            }
#pragma unroll
            for (int a = 0; a < AHEAD; ++a) {
                const float share = exp2f(score[a] - base);
                weight[i] += share;
#pragma unroll
                for (int e = 0; e < WIDTH; ++e) {
                    sum[i][e] += share * to_float(v[a][e / VECTOR].values[e % VECTOR]);
                }
            }
        }
    }

    // The teams of a warp meet in shuffles, the warps of the block in shared memory.
#pragma unroll
    for (int i = 0; i < QUERIES; ++i) {
#pragma unroll
        for (int across = LANES; across < 32; across *= 2) {
            float mine_by, other_by;
            high[i] = common(high[i], __shfl_xor_sync(0xffffffffu, high[i], across), mine_by, other_by);
            weight[i] = weight[i] * mine_by + __shfl_xor_sync(0xffffffffu, weight[i], across) * other_by;
#pragma unroll
            for (int e = 0; e < WIDTH; ++e) {
                sum[i][e] = sum[i][e] * mine_by + __shfl_xor_sync(0xffffffffu, sum[i][e], across) * other_by;
            }
        }
        if (lane < LANES) {
#pragma unroll
            for (int p = 0; p < PER; ++p) {
                if (part + p * LANES < PARTS) {
#pragma unroll
                    for (int e = 0; e < VECTOR; ++e) {
                        sums[warp][i][(part + p * LANES) * VECTOR + e] = sum[i][p * VECTOR + e];
                    }
                }
            }
        }
        if (lane == 0) {
            highs[warp][i] = high[i];
            weights[warp][i] = weight[i];
        }
    }
    __syncthreads();
    const u64 heads = gridDim.y / tiles * group;
    for (u32 at = threadIdx.x; at < queries * HEAD_DIM; at += WARPS * 32) {
        const u32 i = at / HEAD_DIM, e = at % HEAD_DIM;
        float top = highs[0][i], total = weights[0][i], found = sums[0][i][e];
#pragma unroll
        for (int other = 1; other < WARPS; ++other) {
            float mine_by, other_by;
            top = common(top, highs[other][i], mine_by, other_by);
            total = total * mine_by + weights[other][i] * other_by;
            found = found * mine_by + sums[other][i][e] * other_by;
        }
        const u64 head = (u64)kv_head * group + first_query + i;
        float* const out = partials + ((row * heads + head) * gridDim.x + chunk) * (HEAD_DIM + 2);
        out[e] = found;
        if (e == 0) {
            out[HEAD_DIM] = top;
            out[HEAD_DIM + 1] = total;
        }
    }
}

// A block per head and row, a thread per element: the chunks that were written, in their order. A row without tokens
// gives zeros.
extern "C" __global__ void __launch_bounds__(256)
decode_attention_merge(const float* __restrict__ partials, const int* __restrict__ lengths, element* __restrict__ out,
                       u64 out_row, u64 out_head, u64 chunks, u64 window) {
    const u32 head = blockIdx.x, row = blockIdx.y;
    const u32 length = (u32)lengths[row];
    const u32 first = first_token(length, (u32)window) / CHUNK;
    const u32 last = (length + CHUNK - 1) / CHUNK;
    const float* const mine = partials + (row * (u64)gridDim.x + head) * chunks * (HEAD_DIM + 2);
    for (u32 e = threadIdx.x; e < HEAD_DIM; e += blockDim.x) {
        float top = EMPTY, total = 0.0f, found = 0.0f;
        for (u32 chunk = first; chunk < last; ++chunk) {
            const float* const other = mine + (u64)chunk * (HEAD_DIM + 2);
            float mine_by, other_by;
            top = common(top, other[HEAD_DIM], mine_by, other_by);
            total = total * mine_by + other[HEAD_DIM + 1] * other_by;
            found = found * mine_by + other[e] * other_by;
        }
        out[row * out_row + head * out_head + e] = from_float(total == 0.0f ? 0.0f : found / total);
    }
}
