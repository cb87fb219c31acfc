// Sampling a commitment: z* ~ N(0, I/k) and a projection W_c (d x k, Xavier normal), hence W_c z*.
//
// The numbers are a function of (seed, k, d) alone: the same bits on every platform, compiler and
// number of threads. std::normal_distribution promises no such thing, so there is no use of it here.

#ifndef LABLOG_COMMITMENT_H
#define LABLOG_COMMITMENT_H

#include <stdint.h>

#if defined(_WIN32)
#    if defined(COMMITMENT_BUILD)
#        define COMMITMENT_API __declspec(dllexport)
#    else
#        define COMMITMENT_API __declspec(dllimport)
#    endif
#else
#    define COMMITMENT_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define COMMITMENT_MAX_K (1 << 16)
#define COMMITMENT_MAX_D (1 << 20)

enum commitment_status {
    COMMITMENT_OK              =  0,
    COMMITMENT_ERR_K           = -1, // k <= 0 or k > COMMITMENT_MAX_K
    COMMITMENT_ERR_D           = -2, // d <= 0 or d > COMMITMENT_MAX_D
    COMMITMENT_ERR_OVERFLOW    = -3, // W_c (d*k floats) does not fit into the address space
    COMMITMENT_ERR_MEMORY      = -4,
    COMMITMENT_ERR_NULL_OUTPUT = -5,
    COMMITMENT_ERR_ONCE        = -6, // commitment_once() was called before with other arguments
};

// Sample a commitment. Each output may be NULL if it is not needed:
//   z          k floats,   z[i] ~ N(0, 1/k)
//   w_c        d*k floats, row-major, w_c[r*k + c] ~ N(0, 2/(d + k))
//   direction  d floats,   W_c z*, accumulated in double from the floats above
// z and W_c come from separate streams: z depends on (seed, k) only.
// Stateless and thread-safe. Returns a commitment_status; an error writes nothing.
COMMITMENT_API int32_t commitment_sample(
        uint64_t seed, int32_t k, int32_t d, float * z, float * w_c, float * direction);

// The variant of the lab log: one commitment per process, initialised once (std::call_once) by
// whichever thread comes first. *direction points to the d floats of W_c z*, which live as long as
// the process; *n_initialisations (may be NULL) is how often they were computed: always 1.
// Arguments that differ from those of the first call are an error, and write nothing.
COMMITMENT_API int32_t commitment_once(
        uint64_t seed, int32_t k, int32_t d, const float ** direction, uint64_t * n_initialisations);

// What a commitment_status means and what to do about it. Never NULL.
COMMITMENT_API const char * commitment_error(int32_t code);

#ifdef __cplusplus
}
#endif

#endif
