/* Limits of the hardware: multiply-adds without memory accesses, and reads without arithmetic. Built by ceilings.py. */
#if defined(__AVX512F__)
#define BYTES 64
#else
#define BYTES 32
#endif
typedef float vector __attribute__((vector_size(BYTES)));
typedef long long words __attribute__((vector_size(BYTES)));

static volatile float sink;
static volatile long long sink_words;

/* Twelve chains hide a latency of four cycles on two units. With both operands they fit the 16 registers of AVX2. */
#define EACH(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
enum { STEPS = 4096, CHAINS = 12 };

long fma_chunk_flops(void) { return 2L * STEPS * CHAINS * (long)(BYTES / sizeof(float)); }

/* Chunks are scheduled dynamically: a thread that loses its core for a while does not delay the others. */
void fma_run(long chunks, int threads)
{
    volatile float factor = 0.999f, term = 0.001f; /* converges to 1: no overflow, no denormals */
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (long chunk = 0; chunk < chunks; chunk++) {
        const vector a = (vector){} + factor, b = (vector){} + term;
#define START(n) vector c##n = (vector){} + (float)n;
#define STEP(n) c##n = c##n * a + b;
#define SUM(n) total += c##n;
        EACH(START)
        for (int step = 0; step < STEPS; step++) {
            EACH(STEP)
            __asm__ volatile("" ::: "memory"); /* keeps the compiler from merging steps */
        }
        vector total = (vector){};
        EACH(SUM)
        sink = total[0];
    }
}

/* Four streams per thread, prefetched: the fastest of the patterns tried (one stream: 10 to 20 % slower). `bytes` is rounded down. */
void read_run(const char *start, long bytes, int threads)
{
    const long chunk = 1L << 18, stream = chunk / 4, ahead = 2048;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (long n = 0; n < bytes / chunk; n++) {
        const char *p0 = start + n * chunk, *p1 = p0 + stream, *p2 = p1 + stream, *p3 = p2 + stream;
        words s0 = (words){}, s1 = s0, s2 = s0, s3 = s0;
        for (long i = 0; i < stream; i += BYTES) {
            __builtin_prefetch(p0 + i + ahead);
            __builtin_prefetch(p1 + i + ahead);
            __builtin_prefetch(p2 + i + ahead);
            __builtin_prefetch(p3 + i + ahead);
            s0 |= *(const words *)(p0 + i);
            s1 |= *(const words *)(p1 + i);
            s2 |= *(const words *)(p2 + i);
            s3 |= *(const words *)(p3 + i);
        }
        s0 |= s1 | s2 | s3;
        sink_words = s0[0];
    }
}
