// The engine of the book's live page: the patched llama.cpp behind a few plain functions that a
// script can call. Built with Emscripten; one model at a time, one thread.
//
// A sequence is a text of its own, with a commitment and a sampler of its own. Functions return -1
// (live_log_probability and live_divergence: NaN) after an error, and live_error() says which.

#include "commitment.h"

#include "llama.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__EMSCRIPTEN__)
#    include <emscripten.h>
#    define LIVE_API extern "C" EMSCRIPTEN_KEEPALIVE
#else
#    define LIVE_API extern "C"
#endif

namespace {

template <typename T, void (*release)(T *)>
struct releaser {
    void operator()(T * pointer) const { release(pointer); }
};
using model_ptr   = std::unique_ptr<llama_model,        releaser<llama_model,        llama_model_free>>;
using adapter_ptr = std::unique_ptr<llama_adapter_lora, releaser<llama_adapter_lora, llama_adapter_lora_free>>;
using context_ptr = std::unique_ptr<llama_context,      releaser<llama_context,      llama_free>>;
using sampler_ptr = std::unique_ptr<llama_sampler,      releaser<llama_sampler,      llama_sampler_free>>;

struct sequence {
    int32_t            length = 0;  // tokens read
    std::vector<float> logits;      // behind the last of them
    sampler_ptr        sampler;
};

// In the order of construction: a context is released before its adapter, both before the model.
struct engine {
    model_ptr             model;
    adapter_ptr           lora;
    context_ptr           context;
    int32_t               window = 0;  // tokens that a sequence may have
    std::vector<sequence> sequences;

    const llama_vocab * vocab() const { return llama_model_get_vocab(model.get()); }
};

std::unique_ptr<engine> opened;
std::string             error;
std::string             first_log;

void keep_first_error(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR && first_log.empty()) {
        first_log = text;
        while (!first_log.empty() && first_log.back() == '\n') {
            first_log.pop_back();
        }
    }
}

std::runtime_error refused(const std::string & what) {
    return std::runtime_error(first_log.empty() ? what : what + " (" + first_log + ")");
}

// Every function's body: what it throws becomes -1 and a message.
template <typename F>
auto guarded(decltype(std::declval<F>()()) failed, F body) -> decltype(body()) {
    first_log.clear();
    try {
        return body();
    } catch (const std::exception & e) {
        error = e.what();
        return failed;
    }
}

engine & the() {
    if (!opened) {
        throw std::runtime_error("no model is open: open one first");
    }
    return *opened;
}

sequence & at(int32_t number) {
    if (number < 0 || size_t(number) >= the().sequences.size()) {
        throw std::runtime_error("sequence " + std::to_string(number) + ": there are " +
            std::to_string(the().sequences.size()) + ", counted from 0");
    }
    return the().sequences[number];
}

sequence & with_text(int32_t number) {
    sequence & s = at(number);
    if (s.logits.empty()) {
        throw std::runtime_error("sequence " + std::to_string(number) + " has read nothing: nothing follows");
    }
    return s;
}

void check_token(int32_t token) {
    if (token < 0 || token >= llama_vocab_n_tokens(the().vocab())) {
        throw std::runtime_error("token " + std::to_string(token) + ": the model has " +
            std::to_string(llama_vocab_n_tokens(the().vocab())) + ", counted from 0");
    }
}

// log of the sum of exp(logit), in double
double log_total(const std::vector<float> & logits) {
    const double most = *std::max_element(logits.begin(), logits.end());
    double sum = 0.0;
    for (const float logit : logits) {
        sum += std::exp(double(logit) - most);
    }
    return most + std::log(sum);
}

// Tokens of one batch, of several sequences; the logits behind each sequence's last are kept.
void decode(const std::vector<int32_t> & numbers, const std::vector<int32_t> & tokens) {
    engine & e = the();
    std::vector<int32_t> lengths;
    for (const sequence & s : e.sequences) {
        lengths.push_back(s.length);
    }
    std::vector<int32_t> last(e.sequences.size(), -1);
    llama_batch batch = llama_batch_init(int32_t(tokens.size()), 0, 1);
    std::unique_ptr<llama_batch, void (*)(llama_batch *)> owner(&batch, [](llama_batch * b) { llama_batch_free(*b); });
    for (size_t i = 0; i < tokens.size(); i++) {
        at(numbers[i]);
        check_token(tokens[i]);
        int32_t & length = lengths[numbers[i]];
        if (length >= e.window) {
            throw std::runtime_error("the window of " + std::to_string(e.window) + " tokens is full: shorten the text");
        }
        batch.token   [i]    = tokens[i];
        batch.pos     [i]    = length++;
        batch.n_seq_id[i]    = 1;
        batch.seq_id  [i][0] = numbers[i];
        batch.logits  [i]    = 0;
        last[numbers[i]] = int32_t(i);
    }
    for (const int32_t i : last) {
        if (i >= 0) {
            batch.logits[i] = 1;
        }
    }
    batch.n_tokens = int32_t(tokens.size());
    if (llama_decode(e.context.get(), batch) != 0) {
        for (size_t number = 0; number < last.size(); number++) { // what was stored of it goes again
            if (last[number] >= 0) {
                llama_memory_seq_rm(llama_get_memory(e.context.get()), llama_seq_id(number), e.sequences[number].length, -1);
            }
        }
        throw refused("decoding failed");
    }
    const int32_t n = llama_vocab_n_tokens(e.vocab());
    for (size_t number = 0; number < last.size(); number++) {
        if (last[number] >= 0) {
            const float * logits = llama_get_logits_ith(e.context.get(), last[number]);
            e.sequences[number].logits.assign(logits, logits + n);
            e.sequences[number].length = lengths[number];
        }
    }
}

} // namespace

LIVE_API const char * live_error(void) {
    return error.c_str();
}

LIVE_API void live_close(void) {
    opened.reset();
}

// Open the GGUF file `model` with the LoRA `lora` ("": none) for so many sequences, each with a
// window of so many tokens, or of the model's where that is smaller. What was open is closed.
LIVE_API int32_t live_open(const char * model, const char * lora, int32_t window, int32_t sequences) {
    opened.reset();
    return guarded(-1, [&]() -> int32_t {
        llama_log_set(keep_first_error, nullptr);
        llama_backend_init();
        auto e = std::make_unique<engine>();
        llama_model_params of_model = llama_model_default_params();
        of_model.load_mode = LLAMA_LOAD_MODE_NONE;
        e->model.reset(llama_model_load_from_file(model, of_model));
        if (!e->model) {
            throw refused("the file is no model that llama.cpp reads");
        }
        if (llama_model_has_encoder(e->model.get()) || !llama_model_has_decoder(e->model.get())) {
            throw std::runtime_error("the file is not a decoder-only language model");
        }
        llama_context_params params = llama_context_default_params();
        window = std::min(window, llama_model_n_ctx_train(e->model.get()));
        params.n_ctx           = uint32_t(window)*uint32_t(sequences);
        params.n_batch         = params.n_ctx;
        params.n_seq_max       = uint32_t(sequences);
        params.kv_unified      = true; // a fork then copies nothing
        params.n_threads       = 1;
        params.n_threads_batch = 1;
        if (*lora) {
            e->lora.reset(llama_adapter_lora_init(e->model.get(), lora));
            if (!e->lora) {
                throw refused("the file is no LoRA of this model");
            }
        }
        e->context.reset(llama_init_from_model(e->model.get(), params));
        if (!e->context) {
            throw refused("no context of " + std::to_string(window) + " tokens");
        }
        if (e->lora) {
            llama_adapter_lora * adapters[] = { e->lora.get() };
            float scales[] = { 1.0f };
            if (llama_set_adapters_lora(e->context.get(), adapters, 1, scales) != 0) {
                throw refused("the LoRA does not fit the model");
            }
        }
        e->window    = window;
        e->sequences = std::vector<sequence>(size_t(sequences));
        opened = std::move(e);
        return 0;
    });
}

LIVE_API int32_t live_layers(void)     { return guarded(-1, [] { return llama_model_n_layer(the().model.get()); }); }
LIVE_API int32_t live_width(void)      { return guarded(-1, [] { return llama_model_n_embd(the().model.get()); }); }
LIVE_API int32_t live_vocabulary(void) { return guarded(-1, [] { return llama_vocab_n_tokens(the().vocab()); }); }
LIVE_API int32_t live_window(void)     { return guarded(-1, [] { return the().window; }); }
LIVE_API int32_t live_has_template(void) {
    return guarded(-1, [] { return int32_t(llama_model_chat_template(the().model.get(), nullptr) != nullptr); });
}

// Tokens of UTF-8 `text`, with the model's beginning of text if `begin`, and control tokens read
// from the text if `special`. Returns how many; more than `capacity`: none were written.
LIVE_API int32_t live_tokenize(const char * text, int32_t begin, int32_t special, int32_t * tokens, int32_t capacity) {
    return guarded(-1, [&]() -> int32_t {
        const int32_t n = llama_tokenize(the().vocab(), text, int32_t(std::strlen(text)), tokens, capacity, begin != 0, special != 0);
        return n < 0 ? -n : n;
    });
}

// The model's own chat template over `n` turns, each a role and a text that end with a zero byte,
// one after the other in `turns`; with the beginning of an answer. Bytes needed, as live_tokenize.
LIVE_API int32_t live_chat(const char * turns, int32_t n, char * out, int32_t capacity) {
    return guarded(-1, [&]() -> int32_t {
        const char * form = llama_model_chat_template(the().model.get(), nullptr);
        if (!form) {
            throw std::runtime_error("the model has no chat template: give it plain text");
        }
        std::vector<llama_chat_message> messages;
        for (int32_t i = 0; i < n; i++) {
            const char * role    = turns;
            const char * content = role + std::strlen(role) + 1;
            messages.push_back({ role, content });
            turns = content + std::strlen(content) + 1;
        }
        const int32_t size = llama_chat_apply_template(form, messages.data(), messages.size(), true, out, capacity);
        if (size < 0) {
            throw std::runtime_error("llama.cpp does not know this model's chat template: give it plain text");
        }
        return size;
    });
}

// Bytes of a token's text, at most `capacity`; a character may be spread over several tokens.
LIVE_API int32_t live_piece(int32_t token, char * bytes, int32_t capacity) {
    return guarded(-1, [&]() -> int32_t {
        check_token(token);
        const int32_t n = llama_token_to_piece(the().vocab(), token, bytes, capacity, 0, false);
        return n < 0 ? -n : n;
    });
}

LIVE_API int32_t live_ends(int32_t token) {
    return guarded(-1, [&] { check_token(token); return int32_t(llama_vocab_is_eog(the().vocab(), token)); });
}

// The direction W_c z* [width] of a seed, as `commitment_sample` draws it.
LIVE_API int32_t live_direction(uint32_t seed, int32_t k, float * direction) {
    return guarded(-1, [&]() -> int32_t {
        const int32_t code = commitment_sample(seed, k, llama_model_n_embd(the().model.get()), nullptr, nullptr, direction);
        if (code != 0) {
            throw std::runtime_error(commitment_error(code));
        }
        return 0;
    });
}

// Add strength * direction behind the layers first to last to what a sequence reads from now on.
LIVE_API int32_t live_commit(int32_t number, const float * direction, float strength, int32_t first, int32_t last) {
    return guarded(-1, [&]() -> int32_t {
        at(number);
        const int32_t width = llama_model_n_embd(the().model.get());
        const int32_t code = llama_set_commitment_seq(the().context.get(), number, direction, size_t(width), width, strength, first, last);
        if (code != 0) {
            throw std::runtime_error(llama_commitment_error(code));
        }
        return 0;
    });
}

LIVE_API int32_t live_release(int32_t number) {
    return guarded(-1, [&]() -> int32_t {
        at(number);
        return llama_clear_commitment_seq(the().context.get(), number);
    });
}

// Let a sequence begin anew; its commitment and sampler stay.
LIVE_API int32_t live_forget(int32_t number) {
    return guarded(-1, [&]() -> int32_t {
        sequence & s = at(number);
        llama_memory_seq_rm(llama_get_memory(the().context.get()), number, -1, -1);
        s.length = 0;
        s.logits.clear();
        return 0;
    });
}

// Let sequence `to` begin as a copy of what `from` has read, and of what follows there.
LIVE_API int32_t live_fork(int32_t from, int32_t to) {
    return guarded(-1, [&]() -> int32_t {
        const sequence & source = at(from);
        sequence & copy = at(to);
        llama_memory_t memory = llama_get_memory(the().context.get());
        llama_memory_seq_rm(memory, to, -1, -1);
        llama_memory_seq_cp(memory, from, to, -1, -1);
        copy.length = source.length;
        copy.logits = source.logits;
        return 0;
    });
}

// Read `n` tokens; token i continues sequence numbers[i].
LIVE_API int32_t live_read(const int32_t * numbers, const int32_t * tokens, int32_t n) {
    return guarded(-1, [&]() -> int32_t {
        if (n > 0) {
            decode(std::vector<int32_t>(numbers, numbers + n), std::vector<int32_t>(tokens, tokens + n));
        }
        return 0;
    });
}

// How a sequence's tokens are drawn: logits over the temperature (0: the most probable token), the
// fewest tokens that have probability top_p, then a draw.
LIVE_API int32_t live_sampler(int32_t number, float temperature, float top_p, uint32_t seed) {
    return guarded(-1, [&]() -> int32_t {
        sequence & s = at(number);
        if (!(temperature >= 0.0f && temperature < INFINITY) || !(top_p > 0.0f && top_p <= 1.0f)) {
            throw std::runtime_error("temperature must be 0 or more, top_p above 0 and at most 1");
        }
        s.sampler.reset(llama_sampler_chain_init(llama_sampler_chain_default_params()));
        if (temperature == 0.0f) {
            llama_sampler_chain_add(s.sampler.get(), llama_sampler_init_greedy());
        } else {
            llama_sampler_chain_add(s.sampler.get(), llama_sampler_init_temp(temperature));
            llama_sampler_chain_add(s.sampler.get(), llama_sampler_init_top_p(top_p, 1));
            llama_sampler_chain_add(s.sampler.get(), llama_sampler_init_dist(seed == LLAMA_DEFAULT_SEED ? 0 : seed));
        }
        return 0;
    });
}

// The next token of a sequence, which is not yet read.
LIVE_API int32_t live_next(int32_t number) {
    return guarded(-1, [&]() -> int32_t {
        sequence & s = with_text(number);
        if (!s.sampler) {
            throw std::runtime_error("sequence " + std::to_string(number) + " has no sampler: set one first");
        }
        std::vector<llama_token_data> candidates(s.logits.size());
        for (size_t i = 0; i < candidates.size(); i++) {
            candidates[i] = { llama_token(i), s.logits[i], 0.0f };
        }
        llama_token_data_array all = { candidates.data(), candidates.size(), -1, false };
        llama_sampler_apply(s.sampler.get(), &all);
        const llama_token token = all.data[all.selected].id;
        llama_sampler_accept(s.sampler.get(), token);
        return token;
    });
}

// Logits behind what a sequence has read, [vocabulary] floats.
LIVE_API int32_t live_logits(int32_t number, float * logits) {
    return guarded(-1, [&]() -> int32_t {
        const sequence & s = with_text(number);
        std::copy(s.logits.begin(), s.logits.end(), logits);
        return 0;
    });
}

// log P(token) behind what a sequence has read, nats.
LIVE_API double live_log_probability(int32_t number, int32_t token) {
    return guarded(double(NAN), [&]() -> double {
        check_token(token);
        const sequence & s = with_text(number);
        return s.logits[token] - log_total(s.logits);
    });
}

// KL(p ‖ q) of what follows two sequences, nats.
LIVE_API double live_divergence(int32_t p, int32_t q) {
    return guarded(double(NAN), [&]() -> double {
        const std::vector<float> & a = with_text(p).logits;
        const std::vector<float> & b = with_text(q).logits;
        const double total_a = log_total(a), total_b = log_total(b);
        double sum = 0.0;
        for (size_t i = 0; i < a.size(); i++) {
            const double log_p = a[i] - total_a;
            sum += std::exp(log_p)*(log_p - (b[i] - total_b));
        }
        return std::max(sum, 0.0);
    });
}

int main() {
    return 0;
}
