// llama-commit: run a prompt through a model that carries a commitment.
//
// The text goes to stdout, everything else to stderr. Exit codes: 0 done, 1 failed while running,
// 2 bad input (one line says which, and what to do). Only llama.cpp's public API is used.

#include "commitment.h"
#include "control_vector.h"

#include "llama.h"

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

static const char HELP[] = R"(llama-commit - run a prompt through a model that carries a commitment

A commitment z* ~ N(0, I/k) is sampled once; lambda * W_c z* is then added to the residual
stream at the end of every layer in a range, at every position. One seed is one commitment.

  llama-commit --model model.gguf --prompt "My favourite colour is" --seed 7 --lambda 0.1

Run it again with --seed 8 for another commitment, or with --lambda 0 for the plain model.

  --model FILE            model in GGUF format (required)
  --prompt TEXT           what the model continues (required)
  --seed N                seed of the commitment, and of the token sampler            [0]
  --k N                   dimension of z*                                             [64]
  --lambda X              strength; 0 is bit-identical to no commitment               [0.01]
  --layers START:END      layers that receive it, 0-based, both inclusive, or 'all'   [all]
  --control-vector FILE   GGUF control vector (tensors direction.1, direction.2, ...)
                          in place of a sampled commitment; --lambda is then          [1]
  --n-predict N           tokens to generate                                          [64]
  --temperature X         0 is greedy: always the most likely token                   [0]
  --threads N             CPU threads                                                 [all cores]
  --help                  this text

Text is written to stdout, messages to stderr. Exit code 2: bad input, 1: failed while running.
)";

// --- errors

[[noreturn]] static void fail(int code, const char * format, ...) {
    va_list args;
    va_start(args, format);
    std::fflush(stdout);
    std::fprintf(stderr, "llama-commit: error: ");
    std::vfprintf(stderr, format, args);
    std::fprintf(stderr, "\n");
    va_end(args);
    std::exit(code);
}

#define BAD_INPUT(...) fail(2, __VA_ARGS__)
#define FAILED(...)    fail(1, __VA_ARGS__)

// llama.cpp reports one failure in several lines. The first one says what happened: it becomes part
// of our one line, all others stay silent.
static std::string first_error;

static void keep_first_error(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR && first_error.empty()) {
        first_error = text;
        while (!first_error.empty() && first_error.back() == '\n') {
            first_error.pop_back();
        }
    }
}

// --- command line

struct options {
    std::string model;
    std::string prompt;
    std::string control_vector;
    std::string layers        = "all";
    uint64_t    seed          = 0;
    int32_t     k             = 64;
    float       lambda        = 0.01f;
    int32_t     n_predict     = 64;
    float       temperature   = 0.0f;
    int32_t     n_threads     = std::max(1u, std::thread::hardware_concurrency());
};

static uint64_t parse_seed(const char * flag, const char * text) {
    char * end = nullptr;
    errno = 0;
    const unsigned long long value = std::strtoull(text, &end, 10);
    if (text[0] < '0' || text[0] > '9' || *end || errno) {
        BAD_INPUT("%s expects a whole number from 0 to 2^64 - 1, not '%s'", flag, text);
    }
    return value;
}

static int32_t parse_int(const char * flag, const char * text, int32_t min) {
    char * end = nullptr;
    errno = 0;
    const long long value = std::strtoll(text, &end, 10);
    if (end == text || *end || errno || value < min || value > INT32_MAX) {
        BAD_INPUT("%s expects a whole number of at least %d, not '%s'", flag, min, text);
    }
    return int32_t(value);
}

static float parse_float(const char * flag, const char * text) {
    char * end = nullptr;
    const float value = std::strtof(text, &end);
    if (end == text || *end || !std::isfinite(value)) {
        BAD_INPUT("%s expects a finite number, not '%s'", flag, text);
    }
    return value;
}

static options parse(int argc, char ** argv) {
    options o;
    bool has_prompt = false;
    bool has_k      = false;
    bool has_lambda = false;

    for (int i = 1; i < argc; i++) {
        const std::string flag = argv[i];
        if (flag == "--help" || flag == "-h") {
            std::fputs(HELP, stdout);
            std::exit(0);
        }

        static const char * flags[] = { "--model", "--prompt", "--seed", "--k", "--lambda", "--layers",
                                        "--control-vector", "--n-predict", "--temperature", "--threads" };
        bool known = false;
        for (const char * f : flags) {
            known = known || flag == f;
        }
        if (!known) {
            BAD_INPUT("unknown option '%s': --help lists the options", flag.c_str());
        }
        if (i + 1 == argc) {
            BAD_INPUT("%s expects a value", flag.c_str());
        }

        const char * value = argv[++i];
        if      (flag == "--model")          { o.model          = value; }
        else if (flag == "--prompt")         { o.prompt         = value;  has_prompt = true; }
        else if (flag == "--layers")         { o.layers         = value; }
        else if (flag == "--control-vector") { o.control_vector = value; }
        else if (flag == "--seed")           { o.seed           = parse_seed (argv[i - 1], value); }
        else if (flag == "--k")              { o.k              = parse_int  (argv[i - 1], value, 1); has_k = true; }
        else if (flag == "--lambda")         { o.lambda         = parse_float(argv[i - 1], value);    has_lambda = true; }
        else if (flag == "--n-predict")      { o.n_predict      = parse_int  (argv[i - 1], value, 1); }
        else if (flag == "--temperature")    { o.temperature    = parse_float(argv[i - 1], value); }
        else if (flag == "--threads")        { o.n_threads      = parse_int  (argv[i - 1], value, 1); }
    }

    if (o.model.empty()) {
        BAD_INPUT("--model is missing: name a model in GGUF format, --help shows an example");
    }
    if (!has_prompt) {
        BAD_INPUT("--prompt is missing: give the text that the model continues, --help shows an example");
    }
    if (o.temperature < 0.0f) {
        BAD_INPUT("--temperature must not be negative: 0 is greedy");
    }
    if (!o.control_vector.empty()) {
        if (has_k) {
            BAD_INPUT("--k and --control-vector exclude each other: a control vector is read, not sampled");
        }
        if (!has_lambda) {
            o.lambda = 1.0f;
        }
    }
    return o;
}

struct layer_range {
    int32_t start;
    int32_t end;
};

// first: the first layer that can be chosen, which a control vector shifts to 1
static layer_range parse_layers(const std::string & text, int32_t first, int32_t n_layer) {
    if (text == "all") {
        return { first, n_layer - 1 };
    }
    const size_t colon = text.find(':');
    if (colon == std::string::npos) {
        BAD_INPUT("--layers expects START:END or 'all', not '%s'", text.c_str());
    }
    const layer_range r = { parse_int("START of --layers", text.substr(0, colon).c_str(), 0),
                            parse_int("END of --layers", text.substr(colon + 1).c_str(), 0) };
    if (r.start > r.end) {
        BAD_INPUT("--layers %s is reversed: START must not be greater than END", text.c_str());
    }
    if (r.end >= n_layer) {
        BAD_INPUT("--layers %s ends beyond the model: its last layer is %d", text.c_str(), n_layer - 1);
    }
    if (r.start < first) {
        BAD_INPUT("--layers %s: a control vector cannot touch layer 0, start at layer 1", text.c_str());
    }
    return r;
}

static double norm(const float * v, size_t n) {
    double sum = 0.0;
    for (size_t i = 0; i < n; i++) {
        sum += double(v[i])*v[i];
    }
    return std::sqrt(sum);
}

// --- the two kinds of vectors

static void commit(llama_context * ctx, const llama_model * model, const options & o) {
    const int32_t n_embd = llama_model_n_embd(model);
    const layer_range layers = parse_layers(o.layers, 0, llama_model_n_layer(model));

    std::vector<float> direction(n_embd);
    if (const int32_t code = commitment_sample(o.seed, o.k, n_embd, nullptr, nullptr, direction.data())) {
        BAD_INPUT("%s", commitment_error(code));
    }
    if (const int32_t code = llama_set_commitment(ctx, direction.data(), direction.size(), n_embd, o.lambda, layers.start, layers.end)) {
        BAD_INPUT("%s", llama_commitment_error(code));
    }
    std::fprintf(stderr, "commitment initialised once: k=%d seed=%llu |W_c z*|=%.4g lambda=%g layers %d..%d\n",
        o.k, (unsigned long long) o.seed, norm(direction.data(), n_embd), double(o.lambda), layers.start, layers.end);
}

static void control(llama_context * ctx, const llama_model * model, const options & o) {
    const int32_t n_embd  = llama_model_n_embd(model);
    const int32_t n_layer = llama_model_n_layer(model);
    const char *  path    = o.control_vector.c_str();
    const layer_range layers = parse_layers(o.layers, 1, n_layer);

    std::unique_ptr<FILE, int (*)(FILE *)> file(std::fopen(path, "rb"), std::fclose);
    if (!file) {
        BAD_INPUT("cannot read the control vector '%s': %s", path, std::strerror(errno));
    }
    std::unique_ptr<gguf_context, void (*)(gguf_context *)> gguf(
        gguf_init_from_file(path, { /*.no_alloc =*/ true, /*.ctx =*/ nullptr }), gguf_free);
    if (!gguf) {
        BAD_INPUT("'%s' is not a readable GGUF file (%s)", path, first_error.c_str());
    }
    const auto read = [&](size_t at, float * out, size_t n) {
        return at <= size_t(LONG_MAX) && std::fseek(file.get(), long(at), SEEK_SET) == 0 && std::fread(out, sizeof(float), n, file.get()) == n;
    };

    control_vector found;
    const std::string wrong = read_control_vector(gguf.get(), read, n_embd, n_layer, o.lambda, found);
    if (!wrong.empty()) {
        BAD_INPUT("'%s'%s", path, wrong.c_str());
    }

    if (llama_set_adapter_cvec(ctx, found.table.data(), found.table.size(), n_embd, layers.start, layers.end) != 0) {
        BAD_INPUT("llama.cpp refused the control vector '%s' (%s)", path, first_error.c_str());
    }
    std::fprintf(stderr, "control vector initialised once: %s directions=%d mean |v|=%.4g lambda=%g layers %d..%d\n",
        path, found.n_directions, found.sum_of_norms/found.n_directions, double(o.lambda), layers.start, layers.end);
}

// --- generation

static std::vector<llama_token> tokenize(const llama_vocab * vocab, const std::string & text) {
    std::vector<llama_token> tokens(text.size() + 8);
    int32_t n = llama_tokenize(vocab, text.data(), int32_t(text.size()), tokens.data(), int32_t(tokens.size()), true, true);
    if (n < 0) { // the number of tokens that are needed
        tokens.resize(-n);
        n = llama_tokenize(vocab, text.data(), int32_t(text.size()), tokens.data(), int32_t(tokens.size()), true, true);
    }
    tokens.resize(std::max(n, 0));
    return tokens;
}

static std::string piece(const llama_vocab * vocab, llama_token token) {
    std::string text(256, '\0');
    int32_t n = llama_token_to_piece(vocab, token, &text[0], int32_t(text.size()), 0, false);
    if (n < 0) {
        text.resize(-n);
        n = llama_token_to_piece(vocab, token, &text[0], int32_t(text.size()), 0, false);
    }
    text.resize(std::max(n, 0));
    return text;
}

int main(int argc, char ** argv) {
    const options o = parse(argc, argv);

    llama_log_set(keep_first_error, nullptr);
    llama_backend_init();

    if (FILE * file = std::fopen(o.model.c_str(), "rb")) {
        std::fclose(file);
    } else {
        BAD_INPUT("cannot read the model '%s': %s", o.model.c_str(), std::strerror(errno));
    }
    std::unique_ptr<llama_model, void (*)(llama_model *)> model(
        llama_model_load_from_file(o.model.c_str(), llama_model_default_params()), llama_model_free);
    if (!model) {
        BAD_INPUT("cannot load the model '%s' (%s)", o.model.c_str(), first_error.c_str());
    }
    if (llama_model_has_encoder(model.get()) || !llama_model_has_decoder(model.get())) {
        BAD_INPUT("'%s' is not a decoder-only language model", o.model.c_str());
    }

    const llama_vocab * vocab = llama_model_get_vocab(model.get());
    std::vector<llama_token> tokens = tokenize(vocab, o.prompt);
    if (tokens.empty()) {
        BAD_INPUT("the prompt has no tokens: give at least one character");
    }
    const int64_t n_ctx = int64_t(tokens.size()) + o.n_predict;
    if (n_ctx > llama_model_n_ctx_train(model.get())) {
        BAD_INPUT("prompt (%zu tokens) and --n-predict %d exceed the %d positions of this model: shorten one of them",
            tokens.size(), o.n_predict, llama_model_n_ctx_train(model.get()));
    }

    llama_context_params params = llama_context_default_params();
    params.n_ctx           = uint32_t(n_ctx);
    params.n_batch         = uint32_t(n_ctx); // the whole prompt in one call
    params.n_threads       = o.n_threads;
    params.n_threads_batch = o.n_threads;
    std::unique_ptr<llama_context, void (*)(llama_context *)> ctx(llama_init_from_model(model.get(), params), llama_free);
    if (!ctx) {
        FAILED("cannot create a context of %lld tokens (%s)", (long long) n_ctx, first_error.c_str());
    }

    if (o.control_vector.empty()) {
        commit(ctx.get(), model.get(), o);
    } else {
        control(ctx.get(), model.get(), o);
    }

    std::unique_ptr<llama_sampler, void (*)(llama_sampler *)> sampler(
        llama_sampler_chain_init(llama_sampler_chain_default_params()), llama_sampler_free);
    if (o.temperature == 0.0f) {
        llama_sampler_chain_add(sampler.get(), llama_sampler_init_greedy());
    } else {
        uint32_t seed = uint32_t(o.seed ^ o.seed >> 32);
        if (seed == LLAMA_DEFAULT_SEED) { // would mean "draw a seed"
            seed = 0;
        }
        llama_sampler_chain_add(sampler.get(), llama_sampler_init_temp(o.temperature));
        llama_sampler_chain_add(sampler.get(), llama_sampler_init_dist(seed));
    }

    llama_batch batch = llama_batch_get_one(tokens.data(), int32_t(tokens.size()));
    llama_token token;
    for (int32_t i = 0; i < o.n_predict; i++) {
        if (llama_decode(ctx.get(), batch) != 0) {
            FAILED("decoding failed at token %d (%s)", i, first_error.c_str());
        }
        token = llama_sampler_sample(sampler.get(), ctx.get(), -1);
        if (llama_vocab_is_eog(vocab, token)) {
            break;
        }
        const std::string text = piece(vocab, token);
        std::fwrite(text.data(), 1, text.size(), stdout);
        std::fflush(stdout);
        batch = llama_batch_get_one(&token, 1);
    }
    std::printf("\n");

    return std::fflush(stdout) == 0 && !std::ferror(stdout) ? 0 : 1;
}
