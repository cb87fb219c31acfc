// lablog-reference MODEL SCHEDULE OUT: the logits of the unpatched library, as raw floats, and in OUT.state
// its state after that.
//
// lablog-reference MODEL restore STATE SESSION: whether the unpatched library accepts these files, as two words.

#include "trace.h"

int main(int argc, char ** argv) {
    CHECK(argc == 4 || argc == 5);
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);

    if (argc == 5) {
        llama_model *   model = load_model(argv[1]);
        llama_context * ctx   = new_context(model);
        const auto state = read_file(argv[3]);
        llama_token token = 0;
        size_t n = 0;
        const bool data = llama_state_set_data(ctx, state.data(), state.size()) != 0;
        const bool file = llama_state_load_file(ctx, argv[4], &token, 1, &n);
        std::printf("%s %s\n", data ? "accepted" : "refused", file ? "accepted" : "refused");
        llama_free(ctx);
        llama_model_free(model);
        return 0;
    }

    const schedule  segments = load(argv[2]);
    llama_model *   model    = load_model(argv[1]);
    llama_context * ctx      = new_context(model);
    const std::vector<float> logits = trace(ctx, segments, [&](size_t i) {
        const segment & s = segments[i];
        CHECK(llama_set_adapter_cvec(ctx, s.table.empty() ? nullptr : s.table.data(), s.table.size(),
                                     llama_model_n_embd(model), s.il_start, s.il_end) == 0);
    });
    write_file(std::string(argv[3]) + ".state", state_of(ctx));
    llama_free(ctx);
    llama_model_free(model);

    std::ofstream file(argv[3], std::ios::binary);
    file.write((const char *) logits.data(), std::streamsize(logits.size()*sizeof(float)));
    CHECK(file.flush().good());
    return 0;
}
