// Damaged control vectors for llama.cpp's GGUF reader and ours, under libFuzzer (make fuzz) or, one
// file after the other, from the saved corpus (the native tests):
//
//   fuzz-control-vector FOLDER -runs=1000000        (built with -DLABLOG_FUZZ=ON, by Clang)
//   replay-control-vector FILE...

#include "control_vector.h"

#include <cstdint>
#include <fstream>
#include <iterator>

static const int32_t N_EMBD = 8, N_LAYER = 4;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    const auto read = [&](size_t at, float * out, size_t n) {
        if (at > size || size - at < n*sizeof(float)) {
            return false;
        }
        std::memcpy(out, data + at, n*sizeof(float));
        return true;
    };
    gguf_context * gguf = gguf_init_from_buffer(data, size, { /*.no_alloc =*/ true, /*.ctx =*/ nullptr });
    if (gguf) {
        control_vector found;
        const std::string wrong = read_control_vector(gguf, read, N_EMBD, N_LAYER, 0.5f, found);
        if (wrong.empty() && (found.n_directions < 1 || !std::isfinite(found.sum_of_norms))) {
            std::abort();
        }
    }
    gguf_free(gguf);
    return 0;
}

#if !defined(LABLOG_LIBFUZZER)
int main(int argc, char ** argv) {
    for (int i = 1; i < argc; i++) {
        std::ifstream file(argv[i], std::ios::binary);
        if (!file) {
            std::fprintf(stderr, "cannot read %s\n", argv[i]);
            return 1;
        }
        const std::string data((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
        LLVMFuzzerTestOneInput((const uint8_t *) data.data(), data.size());
    }
    std::printf("%d files\n", argc - 1);
    return argc > 1 ? 0 : 1;
}
#endif
