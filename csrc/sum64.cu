// The sum, modulo 2^64, of a buffer's little-endian 8-byte words; a tail shorter than a word is padded with zeros.
//
// What it is for: a load that ends with this sum has really brought every byte to the GPU (chapter 02 times the two
// together), and the same sum over the file shows that they are the right bytes, if not in the right order.
//
// Cost: each byte is read once and nothing is written but one atomic addition per warp. Per 16 bytes a thread issues
// one load and four 32-bit additions, far below what the integer units can do, so memory is the only limit: four
// independent 16-byte loads per thread and 2048 threads keep 128 KiB in flight on a multiprocessor, four times what
// latency times bandwidth asks of an H200 (some 0.8 us x 4.8 TB/s / 132, about 30 KiB). They all fit: 32 registers each,
// 40 on sm_75, 86 and 89, which hold no more than 1024 and 1536 threads anyway. Expect 90 % of the memory roof from
// about 1 GB on; below that the launch and the last wave show. Estimated, until a run is recorded.
//
// `data` must be 16-byte aligned, `total` zero before the launch. Any grid does; about 8 blocks per multiprocessor fill
// the GPU. Blocks have 256 threads.

typedef unsigned long long u64;

extern "C" __global__ void __launch_bounds__(256)
sum64(const unsigned char* __restrict__ data, u64 nbytes, u64* total) {
    const ulonglong2* vectors = reinterpret_cast<const ulonglong2*>(data);
    const u64 count = nbytes / 16;
    const u64 stride = (u64)gridDim.x * blockDim.x;
    const u64 first = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    u64 sum = 0;
    u64 at = first;
    // Unrolled by hand, so that the compiler takes no more registers than the note above counts.
#pragma unroll 1
    for (; at + 3 * stride < count; at += 4 * stride) {
        const ulonglong2 a = vectors[at];
        const ulonglong2 b = vectors[at + stride];
        const ulonglong2 c = vectors[at + 2 * stride];
        const ulonglong2 d = vectors[at + 3 * stride];
        sum += ((a.x + a.y) + (b.x + b.y)) + ((c.x + c.y) + (d.x + d.y));
    }
#pragma unroll 1
    for (; at < count; at += stride) {
        sum += vectors[at].x + vectors[at].y;
    }
    if (first == 0) {
#pragma unroll 1
        for (u64 byte = count * 16; byte < nbytes; ++byte) {
            sum += (u64)data[byte] << (8 * (byte & 7));
        }
    }
    for (int lane = 16; lane > 0; lane /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, lane);
    }
    if ((threadIdx.x & 31) == 0) {
        atomicAdd(total, sum);
    }
}
