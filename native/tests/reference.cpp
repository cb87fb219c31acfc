// lablog-reference MODEL SCHEDULE OUT: the logits of the unpatched library, as raw floats.

#include "trace.h"

int main(int argc, char ** argv) {
    CHECK(argc == 4);
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);

    const schedule  segments = load(argv[2]);
    llama_model *   model    = load_model(argv[1]);
    llama_context * ctx      = new_context(model);
    const std::vector<float> logits = trace(ctx, segments, [&](size_t i) {
        const segment & s = segments[i];
        CHECK(llama_set_adapter_cvec(ctx, s.table.empty() ? nullptr : s.table.data(), s.table.size(),
                                     llama_model_n_embd(model), s.il_start, s.il_end) == 0);
    });
    llama_free(ctx);
    llama_model_free(model);

    std::ofstream file(argv[3], std::ios::binary);
    file.write((const char *) logits.data(), std::streamsize(logits.size()*sizeof(float)));
    CHECK(file.flush().good());
    return 0;
}
