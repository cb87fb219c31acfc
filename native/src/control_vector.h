// Control vectors in the community's layout (repeng, llama.cpp): general.architecture is
// controlvector, F32 tensors direction.N of n_embd numbers, N >= 1, applied behind layer N. Layers
// without a tensor get nothing.

#pragma once

#include "gguf.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

struct control_vector {
    std::vector<float> table;              // [n_layer - 1, n_embd], from layer 1 on, times lambda
    double             sum_of_norms = 0.0; // of the directions as they are
    int32_t            n_directions = 0;
};

// Read it for a model of that width and depth: what the file says of itself from `gguf`, numbers by
// `read` (position in the file, where to, how many floats; false where the file has no more), so that
// nothing is allocated because a file says that it is large. Returns what is wrong with it, in words that
// follow the file's name; nothing if it is right. Not a number of `out` is to be used otherwise.
inline std::string read_control_vector(const gguf_context * gguf, const std::function<bool(size_t, float *, size_t)> & read, int32_t n_embd, int32_t n_layer, float lambda, control_vector & out) {
    const int64_t arch = gguf_find_key(gguf, "general.architecture");
    if (arch < 0 || gguf_get_kv_type(gguf, arch) != GGUF_TYPE_STRING || std::strcmp(gguf_get_val_str(gguf, arch), "controlvector") != 0) {
        return " is not a control vector: its general.architecture must be 'controlvector'";
    }
    out.table.assign(size_t(n_embd)*(n_layer - 1), 0.0f);
    std::vector<float> v(n_embd);
    for (int64_t i = 0; i < gguf_get_n_tensors(gguf); i++) {
        const std::string name = gguf_get_tensor_name(gguf, i);
        if (name.compare(0, 10, "direction.") != 0) {
            return ": unexpected tensor '" + name + "', only direction.1, direction.2, ... belong in a control vector";
        }
        char *     end = nullptr;
        const long il  = std::strtol(name.c_str() + 10, &end, 10);
        if (*end || il < 1 || il >= n_layer) {
            return ": tensor '" + name + "' is for a layer outside 1.." + std::to_string(n_layer - 1) + " of this model";
        }
        if (gguf_get_tensor_type(gguf, i) != GGML_TYPE_F32 || gguf_get_tensor_size(gguf, i) != n_embd*sizeof(float)) {
            return ": tensor '" + name + "' must hold " + std::to_string(n_embd) + " F32 numbers, the width of this model";
        }
        if (!read(gguf_get_data_offset(gguf) + gguf_get_tensor_offset(gguf, i), v.data(), v.size())) {
            return " ends before tensor '" + name + "' does: copy it again";
        }
        double sum = 0.0;
        for (int32_t j = 0; j < n_embd; j++) {
            const float scaled = lambda*v[j];
            if (!std::isfinite(scaled)) {
                return ": lambda times tensor '" + name + "' is not finite";
            }
            sum += double(v[j])*v[j];
            out.table[size_t(il - 1)*n_embd + j] = scaled;
        }
        out.sum_of_norms += std::sqrt(sum);
        out.n_directions += 1;
    }
    return out.n_directions ? "" : " holds no direction.N tensor";
}
