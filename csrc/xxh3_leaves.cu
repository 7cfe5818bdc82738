// XXH3-64 (seed 0, default secret) of each consecutive 64 KiB leaf of a buffer: the leaves of a checkpoint's hash tree.
//
// Written from the public specification of XXH3 (Yann Collet, xxHash's doc/xxhash_spec.md). Eight 64-bit accumulators
// take in the input in stripes of 64 bytes; after each block of 16 stripes they are scrambled. Two facts make it
// parallel within a leaf: inside a block the stripes only add to the accumulators, so their order is free, and the two
// accumulators of a pair exchange their words, so that a 16-byte load feeds exactly one pair.
//
// One warp takes one leaf. Lane 4g+p holds pair p and adds stripes g and g+8 of each block: the warp reads a block of
// 1 KiB as two contiguous runs of 512 bytes. The eight partial sums of a pair meet by three shuffles, after which every
// lane has the pair's accumulators and scrambles its own copy, so that nothing is ever sent back.
//
// Cost: each byte is read once, 8 bytes are written per leaf. Per KiB a warp issues 74 instructions (counted for
// sm_90), 12 of them shuffles. A multiprocessor issues two to four a clock, as its two integer pipes share them: 28 to
// 55 bytes a clock, 6 to 12 TB/s on an H200 and 4 to 8 on an A100, above their memory's 4.8 and 2.0. Four blocks are
// loaded ahead, 4 KiB in flight per warp; 8 warps per multiprocessor cover latency times bandwidth (some 30 KiB on an
// H200), so from about 1100 leaves (70 MB) on expect 80 to 90 % of the memory roof. A single chunk of 16 MB has 256
// warps and takes the time of one leaf, 16 rounds of memory latency and scrambling, about 15 us: far less than the
// 300 us in which PCIe 5 brings the next chunk. 72 registers leave three blocks of 256 threads on each multiprocessor,
// 24 warps; without the 3 below ptxas stops at 64 and spills. All of this is estimated, until a run is recorded.
//
// `nbytes` is a multiple of 4096 (partitions are padded to that), so every leaf is: only XXH3's path for inputs longer
// than 240 bytes is needed, the blocks of a leaf come in fours, and its last stripe is exactly the last of its last
// block. `data` is 16-byte aligned. One warp per leaf, blocks of 256 threads.

typedef unsigned long long u64;
typedef unsigned int u32;

#define LEAF_NBYTES 65536ull
#define BLOCK_NBYTES 1024ull
#define AHEAD 4  // blocks whose loads are in flight together

#define PRIME32_1 0x9E3779B1ull
#define PRIME32_2 0x85EBCA77ull
#define PRIME32_3 0xC2B2AE3Dull
#define PRIME64_1 0x9E3779B185EBCA87ull
#define PRIME64_2 0xC2B2AE3D27D4EB4Full
#define PRIME64_3 0x165667B19E3779F9ull
#define PRIME64_4 0x85EBCA77C2B2AE63ull
#define PRIME64_5 0x27D4EB2F165667C5ull

// XXH3's default secret, 192 bytes, as little-endian words.
__constant__ u64 SECRET[24] = {
    0xbe4ba423396cfeb8ull, 0x1cad21f72c81017cull, 0xdb979083e96dd4deull, 0x1f67b3b7a4a44072ull,
    0x78e5c0cc4ee679cbull, 0x2172ffcc7dd05a82ull, 0x8e2443f7744608b8ull, 0x4c263a81e69035e0ull,
    0xcb00c391bb52283cull, 0xa32e531b8b65d088ull, 0x4ef90da297486471ull, 0xd8acdea946ef1938ull,
    0x3f349ce33f76faa8ull, 0x1d4f0bc7c7bbdcf9ull, 0x3159b4cd4be0518aull, 0x647378d9c97e9fc8ull,
    0xc3ebd33483acc5eaull, 0xeb6313faffa081c5ull, 0x49daf0b751dd0d17ull, 0x9e68d429265516d3ull,
    0xfca1477d58be162bull, 0xce31d07ad1b8f88full, 0x280416958f3acb45ull, 0x7e404bbbcafbd7afull,
};

__constant__ u64 START[8] = {
    PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1,
};

// The secret's 8 bytes from any byte on; some of XXH3's reads of it are not aligned.
__device__ __forceinline__ u64 secret_at(u32 byte) {
    const u32 shift = 8 * (byte & 7);
    const u64 low = SECRET[byte / 8] >> shift;
    return shift == 0 ? low : low | SECRET[byte / 8 + 1] << (64 - shift);
}

// One pair's share of one stripe: the product of each keyed word's halves, and the other word itself.
__device__ __forceinline__ void add_stripe(u64& first, u64& second, ulonglong2 word, u64 key_first, u64 key_second) {
    const u64 x = word.x ^ key_first;
    const u64 y = word.y ^ key_second;
    first += word.y + (u64)(u32)x * (u32)(x >> 32);
    second += word.x + (u64)(u32)y * (u32)(y >> 32);
}

__device__ __forceinline__ u64 scrambled(u64 value, u64 key) {
    return (value ^ (value >> 47) ^ key) * PRIME32_1;
}

__device__ __forceinline__ u64 sum_over(u64 value, int lane) {
    return value + __shfl_xor_sync(0xffffffffu, value, lane);
}

extern "C" __global__ void __launch_bounds__(256, 3)
xxh3_leaves(const unsigned char* __restrict__ data, u64 nbytes, u64* __restrict__ digests) {
    const u64 leaf = ((u64)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    const u64 begin = leaf * LEAF_NBYTES;
    if (begin >= nbytes) {
        return;  // the whole warp, as all its lanes have the same leaf
    }
    const u64 length = nbytes - begin < LEAF_NBYTES ? nbytes - begin : LEAF_NBYTES;
    const u32 blocks = (u32)(length / BLOCK_NBYTES);
    const u32 lane = threadIdx.x & 31;
    const u32 group = lane / 4;
    const u32 pair = lane % 4;

    // Stripe s is keyed by the secret from byte 8s on; the last stripe of all by its bytes 121 to 184.
    const u32 word = group + 2 * pair;
    const u64 key0 = SECRET[word], key1 = SECRET[word + 1];
    const u64 key2 = SECRET[word + 8], key3 = SECRET[word + 9];
    const u64 last2 = group == 7 ? secret_at(121 + 16 * pair) : key2;
    const u64 last3 = group == 7 ? secret_at(129 + 16 * pair) : key3;
    const u64 scramble0 = SECRET[16 + 2 * pair], scramble1 = SECRET[17 + 2 * pair];

    u64 acc0 = START[2 * pair], acc1 = START[2 * pair + 1];
    const ulonglong2* source = reinterpret_cast<const ulonglong2*>(data + begin) + lane;
    for (u32 block = 0; block < blocks; block += AHEAD) {
        ulonglong2 low[AHEAD], high[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            low[i] = source[(block + i) * 64];
            high[i] = source[(block + i) * 64 + 32];
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const bool last = block + i + 1 == blocks;
            u64 sum0 = 0, sum1 = 0;
            add_stripe(sum0, sum1, low[i], key0, key1);
            add_stripe(sum0, sum1, high[i], last ? last2 : key2, last ? last3 : key3);
            acc0 += sum_over(sum_over(sum_over(sum0, 4), 8), 16);
            acc1 += sum_over(sum_over(sum_over(sum1, 4), 8), 16);
            if (!last) {
                acc0 = scrambled(acc0, scramble0);
                acc1 = scrambled(acc1, scramble1);
            }
        }
    }

    // Merge: the folded 128-bit products of the four keyed pairs, the length, and a final mix.
    const u64 x = acc0 ^ secret_at(11 + 16 * pair);
    const u64 y = acc1 ^ secret_at(19 + 16 * pair);
    u64 digest = length * PRIME64_1 + sum_over(sum_over((x * y) ^ __umul64hi(x, y), 1), 2);
    digest ^= digest >> 37;
    digest *= 0x165667919E3779F9ull;
    digest ^= digest >> 32;
    if (lane == 0) {
        digests[leaf] = digest;
    }
}
