// What both libraries are asked to do, so that their logits can be compared bit by bit: a schedule
// decodes fixed tokens in segments, and changes something before each segment.

#pragma once

#include "check.h"

#include "llama.h"

#include <cstdint>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

struct segment {
    int32_t n_tokens;
    int32_t batched; // all tokens in one llama_decode(), or one after the other (graphs are reused)

    // a control vector: (n_layer - 1)*n_embd floats, or empty for none
    int32_t            il_start;
    int32_t            il_end;
    std::vector<float> table;

    segment(int32_t n_tokens = 0, int32_t batched = 0, int32_t il_start = -1, int32_t il_end = -1, std::vector<float> table = {})
        : n_tokens(n_tokens), batched(batched), il_start(il_start), il_end(il_end), table(std::move(table)) {}
};

using schedule = std::vector<segment>;

inline void save(const schedule & segments, const std::string & path) {
    std::ofstream file(path, std::ios::binary);
    const auto put = [&](const void * data, size_t size) { file.write((const char *) data, std::streamsize(size)); };
    const uint64_t n = segments.size();
    put(&n, sizeof(n));
    for (const segment & s : segments) {
        const uint64_t len = s.table.size();
        put(&s.n_tokens, sizeof(int32_t));
        put(&s.batched,  sizeof(int32_t));
        put(&s.il_start, sizeof(int32_t));
        put(&s.il_end,   sizeof(int32_t));
        put(&len, sizeof(len));
        put(s.table.data(), len*sizeof(float));
    }
    CHECK(file.flush().good(), "cannot write %s", path.c_str());
}

inline schedule load(const std::string & path) {
    std::ifstream file(path, std::ios::binary);
    const auto get = [&](void * data, size_t size) { file.read((char *) data, std::streamsize(size)); };
    uint64_t n = 0;
    get(&n, sizeof(n));
    schedule segments(n);
    for (segment & s : segments) {
        uint64_t len = 0;
        get(&s.n_tokens, sizeof(int32_t));
        get(&s.batched,  sizeof(int32_t));
        get(&s.il_start, sizeof(int32_t));
        get(&s.il_end,   sizeof(int32_t));
        get(&len, sizeof(len));
        s.table.resize(len);
        get(s.table.data(), len*sizeof(float));
    }
    CHECK(file.good(), "cannot read %s", path.c_str());
    return segments;
}

inline std::vector<uint8_t> read_file(const std::string & path) {
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    CHECK(file.good(), "cannot read %s", path.c_str());
    std::vector<uint8_t> data(size_t(file.tellg()));
    file.seekg(0);
    file.read((char *) data.data(), std::streamsize(data.size()));
    return data;
}

inline void write_file(const std::string & path, const std::vector<uint8_t> & data) {
    std::ofstream file(path, std::ios::binary);
    file.write((const char *) data.data(), std::streamsize(data.size()));
    CHECK(file.flush().good(), "cannot write %s", path.c_str());
}

inline std::vector<uint8_t> state_of(llama_context * ctx) {
    std::vector<uint8_t> state(llama_state_get_size(ctx));
    CHECK(!state.empty() && llama_state_get_data(ctx, state.data(), state.size()) == state.size());
    return state;
}

inline llama_model * load_model(const char * path) {
    llama_model * model = llama_model_load_from_file(path, llama_model_default_params()); // offloads where it can
    CHECK(model, "cannot load %s", path);
    return model;
}

inline llama_context_params context_params() {
    llama_context_params params = llama_context_default_params();
    params.n_ctx           = 128;
    params.n_batch         = 64;
    params.n_threads       = 1;
    params.n_threads_batch = 1;
    return params;
}

inline llama_context * new_context(llama_model * model, const llama_context_params & params = context_params()) {
    llama_context * ctx = llama_init_from_model(model, params);
    CHECK(ctx);
    return ctx;
}

// Decode the schedule from position 0 and return the logits of every token. before(i) is called
// before segment i.
inline std::vector<float> trace(llama_context * ctx, const schedule & segments, const std::function<void(size_t)> & before) {
    const llama_model * model   = llama_get_model(ctx);
    const int32_t       n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    std::vector<float>  logits;

    llama_memory_clear(llama_get_memory(ctx), true);
    llama_batch batch = llama_batch_init(64, 0, 1);
    int32_t pos = 0;
    for (size_t i = 0; i < segments.size(); i++) {
        before(i);
        const int32_t step = segments[i].batched ? segments[i].n_tokens : 1;
        for (int32_t n = 0; n < segments[i].n_tokens; n += step) {
            batch.n_tokens = step;
            for (int32_t j = 0; j < step; j++, pos++) {
                batch.token[j]     = 3 + (pos*7919 + 13) % 256;
                batch.pos[j]       = pos;
                batch.n_seq_id[j]  = 1;
                batch.seq_id[j][0] = 0;
                batch.logits[j]    = 1;
            }
            CHECK(llama_decode(ctx, batch) == 0);
            for (int32_t j = 0; j < step; j++) {
                const float * row = llama_get_logits_ith(ctx, j);
                logits.insert(logits.end(), row, row + n_vocab);
            }
        }
    }
    llama_batch_free(batch);
    return logits;
}
