// What the patch promises (native/README.md), against the unpatched library.
//
// test-commitment CASE MODEL REFERENCE TINY_MODEL, where the last two are the programs of reference.cpp
// and tiny_model.cpp.

#include "harness.h"

#include <limits>
#include <set>
#include <thread>

// a prompt in one batch, then single tokens that reuse the graph
static const schedule PLAIN = { { 12, 1 }, { 10, 0 } };

static void nothing(size_t) {}

// --- cases

// not set, lambda == 0, and cleared: bit-identical to the unpatched library
static void off_is_stock() {
    fixture f;
    const auto v     = f.vector(1);
    const auto stock = reference(PLAIN);
    const auto once  = [](const std::function<void()> & action) {
        return [action](size_t i) { if (i == 0) { action(); } };
    };

    CHECK(same_bits(trace(f.ctx, PLAIN, nothing), stock), "never set");
    CHECK(same_bits(trace(f.ctx, PLAIN, once([&] { CHECK(f.set(v, 0.0f, 0, 3) == 0); })), stock), "lambda 0");
    CHECK(same_bits(trace(f.ctx, PLAIN, once([&] { CHECK(llama_set_commitment_range(f.ctx, 1, 2) == 0); })), stock), "range with lambda 0");
    CHECK(same_bits(trace(f.ctx, PLAIN, once([&] { CHECK(llama_set_commitment_lambda(f.ctx, -0.0f) == 0); })), stock), "lambda -0");

    CHECK(!same_bits(trace(f.ctx, PLAIN, once([&] { CHECK(llama_set_commitment_lambda(f.ctx, 1.0f) == 0); })), stock), "lambda 1 must matter");
    CHECK(same_bits(trace(f.ctx, PLAIN, once([&] { CHECK(llama_set_commitment_lambda(f.ctx, 0.0f) == 0); })), stock), "lambda back to 0");

    CHECK(f.set(v, 1.0f, 0, 3) == 0);
    CHECK(!same_bits(trace(f.ctx, PLAIN, nothing), stock), "set must matter");
    CHECK(llama_clear_commitment(f.ctx) == 0);
    CHECK(same_bits(trace(f.ctx, PLAIN, nothing), stock), "cleared");
    CHECK(llama_clear_commitment(f.ctx) == 0, "clearing twice is no error");
    CHECK(llama_set_commitment_lambda(f.ctx, 1.0f) == LLAMA_COMMITMENT_ERR_NOT_SET, "cleared means forgotten");
    CHECK(same_bits(trace(f.ctx, PLAIN, nothing), stock), "still cleared");
}

// layers >= 1: bit-identical to the unpatched library with a control vector that holds lambda*v
static void equals_control_vector() {
    fixture f;
    const auto v     = f.vector(2);
    const auto plain = reference(PLAIN);
    const int32_t ranges[][2] = { { 1, 3 }, { 1, 1 }, { 2, 3 }, { 3, 3 } };
    for (const auto & range : ranges) {
        for (float lambda : { 0.37f, -2.0f }) {
            schedule segments = PLAIN;
            for (segment & s : segments) {
                s.il_start = range[0];
                s.il_end   = range[1];
                s.table    = f.table(v, lambda);
            }
            CHECK(f.set(v, lambda, range[0], range[1]) == 0);
            const auto committed = trace(f.ctx, PLAIN, nothing);
            CHECK(same_bits(committed, reference(segments)), "layers %d..%d lambda %g", range[0], range[1], double(lambda));
            CHECK(max_difference(committed, plain) > 1e-2f);
        }
    }
}

// Layer 0 too: the unpatched library computes the same function (to rounding) from a model whose
// feed-forward biases hold lambda*v in those layers.
static void equals_bias() {
    fixture f;
    const auto v     = f.vector(3);
    const auto plain = reference(PLAIN);
    const float lambda = 0.8f;

    std::vector<float> bias;
    for (float x : v) {
        bias.push_back(lambda*x);
    }
    const std::string bias_file = scratch(".bias");
    const std::string biased    = scratch(".biased.gguf");
    std::ofstream(bias_file, std::ios::binary).write((const char *) bias.data(), std::streamsize(bias.size()*sizeof(float)));
    const std::string arch = std::string(MODEL).find("gpt2") != std::string::npos ? "gpt2" : "llama";

    const int32_t ranges[][2] = { { 0, 0 }, { 0, 3 }, { 0, 1 }, { 2, 2 } };
    for (const auto & range : ranges) {
        run(std::string(TINY_MODEL) + " " + arch + " " + biased + " " + bias_file + " " + std::to_string(range[0]) + " " + std::to_string(range[1]));
        CHECK(f.set(v, lambda, range[0], range[1]) == 0);
        const auto  committed = trace(f.ctx, PLAIN, nothing);
        const float wrong     = max_difference(committed, reference(PLAIN, biased));
        const float effect    = max_difference(committed, plain);
        CHECK(wrong < ROUNDING && effect > 50*ROUNDING, "layers %d..%d: error %g, effect %g", range[0], range[1], double(wrong), double(effect));
    }
    std::remove(bias_file.c_str());
    std::remove(biased.c_str());
}

// A change takes effect on the next decode, also where graphs are reused; and what needs no new
// graph does reuse the old one.
static void takes_effect_at_once() {
    fixture f;
    const auto v = f.vector(4);
    const auto w = f.vector(5);

    struct step {
        std::function<int32_t()> change;
        const std::vector<float> * vector; // the state after the change
        float   lambda;
        int32_t start;
        int32_t end;
        bool    reuses; // the graph of the step before
    };
    const std::vector<step> steps = {
        { [&] { return 0; },                                          nullptr, 0.0f, -1, -1, false },
        { [&] { return f.set(v, 0.5f, 1, 3); },                       &v,      0.5f,  1,  3, false },
        { [&] { return llama_set_commitment_lambda(f.ctx, 2.0f); },   &v,      2.0f,  1,  3, true  },
        { [&] { return llama_set_commitment_range(f.ctx, 2, 2); },    &v,      2.0f,  2,  2, false },
        { [&] { return f.set(w, 2.0f, 2, 2); },                       &w,      2.0f,  2,  2, true  },
        { [&] { return llama_set_commitment_lambda(f.ctx, 0.0f); },   nullptr, 0.0f, -1, -1, false },
        { [&] { return llama_set_commitment_range(f.ctx, 1, 2); },    nullptr, 0.0f, -1, -1, true  },
        { [&] { return llama_set_commitment_lambda(f.ctx, -1.0f); },  &w,     -1.0f,  1,  2, false },
        { [&] { return llama_set_commitment_range(f.ctx, 1, 3); },    &w,     -1.0f,  1,  3, false },
        { [&] { return llama_clear_commitment(f.ctx); },              nullptr, 0.0f, -1, -1, false },
        { [&] { return f.set(v, 1.0f, 3, 3); },                       &v,      1.0f,  3,  3, false },
    };

    schedule segments;
    for (const step & s : steps) {
        segments.push_back({ 3, 0, s.start, s.end, s.vector ? f.table(*s.vector, s.lambda) : std::vector<float>() });
    }
    const auto expected = reference(segments);

    std::vector<int32_t> reused; // graphs reused so far, before each step
    const auto actual = trace(f.ctx, segments, [&](size_t i) {
        reused.push_back(llama_perf_context(f.ctx).n_reused);
        CHECK(steps[i].change() == 0, "step %zu", i);
    });
    reused.push_back(llama_perf_context(f.ctx).n_reused);

    const size_t n = actual.size()/segments.size();
    for (size_t i = 0; i < segments.size(); i++) {
        CHECK(std::memcmp(&actual[i*n], &expected[i*n], n*sizeof(float)) == 0, "step %zu", i);
        CHECK(i == 0 || std::memcmp(&actual[i*n], &actual[(i - 1)*n], n*sizeof(float)) != 0);
        const int32_t reused_here = reused[i + 1] - reused[i]; // of 3 decodes
        CHECK(reused_here == (steps[i].reuses ? 3 : 2), "step %zu reused %d graphs", i, reused_here);
    }
}

// A control vector and a commitment add up, and each can go while the other stays.
static void adds_to_control_vector() {
    fixture f;
    const auto a = f.vector(6);
    const auto b = f.vector(7);
    const auto control = f.table(a, 0.5f);
    const auto set_control = [&](int32_t start, int32_t end) {
        CHECK(llama_set_adapter_cvec(f.ctx, control.data(), control.size(), f.n_embd, start, end) == 0);
    };
    const auto expect = [&](const std::vector<float> & table, int32_t start, int32_t end) {
        schedule segments = PLAIN;
        for (segment & s : segments) {
            s.il_start = start;
            s.il_end   = end;
            s.table    = table;
        }
        return reference(segments);
    };

    // on different layers: bit-identical to one table with both
    auto both = control;
    for (int32_t j = 0; j < f.n_embd; j++) {
        both[size_t(f.n_embd) + j] = 0.7f*b[j]; // layer 2
    }
    set_control(1, 1);
    CHECK(f.set(b, 0.7f, 2, 2) == 0);
    CHECK(same_bits(trace(f.ctx, PLAIN, nothing), expect(both, 1, 2)), "different layers");

    // on the same layers: h + a + b is h + (a + b), to rounding
    auto sum = control;
    for (size_t i = 0; i < sum.size(); i++) {
        sum[i] += 0.7f*b[i % f.n_embd];
    }
    set_control(1, 3);
    CHECK(llama_set_commitment_range(f.ctx, 1, 3) == 0);
    const auto added = trace(f.ctx, PLAIN, nothing);
    CHECK(max_difference(added, expect(sum, 1, 3)) < ROUNDING, "same layers");
    CHECK(max_difference(added, expect(control, 1, 3)) > 50*ROUNDING);

    CHECK(llama_clear_commitment(f.ctx) == 0);
    CHECK(same_bits(trace(f.ctx, PLAIN, nothing), expect(control, 1, 3)), "the control vector stays");

    CHECK(f.set(b, 0.7f, 1, 3) == 0);
    CHECK(llama_set_adapter_cvec(f.ctx, nullptr, 0, f.n_embd, -1, -1) == 0);
    CHECK(same_bits(trace(f.ctx, PLAIN, nothing), expect(f.table(b, 0.7f), 1, 3)), "the commitment stays");
}

// Two contexts of one model do not see each other's commitment.
static void two_contexts() {
    fixture f;
    const auto v = f.vector(8);
    const auto w = f.vector(9);
    const schedule one_prompt = { { 12, 1 } };

    CHECK(f.set(v, 1.0f, 0, 3) == 0);
    const auto with_v = trace(f.ctx, one_prompt, nothing);
    CHECK(f.set(w, 0.5f, 0, 1) == 0);
    const auto with_w = trace(f.ctx, one_prompt, nothing);
    CHECK(llama_clear_commitment(f.ctx) == 0);
    const auto with_none = trace(f.ctx, one_prompt, nothing);
    CHECK(!same_bits(with_v, with_w) && !same_bits(with_v, with_none) && !same_bits(with_w, with_none));

    llama_context * other = new_context(f.model);
    llama_context * third = new_context(f.model);
    CHECK(f.set(v, 1.0f, 0, 3) == 0);
    CHECK(llama_set_commitment(other, w.data(), w.size(), f.n_embd, 0.5f, 0, 1) == 0);
    for (int round = 0; round < 3; round++) {
        CHECK(same_bits(trace(f.ctx, one_prompt, nothing), with_v));
        CHECK(same_bits(trace(other, one_prompt, nothing), with_w));
        CHECK(same_bits(trace(third, one_prompt, nothing), with_none));
    }
    CHECK(llama_clear_commitment(f.ctx) == 0);
    CHECK(same_bits(trace(other, one_prompt, nothing), with_w), "clearing one context leaves the other");
    llama_free(third);
    llama_free(other);
}

// The same from two threads at once: results equal the sequential ones.
static void two_threads() {
    fixture f;
    const auto v = f.vector(10);
    const schedule segments = { { 12, 1 }, { 4, 0 }, { 4, 0 } };

    const auto work = [&](float sign) {
        llama_context * ctx = new_context(f.model);
        std::vector<float> all;
        for (int round = 0; round < 8; round++) {
            const auto logits = trace(ctx, segments, [&](size_t i) {
                if (i == 0) { CHECK(llama_set_commitment(ctx, v.data(), v.size(), f.n_embd, sign*0.5f, 0, 3) == 0); }
                if (i == 1) { CHECK(llama_set_commitment_lambda(ctx, sign*(1.0f + 0.1f*round)) == 0); }
                if (i == 2) { CHECK(sign > 0 ? llama_set_commitment_range(ctx, 0, round % 4) == 0 : llama_clear_commitment(ctx) == 0); }
            });
            all.insert(all.end(), logits.begin(), logits.end());
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
    CHECK(same_bits(plus, plus_2));
    CHECK(same_bits(minus, minus_2));
}

// One model is loaded, committed, used and freed again and again while another decodes.
static void freed_beside() {
    fixture f;
    const auto v = f.vector(12);
    CHECK(f.set(v, 0.7f, 0, 3) == 0);
    const auto alone = trace(f.ctx, PLAIN, nothing);

    std::vector<float> beside, others;
    std::thread coming_and_going([&] {
        for (int round = 0; round < 6; round++) {
            fixture other;
            CHECK(other.set(v, 0.7f, 0, 3) == 0);
            others = trace(other.ctx, PLAIN, nothing);
        }
    });
    for (int round = 0; round < 6; round++) {
        CHECK(llama_set_commitment_lambda(f.ctx, 0.7f) == 0);
        beside = trace(f.ctx, PLAIN, nothing);
        CHECK(same_bits(alone, beside));
    }
    coming_and_going.join();
    CHECK(same_bits(alone, others));
}

// Bad input returns its code, logs its message, and changes nothing.
static void bad_input() {
    fixture f;
    const float nan = std::numeric_limits<float>::quiet_NaN();
    const float inf = std::numeric_limits<float>::infinity();
    const auto v = f.vector(11);
    auto with_nan = v, with_inf = v, huge = v;
    with_nan[f.n_embd - 1] = nan;
    with_inf[0]            = -inf;
    huge[1]                = std::numeric_limits<float>::max();
    std::vector<float> longer(v);
    longer.resize(2*v.size(), 1.0f);

    llama_context * ctx = f.ctx;
    const auto set = [&](const float * data, size_t len, int32_t n_embd, float lambda, int32_t start, int32_t end) {
        return llama_set_commitment(ctx, data, len, n_embd, lambda, start, end);
    };
    const int32_t n    = f.n_embd;
    const int32_t last = f.n_layer - 1;
    struct bad {
        const char *             what;
        int32_t                  code;
        std::function<int32_t()> call;
    };
    const std::vector<bad> always = {
        { "null context",        LLAMA_COMMITMENT_ERR_NULL_CONTEXT,      [&] { return llama_set_commitment(nullptr, v.data(), n, n, 1, 0, last); } },
        { "null context",        LLAMA_COMMITMENT_ERR_NULL_CONTEXT,      [&] { return llama_set_commitment_lambda(nullptr, 1); } },
        { "null context",        LLAMA_COMMITMENT_ERR_NULL_CONTEXT,      [&] { return llama_set_commitment_range(nullptr, 0, 0); } },
        { "null context",        LLAMA_COMMITMENT_ERR_NULL_CONTEXT,      [&] { return llama_clear_commitment(nullptr); } },
        { "null data",           LLAMA_COMMITMENT_ERR_NULL_DATA,         [&] { return set(nullptr, n, n, 1, 0, last); } },
        { "n_embd too small",    LLAMA_COMMITMENT_ERR_N_EMBD,            [&] { return set(v.data(), n - 1, n - 1, 1, 0, last); } },
        { "n_embd too large",    LLAMA_COMMITMENT_ERR_N_EMBD,            [&] { return set(longer.data(), 2*n, 2*n, 1, 0, last); } },
        { "n_embd 0",            LLAMA_COMMITMENT_ERR_N_EMBD,            [&] { return set(v.data(), 0, 0, 1, 0, last); } },
        { "n_embd negative",     LLAMA_COMMITMENT_ERR_N_EMBD,            [&] { return set(v.data(), n, -n, 1, 0, last); } },
        { "len too small",       LLAMA_COMMITMENT_ERR_LEN,               [&] { return set(v.data(), n - 1, n, 1, 0, last); } },
        { "a table of vectors",  LLAMA_COMMITMENT_ERR_LEN,               [&] { return set(longer.data(), 2*n, n, 1, 0, last); } },
        { "len 0",               LLAMA_COMMITMENT_ERR_LEN,               [&] { return set(v.data(), 0, n, 1, 0, last); } },
        { "NaN in data",         LLAMA_COMMITMENT_ERR_DATA_NOT_FINITE,   [&] { return set(with_nan.data(), n, n, 1, 0, last); } },
        { "NaN, lambda 0",       LLAMA_COMMITMENT_ERR_DATA_NOT_FINITE,   [&] { return set(with_nan.data(), n, n, 0, 0, last); } },
        { "infinity in data",    LLAMA_COMMITMENT_ERR_DATA_NOT_FINITE,   [&] { return set(with_inf.data(), n, n, 1, 0, last); } },
        { "lambda NaN",          LLAMA_COMMITMENT_ERR_LAMBDA_NOT_FINITE, [&] { return set(v.data(), n, n, nan, 0, last); } },
        { "lambda infinite",     LLAMA_COMMITMENT_ERR_LAMBDA_NOT_FINITE, [&] { return set(v.data(), n, n, -inf, 0, last); } },
        { "product overflows",   LLAMA_COMMITMENT_ERR_OVERFLOW,          [&] { return set(huge.data(), n, n, 2, 0, last); } },
        { "range reversed",      LLAMA_COMMITMENT_ERR_RANGE,             [&] { return set(v.data(), n, n, 1, 2, 1); } },
        { "range negative",      LLAMA_COMMITMENT_ERR_RANGE,             [&] { return set(v.data(), n, n, 1, -1, 1); } },
        { "range all negative",  LLAMA_COMMITMENT_ERR_RANGE,             [&] { return set(v.data(), n, n, 1, -1, -1); } },
        { "range beyond",        LLAMA_COMMITMENT_ERR_RANGE_BEYOND,      [&] { return set(v.data(), n, n, 1, 0, last + 1); } },
        { "range beyond",        LLAMA_COMMITMENT_ERR_RANGE_BEYOND,      [&] { return set(v.data(), n, n, 1, 0, INT32_MAX); } },
    };
    const std::vector<bad> not_set = {
        { "lambda, not set",     LLAMA_COMMITMENT_ERR_NOT_SET,           [&] { return llama_set_commitment_lambda(ctx, 1); } },
        { "range, not set",      LLAMA_COMMITMENT_ERR_NOT_SET,           [&] { return llama_set_commitment_range(ctx, 0, last); } },
    };
    const std::vector<bad> when_set = {
        { "lambda NaN",          LLAMA_COMMITMENT_ERR_LAMBDA_NOT_FINITE, [&] { return llama_set_commitment_lambda(ctx, nan); } },
        { "lambda infinite",     LLAMA_COMMITMENT_ERR_LAMBDA_NOT_FINITE, [&] { return llama_set_commitment_lambda(ctx, inf); } },
        { "product overflows",   LLAMA_COMMITMENT_ERR_OVERFLOW,          [&] { return llama_set_commitment_lambda(ctx, std::numeric_limits<float>::max()); } },
        { "range reversed",      LLAMA_COMMITMENT_ERR_RANGE,             [&] { return llama_set_commitment_range(ctx, 1, 0); } },
        { "range negative",      LLAMA_COMMITMENT_ERR_RANGE,             [&] { return llama_set_commitment_range(ctx, -1, last); } },
        { "range beyond",        LLAMA_COMMITMENT_ERR_RANGE_BEYOND,      [&] { return llama_set_commitment_range(ctx, 0, last + 1); } },
    };
    const auto attempt = [&](const std::vector<bad> & calls) {
        for (const bad & b : calls) {
            last_log.clear();
            const int32_t code = b.call();
            CHECK(code == b.code, "%s: returned %d, expected %d", b.what, code, b.code);
            CHECK(last_log.find(llama_commitment_error(code)) != std::string::npos, "%s: not logged", b.what);
        }
    };

    const schedule segments = { { 12, 1 }, { 5, 0 }, { 5, 0 } };

    // with nothing set, bad calls between decodes leave the logits of the unpatched library
    const auto stock = reference(segments);
    CHECK(same_bits(trace(ctx, segments, [&](size_t) { attempt(always); attempt(not_set); }), stock));

    // with a commitment, they leave its logits
    std::vector<float> big(n, 0.0f); // so large that a larger lambda overflows, in one direction only
    for (int32_t j = 0; j < n; j++) {
        big[j] = 10.0f*v[j];
    }
    CHECK(f.set(big, 0.1f, 0, last) == 0);
    const auto committed = trace(ctx, segments, nothing);
    CHECK(!same_bits(committed, stock));
    const int32_t reused_before = llama_perf_context(ctx).n_reused;
    CHECK(same_bits(trace(ctx, segments, [&](size_t) { attempt(always); attempt(when_set); }), committed));
    CHECK(llama_perf_context(ctx).n_reused > reused_before, "an error must not cost a new graph");

    // every status has a message of its own
    std::set<std::string> messages;
    for (int32_t code = LLAMA_COMMITMENT_OK; code >= LLAMA_COMMITMENT_ERR_INTERNAL; code--) {
        messages.insert(llama_commitment_error(code));
    }
    CHECK(messages.size() == size_t(1 - LLAMA_COMMITMENT_ERR_INTERNAL));
    CHECK(messages.count(llama_commitment_error(-1000)) == 0 && messages.count(llama_commitment_error(1)) == 0);
}

// An architecture that never calls build_cvec: an error, rather than a commitment without effect.
static void unsupported() {
    fixture f;
    CHECK(f.set(f.vector(12), 1.0f, 0, 3) == LLAMA_COMMITMENT_ERR_UNSUPPORTED);
    CHECK(last_log.find(llama_commitment_error(LLAMA_COMMITMENT_ERR_UNSUPPORTED)) != std::string::npos);
    CHECK(llama_set_commitment_lambda(f.ctx, 1.0f) == LLAMA_COMMITMENT_ERR_NOT_SET);
    CHECK(llama_clear_commitment(f.ctx) == LLAMA_COMMITMENT_OK);
}

int main(int argc, char ** argv) {
    CHECK(argc == 5);
    MODEL      = argv[2];
    REFERENCE  = argv[3];
    TINY_MODEL = argv[4];
    keep_last_error();

    static const test_case cases[] = {
        { "off_is_stock", off_is_stock },
        { "equals_control_vector", equals_control_vector },
        { "equals_bias", equals_bias },
        { "takes_effect_at_once", takes_effect_at_once },
        { "adds_to_control_vector", adds_to_control_vector },
        { "two_contexts", two_contexts },
        { "two_threads", two_threads },
        { "freed_beside", freed_beside },
        { "bad_input", bad_input },
        { "unsupported", unsupported },
    };
    return run_case(cases, argv[1]);
}
