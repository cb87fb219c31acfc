// What the tests of the patch share: the programs they run, a model with its context, comparisons.

#pragma once

#include "trace.h"

#include "commitment.h"

#include <cmath>

#if !defined(_WIN32)
#include <unistd.h>
#endif

inline const char * MODEL;
inline const char * REFERENCE;
inline const char * TINY_MODEL;

inline std::string last_log; // what llama.cpp logged last

// --- helpers

inline std::string scratch(const char * suffix) {
    return std::string(MODEL) + "." + std::to_string(getpid()) + suffix;
}

inline void run(const std::string & command) {
    CHECK(std::system(command.c_str()) == 0, "%s", command.c_str());
}

// the unpatched library's logits, and its state after that
inline std::vector<float> reference(const schedule & segments, const std::string & model = MODEL, std::vector<uint8_t> * state = nullptr) {
    const std::string in  = scratch(".schedule");
    const std::string out = scratch(".logits");
    save(segments, in);
    run(std::string(REFERENCE) + " " + model + " " + in + " " + out);
    std::ifstream file(out, std::ios::binary | std::ios::ate);
    std::vector<float> logits(size_t(file.tellg())/sizeof(float));
    file.seekg(0);
    file.read((char *) logits.data(), std::streamsize(logits.size()*sizeof(float)));
    CHECK(file.good() && !logits.empty());
    if (state) {
        *state = read_file(out + ".state");
    }
    std::remove(in.c_str());
    std::remove(out.c_str());
    std::remove((out + ".state").c_str());
    return logits;
}

inline bool same_bits(const std::vector<float> & a, const std::vector<float> & b) {
    CHECK(a.size() == b.size() && !a.empty());
    return std::memcmp(a.data(), b.data(), a.size()*sizeof(float)) == 0;
}

inline float max_difference(const std::vector<float> & a, const std::vector<float> & b) {
    CHECK(a.size() == b.size());
    float result = 0.0f;
    for (size_t i = 0; i < a.size(); i++) {
        result = std::max(result, std::fabs(a[i] - b[i]));
    }
    return result;
}

// "Equal to rounding". ggml computes some steps in half precision (flash attention, the table behind
// GELU): one unit in the last place before them can become 1e-3 in a logit.
inline constexpr float ROUNDING = 2e-3f;

struct fixture {
    llama_model *   model   = load_model(MODEL);
    llama_context * ctx     = new_context(model);
    int32_t         n_embd  = llama_model_n_embd(model);
    int32_t         n_layer = llama_model_n_layer(model);

    ~fixture() {
        llama_free(ctx);
        llama_model_free(model);
    }

    std::vector<float> vector(uint64_t seed) const {
        std::vector<float> v(n_embd);
        CHECK(commitment_sample(seed, 64, n_embd, nullptr, nullptr, v.data()) == COMMITMENT_OK);
        return v;
    }

    int32_t set(const std::vector<float> & v, float lambda, int32_t start, int32_t end) const {
        return llama_set_commitment(ctx, v.data(), v.size(), n_embd, lambda, start, end);
    }

    // a stock control vector that holds lambda*v for every layer from 1 on
    std::vector<float> table(const std::vector<float> & v, float lambda) const {
        std::vector<float> t;
        for (int32_t il = 1; il < n_layer; il++) {
            for (float x : v) {
                t.push_back(lambda*x);
            }
        }
        return t;
    }
};

// errors go to last_log, the rest nowhere
inline void keep_last_error() {
    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level == GGML_LOG_LEVEL_ERROR) {
            last_log = text;
        }
    }, nullptr);
}
