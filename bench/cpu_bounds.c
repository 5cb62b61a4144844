/* What a host can do at best: read memory, and multiply-add in registers. Vectors are of the widest
 * registers that this is compiled for. */
#include <stdint.h>

#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
#define LANES (BYTES / 4)
#define STREAMS 4 /* places that a thread reads in turn: more misses on their way than from one */
#define CHUNKS 64
#define CHAINS 12 /* sums that do not wait for each other: latency times two ports, within 16 registers */

typedef uint64_t words __attribute__((vector_size(64)));
typedef float floats __attribute__((vector_size(BYTES)));

/* XOR of `count` words of 64 bytes; what is left over of CHUNKS * STREAMS * 8 words is not read. */
uint64_t bench_read(const words *data, int64_t count, int threads)
{
    const int64_t stream = count / CHUNKS / STREAMS / 8 * 8;
    uint64_t result = 0;
#pragma omp parallel num_threads(threads) reduction(^ : result)
    {
        words sum[8] = {{0}};
#pragma omp for schedule(static)
        for (int64_t chunk = 0; chunk < CHUNKS; chunk++) {
            const words *begin = data + chunk * STREAMS * stream;
            for (int64_t i = 0; i < stream; i += 8) {
                for (int s = 0; s < STREAMS; s++) {
                    for (int j = 0; j < 8; j++)
                        sum[j] ^= begin[s * stream + i + j];
                }
            }
        }
        for (int j = 0; j < 8; j++) {
            for (int lane = 0; lane < 8; lane++)
                result ^= sum[j][lane];
        }
    }
    return result;
}

/* `rounds` x CHAINS multiply-adds of one register on each thread; `start` holds CHAINS + 2 registers. */
float bench_multiply_add(const float *start, int64_t rounds, int threads)
{
    float result = 0;
#pragma omp parallel num_threads(threads) reduction(+ : result)
    {
        floats sum[CHAINS], factor, term;
        for (int lane = 0; lane < LANES; lane++) {
            for (int j = 0; j < CHAINS; j++)
                sum[j][lane] = start[j * LANES + lane];
            factor[lane] = start[CHAINS * LANES + lane];
            term[lane] = start[(CHAINS + 1) * LANES + lane];
        }
        for (int64_t i = 0; i < rounds; i++) {
            for (int j = 0; j < CHAINS; j++)
                sum[j] = sum[j] * factor + term;
        }
        for (int j = 0; j < CHAINS; j++) {
            for (int lane = 0; lane < LANES; lane++)
                result += sum[j][lane];
        }
    }
    return result;
}

int64_t bench_multiply_adds_a_round(void)
{
    return CHAINS * LANES;
}
