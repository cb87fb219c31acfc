#include "commitment.h"

#include "philox_normal.h"

#include <atomic>
#include <mutex>
#include <new>
#include <vector>

namespace {

// separate streams: neither the values of z nor their number can shift those of W_c, or the reverse
constexpr uint32_t STREAM_Z   = 0;
constexpr uint32_t STREAM_W_C = 1;

int32_t check(int32_t k, int32_t d) {
    if (k <= 0 || k > COMMITMENT_MAX_K) {
        return COMMITMENT_ERR_K;
    }
    if (d <= 0 || d > COMMITMENT_MAX_D) {
        return COMMITMENT_ERR_D;
    }
    if (uint64_t(k)*uint64_t(d) > SIZE_MAX/sizeof(float)) { // only possible where size_t has 32 bits
        return COMMITMENT_ERR_OVERFLOW;
    }
    return COMMITMENT_OK;
}

} // namespace

int32_t commitment_sample(uint64_t seed, int32_t k, int32_t d, float * z, float * w_c, float * direction) {
    if (const int32_t code = check(k, d)) {
        return code;
    }

    // z as floats is needed for the direction even if the caller does not want it
    std::vector<float> z_star;
    try {
        z_star.resize(k);
    } catch (const std::bad_alloc &) {
        return COMMITMENT_ERR_MEMORY;
    }

    const double z_scale = std::sqrt(1.0/k);
    for (int32_t i = 0; i < k; i++) {
        z_star[i] = float(philox_normal(seed, STREAM_Z, i)*z_scale);
        if (z) {
            z[i] = z_star[i];
        }
    }

    if (!w_c && !direction) {
        return COMMITMENT_OK;
    }

    const double w_scale = std::sqrt(2.0/(double(d) + double(k)));
    for (int32_t row = 0; row < d; row++) {
        double sum = 0.0;
        for (int32_t col = 0; col < k; col++) {
            const uint64_t index = uint64_t(row)*uint64_t(k) + uint64_t(col);
            const float    w     = float(philox_normal(seed, STREAM_W_C, index)*w_scale);
            if (w_c) {
                w_c[index] = w;
            }
            sum += double(w)*double(z_star[col]); // the product of two floats is exact in a double
        }
        if (direction) {
            direction[row] = float(sum);
        }
    }

    return COMMITMENT_OK;
}

int32_t commitment_once(uint64_t seed, int32_t k, int32_t d, const float ** direction, uint64_t * n_initialisations) {
    if (!direction) {
        return COMMITMENT_ERR_NULL_OUTPUT;
    }
    // before call_once: bad arguments must not use up the one initialisation
    if (const int32_t code = check(k, d)) {
        return code;
    }

    struct process_wide {
        std::once_flag        flag;
        uint64_t              seed = 0;
        int32_t               k    = 0;
        int32_t               d    = 0;
        std::vector<float>    direction;
        std::atomic<uint64_t> n_initialisations { 0 };
    };
    // never destroyed: a thread may still read the direction while the process exits
    static process_wide & the = *new process_wide;

    try {
        std::call_once(the.flag, [&] {
            std::vector<float> sampled(d);
            if (commitment_sample(seed, k, d, nullptr, nullptr, sampled.data()) != COMMITMENT_OK) {
                throw std::bad_alloc(); // the only error left. leaves the flag unset, the next call tries again
            }
            the.seed      = seed;
            the.k         = k;
            the.d         = d;
            the.direction = std::move(sampled);
            the.n_initialisations++;
        });
    } catch (const std::bad_alloc &) {
        return COMMITMENT_ERR_MEMORY;
    }

    if (seed != the.seed || k != the.k || d != the.d) {
        return COMMITMENT_ERR_ONCE;
    }

    *direction = the.direction.data();
    if (n_initialisations) {
        *n_initialisations = the.n_initialisations;
    }

    return COMMITMENT_OK;
}

const char * commitment_error(int32_t code) {
    switch (code) {
        case COMMITMENT_OK:
            return "success";
        case COMMITMENT_ERR_K:
            return "k, the dimension of z*, must be between 1 and 65536 (the lab log used 64)";
        case COMMITMENT_ERR_D:
            return "d, the width of the model, must be between 1 and 1048576: pass llama_model_n_embd()";
        case COMMITMENT_ERR_OVERFLOW:
            return "W_c (d*k floats) does not fit into the address space: use a smaller k";
        case COMMITMENT_ERR_MEMORY:
            return "out of memory while sampling a commitment: use a smaller k";
        case COMMITMENT_ERR_NULL_OUTPUT:
            return "direction is NULL: pass the address of a const float pointer";
        case COMMITMENT_ERR_ONCE:
            return "this process was already committed with another seed, k or d: "
                   "repeat the first call's arguments, or use commitment_sample() for further commitments";
        default:
            return "unknown commitment status";
    }
}
