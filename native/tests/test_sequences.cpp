// What the patch promises for many sequences in one context, for saved states, and for exceptions
// (native/README.md). The reference is the commitment of the context, which test_commitment.cpp
// compares with the unpatched library.
//
// test-sequences CASE MODEL REFERENCE TINY_MODEL, as test-commitment.

#include "harness.h"

#include <limits>
#include <map>
#include <thread>

extern thread_local int64_t allocations_left; // failing_new.cpp

// --- helpers

static const int32_t N_SEQ = 5;

static llama_context_params many(bool unified = false, int32_t n_threads = 1) {
    llama_context_params params = context_params();
    params.n_ctx           = 128*N_SEQ;
    params.n_seq_max       = N_SEQ;
    params.n_ubatch        = 16;
    params.kv_unified      = unified;
    params.n_threads       = n_threads;
    params.n_threads_batch = n_threads;
    return params;
}

// tokens of one sequence in a batch
struct part {
    llama_seq_id seq;
    int32_t      n_tokens;
    enum { NONE, LAST, ALL } outputs;
};

using parts = std::vector<part>;

struct conversation {
    std::map<llama_seq_id, llama_pos>          pos;
    std::map<llama_seq_id, std::vector<float>> logits; // of all outputs so far

    // one llama_decode(), in which the sequences take turns token by token
    void decode(llama_context * ctx, const parts & batch_parts) {
        const int32_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)));
        llama_batch batch = llama_batch_init(64, 0, 1);
        std::vector<llama_seq_id> output_seq;
        for (int32_t turn = 0; turn < 64; turn++) {
            for (const part & p : batch_parts) {
                if (turn < p.n_tokens) {
                    const int32_t j = batch.n_tokens++;
                    batch.token[j]     = 3 + (p.seq*31 + pos[p.seq]*7919 + 13) % 256;
                    batch.pos[j]       = pos[p.seq]++;
                    batch.n_seq_id[j]  = 1;
                    batch.seq_id[j][0] = p.seq;
                    batch.logits[j]    = p.outputs == part::ALL || (p.outputs == part::LAST && turn == p.n_tokens - 1);
                    output_seq.push_back(batch.logits[j] ? p.seq : -1);
                }
            }
        }
        CHECK(llama_decode(ctx, batch) == 0);
        for (int32_t j = 0; j < batch.n_tokens; j++) {
            if (output_seq[j] >= 0) {
                const float * row = llama_get_logits_ith(ctx, j);
                auto & rows = logits[output_seq[j]];
                rows.insert(rows.end(), row, row + n_vocab);
            }
        }
        llama_batch_free(batch);
    }
};

// prompts of different lengths, cut into ubatches of 16 (some without any output), then single tokens
static const std::vector<parts> SCRIPT = {
    { { 0, 9, part::ALL }, { 1, 14, part::LAST }, { 2, 5, part::ALL }, { 3, 12, part::NONE }, { 4, 20, part::LAST } },
    { { 3, 3, part::LAST }, { 1, 2, part::ALL } },
    { { 0, 1, part::ALL }, { 1, 1, part::ALL }, { 2, 1, part::ALL }, { 3, 1, part::ALL }, { 4, 1, part::ALL } },
    { { 0, 1, part::ALL }, { 1, 1, part::ALL }, { 2, 1, part::ALL }, { 3, 1, part::ALL }, { 4, 1, part::ALL } },
    { { 4, 1, part::ALL }, { 2, 1, part::ALL }, { 1, 1, part::ALL }, { 0, 1, part::ALL }, { 3, 1, part::NONE } },
    { { 2, 1, part::ALL } },
};

static std::map<llama_seq_id, std::vector<float>> play(llama_context * ctx, const std::vector<parts> & script = SCRIPT) {
    llama_memory_clear(llama_get_memory(ctx), true);
    conversation talk;
    for (const parts & batch : script) {
        talk.decode(ctx, batch);
    }
    return talk.logits;
}

static bool all_same_bits(const std::map<llama_seq_id, std::vector<float>> & a, const std::map<llama_seq_id, std::vector<float>> & b) {
    CHECK(a.size() == b.size());
    for (const auto & [seq, rows] : a) {
        if (!same_bits(rows, b.at(seq))) {
            return false;
        }
    }
    return true;
}

struct spec {
    const std::vector<float> * v; // nullptr: none
    float   lambda;
    int32_t start;
    int32_t end;
};

static void set(llama_context * ctx, const spec & s) {
    CHECK((s.v ? llama_set_commitment(ctx, s.v->data(), s.v->size(), int32_t(s.v->size()), s.lambda, s.start, s.end)
               : llama_clear_commitment(ctx)) == LLAMA_COMMITMENT_OK);
}

static void set(llama_context * ctx, llama_seq_id seq, const spec & s) {
    CHECK((s.v ? llama_set_commitment_seq(ctx, seq, s.v->data(), s.v->size(), int32_t(s.v->size()), s.lambda, s.start, s.end)
               : llama_clear_commitment_seq(ctx, seq)) == LLAMA_COMMITMENT_OK);
}

// what each of the sequences has of its own; the last one has nothing, and uses the context's
struct five {
    std::vector<float> v, w, u;
    spec own[N_SEQ];
    spec context;

    explicit five(const fixture & f) : v(f.vector(21)), w(f.vector(22)), u(f.vector(23)), own{
        { &v,  0.5f, 0, 3 }, { &w, -0.7f, 1, 2 }, { &v, 0.0f, 0, 3 }, { &w, 0.5f, 3, 3 }, { nullptr, 0.0f, 0, 0 },
    }, context{ &u, 0.4f, 0, 2 } {}

    void set_own(llama_context * ctx) const {
        for (llama_seq_id seq = 0; seq < N_SEQ; seq++) {
            set(ctx, seq, own[seq]);
        }
    }

    const spec & of(llama_seq_id seq) const { return own[seq].v ? own[seq] : context; }
};

// --- cases

// Sequences that are decoded together get, bit for bit, the logits of the same batches with their
// commitment set on the context; and to rounding those of decoding them alone.
static void each_its_own() {
    fixture f;
    const five c(f);
    for (bool unified : { false, true }) {
        for (int32_t n_threads : { 1, 3 }) {
            llama_context * together = new_context(f.model, many(unified, n_threads));
            const auto plain = play(together);
            set(together, c.context);
            c.set_own(together);
            const auto logits = play(together);
            CHECK(all_same_bits(logits, play(together)), "a second time");

            llama_context * one = new_context(f.model, many(unified, n_threads));
            for (llama_seq_id seq = 0; seq < N_SEQ; seq++) {
                set(one, c.of(seq));
                CHECK(same_bits(logits.at(seq), play(one).at(seq)), "sequence %d, unified %d, %d threads", seq, unified, n_threads);

                std::vector<parts> alone;
                for (const parts & batch : SCRIPT) {
                    for (const part & p : batch) {
                        if (p.seq == seq) {
                            alone.push_back({ p });
                        }
                    }
                }
                const float wrong  = max_difference(logits.at(seq), play(one, alone).at(seq));
                const float effect = max_difference(logits.at(seq), plain.at(seq));
                CHECK(wrong < ROUNDING, "sequence %d alone: error %g", seq, double(wrong));
                CHECK(c.of(seq).lambda == 0.0f ? effect == 0.0f : effect > 25*ROUNDING, "sequence %d: effect %g", seq, double(effect));
            }
            llama_free(one);
            llama_free(together);
        }
    }
}

// As long as no sequence adds anything of its own, the graph has the nodes that it had before.
static void nothing_own_is_nothing_new() {
    fixture f;
    const five c(f);
    size_t nodes = 0;
    llama_context_params params = many();
    params.cb_eval = [](ggml_tensor *, bool ask, void * counter) {
        *(size_t *) counter += ask;
        return !ask;
    };
    params.cb_eval_user_data = &nodes;
    llama_context * ctx = new_context(f.model, params);
    const auto count = [&] {
        nodes = 0;
        const auto logits = play(ctx);
        return std::make_pair(nodes, logits);
    };

    const auto off = count();
    set(ctx, 2, c.own[2]);
    CHECK(c.own[2].lambda == 0.0f);
    CHECK(count() == off, "own, with lambda 0");
    set(ctx, 2, { nullptr, 0.0f, 0, 0 });
    set(ctx, 2, { nullptr, 0.0f, 0, 0 });
    CHECK(count() == off, "cleared, twice");

    set(ctx, c.context);
    const auto on = count();
    CHECK(on.first > off.first && on.second != off.second);
    set(ctx, 3, c.own[3]);
    const auto own = count();
    CHECK(own.first > on.first && own.second != on.second);
    set(ctx, 3, { nullptr, 0.0f, 0, 0 });
    CHECK(count() == on, "the context's alone again");
    set(ctx, { nullptr, 0.0f, 0, 0 });
    CHECK(count() == off, "none again");

    // cleared on the context, the sequences keep theirs; and a sequence that is not in the batch changes no other
    c.set_own(ctx);
    set(ctx, c.context);
    set(ctx, { nullptr, 0.0f, 0, 0 });
    const auto logits = play(ctx);
    CHECK(same_bits(logits.at(4), off.second.at(4)) && same_bits(logits.at(2), off.second.at(2)));
    CHECK(!same_bits(logits.at(0), off.second.at(0)) && !same_bits(logits.at(3), off.second.at(3)));
    llama_free(ctx);
}

// A change takes effect on the next decode; what adds and removes no node reuses the graph.
static void takes_effect_at_once() {
    fixture f;
    const auto v = f.vector(24);
    const auto w = f.vector(25);
    const spec none = { nullptr, 0.0f, 0, 0 };

    struct step {
        llama_seq_id owner; // whose commitment changes: a sequence, or -1 for the context
        spec         to;
        bool         reuses;
    };
    const std::vector<step> steps = {
        {  2, none,                 false }, // the first graph
        {  0, { &v,  0.5f, 1, 3 },  false },
        {  0, { &v,  2.0f, 1, 3 },  true  },
        {  0, { &w,  2.0f, 1, 3 },  true  },
        {  1, { &w,  1.0f, 1, 3 },  true  }, // joins the layers that are there
        {  1, { &w,  1.0f, 2, 2 },  false }, // ... which now differ
        {  1, { &v, -1.0f, 2, 2 },  true  },
        {  0, { &w,  0.0f, 1, 3 },  false },
        { -1, { &v,  1.0f, 0, 3 },  false },
        {  1, none,                 false },
        { -1, { &w, -0.6f, 0, 3 },  true  },
        {  0, none,                 false }, // no lookup any more
        {  0, { &v,  1.0f, 0, 3 },  false },
        {  1, { &v,  0.3f, 0, 3 },  true  },
        { -1, none,                 true  },
        { -1, { &v,  0.3f, 1, 1 },  false },
    };

    // sequences 0, 1, 2 get a token each, 3 times after every change
    const parts tokens = { { 0, 1, part::ALL }, { 1, 1, part::ALL }, { 2, 1, part::ALL } };
    const auto go = [&](llama_context * ctx, const std::function<void(size_t)> & change, bool count) {
        conversation talk;
        for (size_t i = 0; i < steps.size(); i++) {
            change(i);
            const int32_t before = llama_perf_context(ctx).n_reused;
            for (int n = 0; n < 3; n++) {
                talk.decode(ctx, tokens);
            }
            const int32_t reused = llama_perf_context(ctx).n_reused - before;
            CHECK(!count || reused == (steps[i].reuses ? 3 : 2), "step %zu reused %d graphs", i, reused);
        }
        return talk.logits;
    };

    llama_context * ctx = new_context(f.model, many());
    const auto logits = go(ctx, [&](size_t i) {
        steps[i].owner < 0 ? set(ctx, steps[i].to) : set(ctx, steps[i].owner, steps[i].to);
    }, !llama_model_is_recurrent(f.model)); // whose graphs depend on where the states are
    llama_free(ctx);

    for (llama_seq_id seq = 0; seq < 3; seq++) {
        llama_context * one = new_context(f.model, many());
        spec context = none, own = none;
        const auto expected = go(one, [&](size_t i) {
            if (steps[i].owner ==  -1) { context = steps[i].to; }
            if (steps[i].owner == seq) { own     = steps[i].to; }
            set(one, own.v ? own : context);
        }, false);
        const size_t n = expected.at(seq).size()/steps.size();
        for (size_t i = 0; i < steps.size(); i++) {
            CHECK(std::memcmp(&expected.at(seq)[i*n], &logits.at(seq)[i*n], n*sizeof(float)) == 0, "sequence %d, step %zu", seq, i);
        }
        llama_free(one);
    }
}

// A token that belongs to several sequences is decoded if they have the same commitment, else refused.
static void shared_tokens() {
    fixture f;
    const auto v = f.vector(26);
    const auto w = v; // equal, but not the same object
    const spec none = { nullptr, 0.0f, 0, 0 };
    llama_context * ctx = new_context(f.model, many(true));
    const int32_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(f.model));
    static std::string log;
    llama_log_set([](ggml_log_level level, const char * text, void *) { if (level == GGML_LOG_LEVEL_ERROR) { log += text; } }, nullptr);

    const auto decode = [&](std::vector<float> * logits = nullptr) {
        log.clear();
        llama_memory_clear(llama_get_memory(ctx), true);
        llama_batch batch = llama_batch_init(4, 0, 2);
        for (int32_t j = 0; j < 4; j++, batch.n_tokens++) {
            batch.token[j]    = 10 + j;
            batch.pos[j]      = j;
            batch.n_seq_id[j] = 2;
            batch.seq_id[j][0] = 1;
            batch.seq_id[j][1] = 0;
            batch.logits[j]   = 1;
        }
        const int32_t code = llama_decode(ctx, batch);
        if (code == 0 && logits) {
            logits->assign(llama_get_logits(ctx), llama_get_logits(ctx) + 4*n_vocab);
        }
        llama_batch_free(batch);
        return code;
    };
    const auto refused = [&] {
        return decode() == -1 && log.find("different commitments") != std::string::npos &&
            llama_memory_seq_pos_max(llama_get_memory(ctx), 0) == -1 && llama_memory_seq_pos_max(llama_get_memory(ctx), 1) == -1;
    };

    std::vector<float> plain, everywhere, own;
    CHECK(decode(&plain) == 0);
    set(ctx, { &v, 0.5f, 0, 3 });
    CHECK(decode(&everywhere) == 0 && !same_bits(plain, everywhere), "the context's is the same for all");
    set(ctx, 2, { &v, 0.7f, 0, 3 });
    CHECK(decode(&own) == 0 && same_bits(own, everywhere), "another sequence is of no interest");

    set(ctx, 0, { &v, 0.0f, 0, 3 });
    CHECK(refused(), "nothing and the context's");
    set(ctx, none);
    CHECK(decode(&own) == 0 && same_bits(own, plain), "nothing and none");
    set(ctx, 1, { &v, 0.5f, 0, 3 });
    CHECK(refused(), "nothing and something");
    set(ctx, 0, { &v, 0.5f, 0, 2 });
    CHECK(refused(), "other layers");
    set(ctx, 0, { &v, 0.4f, 0, 3 });
    CHECK(refused(), "another lambda");
    set(ctx, 0, { &w, 0.5f, 0, 3 });
    CHECK(decode(&own) == 0 && same_bits(own, everywhere), "equal ones");
    auto x = v;
    x[5] += 1.0f;
    set(ctx, 0, { &x, 0.5f, 0, 3 });
    CHECK(refused(), "another vector");
    set(ctx, 0, none);
    CHECK(refused(), "none and something");
    set(ctx, { &w, 0.5f, 0, 3 });
    CHECK(decode(&own) == 0 && same_bits(own, everywhere), "the context's, equal to one's own");
    llama_free(ctx);
}

// Copying, removing and clearing moves caches, not commitments: these belong to the sequence's number.
static void memory_operations() {
    fixture f;
    const five c(f);
    const parts tokens = { { 0, 1, part::ALL }, { 1, 1, part::ALL }, { 4, 1, part::ALL } };
    llama_context * ctx = new_context(f.model, many(true));
    llama_context * one = new_context(f.model, many(true));
    const auto prompt_and_fork = [](llama_context * x) {
        llama_memory_t memory = llama_get_memory(x);
        llama_memory_clear(memory, true);
        conversation talk;
        talk.decode(x, { { 0, 10, part::NONE }, { 1, 6, part::NONE } });
        llama_memory_seq_rm(memory, 1, -1, -1);
        llama_memory_seq_cp(memory, 0, 1, -1, -1);
        llama_memory_seq_cp(memory, 0, 4, -1, -1);
        talk.pos[1] = talk.pos[4] = talk.pos[0];
        return talk;
    };

    set(ctx, c.context);
    c.set_own(ctx);
    for (int round = 0; round < 2; round++) {
        conversation talk = prompt_and_fork(ctx);
        talk.decode(ctx, tokens);
        for (llama_seq_id seq : { 0, 1, 4 }) {
            set(one, c.of(0));
            conversation expected = prompt_and_fork(one);
            set(one, c.of(seq));
            expected.decode(one, tokens);
            CHECK(same_bits(talk.logits.at(seq), expected.logits.at(seq)), "sequence %d, round %d", seq, round);
        }
        llama_memory_seq_keep(llama_get_memory(ctx), 4);
    }
    llama_free(one);
    llama_free(ctx);
}

// Two contexts of one model, from two threads: neither sees the other's.
static void two_threads() {
    fixture f;
    const five c(f);
    const auto work = [&](float sign) {
        llama_context * ctx = new_context(f.model, many());
        std::vector<float> all;
        for (int round = 0; round < 4; round++) {
            set(ctx, { &c.u, 0.2f*sign, 0, round % 4 });
            for (llama_seq_id seq = 0; seq < N_SEQ; seq++) {
                set(ctx, seq, seq == round ? spec{ nullptr, 0, 0, 0 } : spec{ seq % 2 ? &c.v : &c.w, sign*0.1f*(seq + round), 0, seq % 4 });
            }
            for (const auto & [seq, rows] : play(ctx)) {
                all.insert(all.end(), rows.begin(), rows.end());
            }
        }
        llama_free(ctx);
        return all;
    };
    const auto plus  = work(+1.0f);
    const auto minus = work(-1.0f);
    CHECK(!same_bits(plus, minus));
    std::vector<float> plus_2, minus_2;
    std::thread a([&] { plus_2  = work(+1.0f); });
    std::thread b([&] { minus_2 = work(-1.0f); });
    a.join();
    b.join();
    CHECK(same_bits(plus, plus_2) && same_bits(minus, minus_2));
}

// Bad input returns its code, logs its message, and changes nothing.
static void bad_input() {
    fixture f;
    const five c(f);
    llama_context * ctx = new_context(f.model, many());
    const int32_t n    = f.n_embd;
    const int32_t last = f.n_layer - 1;
    const float   nan  = std::numeric_limits<float>::quiet_NaN();
    auto with_nan = c.v, huge = c.v;
    with_nan[n - 1] = nan;
    huge[1] = std::numeric_limits<float>::max();

    const auto attempt = [&] {
        const auto bad = [&](int32_t code, int32_t expected) {
            CHECK(code == expected, "returned %d, expected %d", code, expected);
            CHECK(last_log.find(llama_commitment_error(code)) != std::string::npos, "%d: not logged", code);
            last_log.clear();
        };
        const auto set_seq = [&](llama_seq_id seq, const float * data, size_t len, int32_t n_embd, float lambda, int32_t start, int32_t end) {
            return llama_set_commitment_seq(ctx, seq, data, len, n_embd, lambda, start, end);
        };
        for (llama_seq_id seq : { -1, -2, N_SEQ, 255, 256, INT32_MAX, INT32_MIN }) {
            bad(set_seq(seq, c.v.data(), n, n, 1, 0, last), LLAMA_COMMITMENT_ERR_SEQ_ID);
            bad(llama_clear_commitment_seq(ctx, seq),       LLAMA_COMMITMENT_ERR_SEQ_ID);
        }
        bad(llama_set_commitment_seq(nullptr, 0, c.v.data(), n, n, 1, 0, last), LLAMA_COMMITMENT_ERR_NULL_CONTEXT);
        bad(llama_clear_commitment_seq(nullptr, 0),                             LLAMA_COMMITMENT_ERR_NULL_CONTEXT);
        for (llama_seq_id seq : { 0, N_SEQ - 1 }) { // one that has its own, one that has not
            bad(set_seq(seq, nullptr,         n,     n,     1,   0,  last),     LLAMA_COMMITMENT_ERR_NULL_DATA);
            bad(set_seq(seq, c.v.data(),      n - 1, n - 1, 1,   0,  last),     LLAMA_COMMITMENT_ERR_N_EMBD);
            bad(set_seq(seq, c.v.data(),      n,     0,     1,   0,  last),     LLAMA_COMMITMENT_ERR_N_EMBD);
            bad(set_seq(seq, c.v.data(),      n - 1, n,     1,   0,  last),     LLAMA_COMMITMENT_ERR_LEN);
            bad(set_seq(seq, with_nan.data(), n,     n,     0,   0,  last),     LLAMA_COMMITMENT_ERR_DATA_NOT_FINITE);
            bad(set_seq(seq, c.v.data(),      n,     n,     nan, 0,  last),     LLAMA_COMMITMENT_ERR_LAMBDA_NOT_FINITE);
            bad(set_seq(seq, huge.data(),     n,     n,     2,   0,  last),     LLAMA_COMMITMENT_ERR_OVERFLOW);
            bad(set_seq(seq, c.v.data(),      n,     n,     1,   2,  1),        LLAMA_COMMITMENT_ERR_RANGE);
            bad(set_seq(seq, c.v.data(),      n,     n,     1,   -1, last),     LLAMA_COMMITMENT_ERR_RANGE);
            bad(set_seq(seq, c.v.data(),      n,     n,     1,   0,  last + 1), LLAMA_COMMITMENT_ERR_RANGE_BEYOND);
        }
    };

    const auto plain = play(ctx);
    attempt();
    CHECK(all_same_bits(play(ctx), plain), "none set");
    CHECK(llama_clear_commitment_seq(ctx, 0) == LLAMA_COMMITMENT_OK, "clearing what is not there is no error");

    set(ctx, c.context);
    c.set_own(ctx);
    const auto logits = play(ctx);
    const parts again = { { 0, 1, part::ALL }, { 1, 1, part::ALL } };
    conversation talk;
    llama_memory_clear(llama_get_memory(ctx), true);
    talk.decode(ctx, again);
    attempt();
    const int32_t before = llama_perf_context(ctx).n_reused;
    talk.decode(ctx, again);
    CHECK(llama_perf_context(ctx).n_reused == before + 1, "an error must not cost a new graph");
    CHECK(all_same_bits(play(ctx), logits), "all set");
    llama_free(ctx);
}

// Every allocation can fail: that is an error code, no exception leaves the C interface, nothing changes.
static void failed_allocations() {
    fixture f;
    const five c(f);
    llama_context * ctx = new_context(f.model, many());
    const int32_t n = f.n_embd;

    const auto fail_each = [&](const char * what, const std::function<int32_t()> & call) {
        const auto before = play(ctx);
        int32_t code = LLAMA_COMMITMENT_ERR_ALLOC;
        int64_t k = 0;
        for (; code != LLAMA_COMMITMENT_OK; k++) {
            allocations_left = k;
            code = call();
            allocations_left = -1;
            CHECK(code == LLAMA_COMMITMENT_OK || code == LLAMA_COMMITMENT_ERR_ALLOC, "%s, allocation %d: %d", what, int(k), code);
            CHECK(code == LLAMA_COMMITMENT_OK || all_same_bits(play(ctx), before), "%s, allocation %d", what, int(k));
        }
        CHECK(!all_same_bits(play(ctx), before), "%s has no effect", what);
        return k - 1; // allocations
    };
    const auto set_context  = [&] { return llama_set_commitment(ctx, c.u.data(), n, n, 0.4f, 0, 2); };
    const auto set_sequence = [&] { return llama_set_commitment_seq(ctx, 1, c.v.data(), n, n, 0.5f, 0, 3); };

#if defined(__SANITIZE_ADDRESS__)
    // ggml's own code, in C, loses memory when an allocation fails inside it, which is not what is being
    // examined: let it allocate its buffers before
    CHECK(set_context() == 0 && set_sequence() == 0);
    CHECK(llama_clear_commitment(ctx) == 0 && llama_clear_commitment_seq(ctx, 1) == 0);
#endif
    CHECK(fail_each("set",          set_context) > 0);
    CHECK(fail_each("set_seq",      set_sequence) > 0);
    CHECK(fail_each("set_seq more", [&] { return llama_set_commitment_seq(ctx, 3, c.w.data(), n, n, 0.5f, 1, 1); }) > 0);
    CHECK(fail_each("lambda",       [&] { return llama_set_commitment_lambda(ctx, 0.7f); }) > 0);
    CHECK(fail_each("range",        [&] { return llama_set_commitment_range(ctx, 1, 3); }) > 0);
    CHECK(fail_each("clear_seq",    [&] { return llama_clear_commitment_seq(ctx, 1); }) > 0);
    CHECK(fail_each("clear",        [&] { return llama_clear_commitment(ctx); }) > 0);
    llama_free(ctx);
}

// The state holds all commitments, and restoring it brings back exactly those.
static void state() {
    fixture f;
    const five c(f);
    const parts more = { { 0, 1, part::ALL }, { 1, 1, part::ALL }, { 2, 1, part::ALL }, { 3, 1, part::ALL }, { 4, 1, part::ALL } };
    llama_context * saved = new_context(f.model, many());
    llama_context * other = new_context(f.model, many());
    const auto prompt = [&](llama_context * ctx) {
        conversation talk;
        llama_memory_clear(llama_get_memory(ctx), true);
        talk.decode(ctx, SCRIPT[0]);
        talk.logits.clear();
        return talk;
    };
    const auto go_on = [&](llama_context * ctx, conversation talk) {
        talk.decode(ctx, more);
        talk.decode(ctx, more);
        return talk.logits;
    };

    // without any
    conversation talk = prompt(saved);
    const auto plain_state = state_of(saved);
    const auto plain       = go_on(saved, talk);

    // with some
    set(saved, c.context);
    c.set_own(saved);
    talk = prompt(saved);
    const auto        state    = state_of(saved);
    const std::string file     = scratch(".session");
    const llama_token tokens[] = { 5, 6, 7 };
    CHECK(llama_state_save_file(saved, file.c_str(), tokens, 3));
    const size_t n_seq_state = llama_state_seq_get_size(saved, 0);
    std::vector<uint8_t> seq_state(n_seq_state);
    CHECK(llama_state_seq_get_data(saved, seq_state.data(), n_seq_state, 0) == n_seq_state);
    const auto logits = go_on(saved, talk);
    CHECK(!all_same_bits(logits, plain));

    const auto disturb = [&] { // what must be gone after restoring
        set(other, { &c.v, -1.0f, 1, 3 });
        set(other, 4, { &c.w, 2.0f, 0, 0 });
        set(other, 1, { nullptr, 0, 0, 0 });
    };

    disturb();
    CHECK(llama_state_set_data(other, state.data(), state.size()) == state.size());
    CHECK(state_of(other) == state, "saved again, it is the same");
    CHECK(all_same_bits(go_on(other, talk), logits), "from memory");

    disturb();
    llama_token tokens_back[3];
    size_t n_tokens_back = 0;
    CHECK(llama_state_load_file(other, file.c_str(), tokens_back, 3, &n_tokens_back) && n_tokens_back == 3 && tokens_back[2] == 7);
    CHECK(all_same_bits(go_on(other, talk), logits), "from a file");
    std::remove(file.c_str());

    // a state without commitments brings back that there are none
    CHECK(llama_state_set_data(other, plain_state.data(), plain_state.size()) == plain_state.size());
    CHECK(state_of(other) == plain_state);
    CHECK(all_same_bits(go_on(other, talk), plain), "without commitments");

    // the state of one sequence is its cache alone: no commitment is in it, and restoring it leaves them alone
    prompt(other);
    CHECK(llama_state_seq_get_size(other, 0) == n_seq_state);
    const auto restored = [&](llama_context * ctx) {
        CHECK(llama_state_seq_set_data(ctx, seq_state.data(), n_seq_state, 1) == n_seq_state);
        conversation one;
        one.pos[1] = talk.pos[0];
        one.decode(ctx, { { 1, 1, part::ALL } });
        return one.logits;
    };
    const auto without = restored(other);
    set(other, 1, c.own[1]);
    const auto own = restored(other);
    set(other, 1, { nullptr, 0, 0, 0 });
    set(other, c.own[1]);
    CHECK(all_same_bits(own, restored(other)) && !all_same_bits(own, without));
    set(other, { nullptr, 0, 0, 0 });

    // what cannot be right is refused, and leaves the commitments alone
    disturb();
    const auto before  = play(other);
    const size_t start = 4 + std::strlen("llama+commitment") + 4; // of the first commitment, for a name of 5 letters
    const auto refused = [&](const std::vector<uint8_t> & bad, const char * what, size_t i) {
        last_log.clear();
        CHECK(llama_state_set_data(other, bad.data(), bad.size()) == 0, "%s %zu", what, i);
        CHECK(last_log.find("error loading state") != std::string::npos);
        CHECK(all_same_bits(play(other), before), "%s %zu", what, i);
    };
    const std::string arch = std::string(MODEL).find("llama") != std::string::npos ? "llama" : "";
    if (arch == "llama") {
        const auto patched = [&](size_t offset, auto value) {
            auto bad = state;
            std::memcpy(&bad[start + offset], &value, sizeof(value));
            return bad;
        };
        refused(patched(0,  int32_t(N_SEQ)), "sequence", 0);
        refused(patched(0,  int32_t(-2)),    "sequence", 1);
        refused(patched(4,  std::numeric_limits<float>::infinity()), "lambda", 0);
        refused(patched(8,  int32_t(-1)),    "layers", 0);
        refused(patched(12, int32_t(4)),     "layers", 1);
        refused(patched(16, uint32_t(65)),   "width", 0);
        refused(patched(16, uint32_t(-1)),   "width", 1);
        refused(patched(20, std::numeric_limits<float>::quiet_NaN()), "data", 0);
        refused(patched(size_t(-4), uint32_t(-1)), "count", 0);
    }
    for (size_t length = 0; length < state.size(); length = length < 3000 ? length + 37 : length + state.size()/16) {
        refused({ state.begin(), state.begin() + ptrdiff_t(length) }, "truncated to", length);
    }
    llama_free(other);
    llama_free(saved);
}

// States go to and from the unpatched library as long as there is no commitment in them.
static void state_of_others() {
    fixture f;
    const auto v = f.vector(27);
    std::vector<uint8_t> stock;
    const schedule prompt = { { 12, 1 }, { 5, 0 } };
    const auto logits = reference(prompt, MODEL, &stock);
    CHECK(same_bits(trace(f.ctx, prompt, [](size_t) {}), logits));
    CHECK(state_of(f.ctx) == stock, "the same bytes");

    const std::string data = scratch(".state"), file = scratch(".session"), answer = scratch(".answer");
    const auto asked = [&] {
        write_file(data, state_of(f.ctx));
        const llama_token token = 1;
        CHECK(llama_state_save_file(f.ctx, file.c_str(), &token, 1));
        run(std::string(REFERENCE) + " " + MODEL + " restore " + data + " " + file + " > " + answer);
        const auto text = read_file(answer);
        return std::string(text.begin(), text.end());
    };
    CHECK(asked() == "accepted accepted\n");
    CHECK(f.set(v, 0.0f, 0, 3) == 0);
    CHECK(asked() == "refused refused\n", "also with lambda 0: the vector would be lost");
    CHECK(llama_clear_commitment(f.ctx) == 0);
    CHECK(asked() == "accepted accepted\n");

    // a state of the unpatched library has no commitment
    CHECK(f.set(v, 1.0f, 0, 3) == 0);
    CHECK(llama_state_set_data(f.ctx, stock.data(), stock.size()) == stock.size());
    CHECK(state_of(f.ctx) == stock);
    CHECK(same_bits(trace(f.ctx, prompt, [](size_t) {}), logits));
    for (const std::string & path : { data, file, answer }) {
        std::remove(path.c_str());
    }
}

// An architecture that never calls build_cvec
static void unsupported() {
    fixture f;
    const auto v = f.vector(28);
    CHECK(llama_set_commitment_seq(f.ctx, 0, v.data(), v.size(), f.n_embd, 1.0f, 0, 3) == LLAMA_COMMITMENT_ERR_UNSUPPORTED);
    CHECK(last_log.find(llama_commitment_error(LLAMA_COMMITMENT_ERR_UNSUPPORTED)) != std::string::npos);
    CHECK(f.set(v, 1.0f, 0, 3) == LLAMA_COMMITMENT_ERR_UNSUPPORTED);
    CHECK(llama_clear_commitment_seq(f.ctx, 0) == LLAMA_COMMITMENT_OK);
}

int main(int argc, char ** argv) {
    CHECK(argc == 5);
    MODEL      = argv[2];
    REFERENCE  = argv[3];
    TINY_MODEL = argv[4];
    keep_last_error();

    static const test_case cases[] = {
        { "each_its_own", each_its_own },
        { "nothing_own_is_nothing_new", nothing_own_is_nothing_new },
        { "takes_effect_at_once", takes_effect_at_once },
        { "shared_tokens", shared_tokens },
        { "memory_operations", memory_operations },
        { "two_threads", two_threads },
        { "bad_input", bad_input },
        { "failed_allocations", failed_allocations },
        { "state", state },
        { "state_of_others", state_of_others },
        { "unsupported", unsupported },
    };
    return run_case(cases, argv[1]);
}
