// tiny-model ARCH OUT.gguf [BIAS.f32 START END]
//
// Writes a language model with random weights and a byte vocabulary, small enough to need neither a
// download nor a training: ARCH is llama (RMSNorm, rotary positions, gated feed-forward), gpt2
// (LayerNorm with biases, learned positions, fused QKV), olmoe (a mixture of experts), mamba (a
// recurrent state instead of a KV cache), or eurobert (an encoder, which has no place for a commitment).
//
// BIAS.f32 (n_embd raw floats; llama and gpt2) is added to the output bias of the feed-forward of the
// layers START..END. That is the same function as a commitment there, written by other means, which makes
// it an independent reference: the only one there is for layer 0.

#include "ggml.h"
#include "gguf.h"

#include "philox_normal.h"

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

static const int N_EMBD = 64, N_LAYER = 4, N_HEAD = 4, N_FF = 160, N_CTX = 256;
static const int N_EXPERT = 4, N_EXPERT_USED = 2;
static const int D_CONV = 4, D_INNER = 2*N_EMBD, D_STATE = 8, DT_RANK = 4;

struct writer {
    gguf_context * gguf = gguf_init_empty();
    ggml_context * ctx  = ggml_init({ size_t(64) << 20, nullptr, false });
    uint32_t       n    = 0; // each tensor has its own stream of random numbers

    ~writer() {
        gguf_free(gguf);
        ggml_free(ctx);
    }

    // mean + deviation * N(0, 1), plus the extra vector if there is one
    void add(const std::string & name, int64_t ne0, int64_t ne1, float mean, float deviation, const std::vector<float> & extra = {}, int64_t ne2 = 1) {
        ggml_tensor * t = ne1 ? ggml_new_tensor_3d(ctx, GGML_TYPE_F32, ne0, ne1, ne2) : ggml_new_tensor_1d(ctx, GGML_TYPE_F32, ne0);
        ggml_set_name(t, name.c_str());
        float * data = (float *) t->data;
        for (int64_t i = 0; i < ggml_nelements(t); i++) {
            data[i] = float(mean + deviation*philox_normal(2026, n, uint64_t(i))) + (extra.empty() ? 0.0f : extra[i]);
        }
        n++;
        gguf_add_tensor(gguf, t);
    }

    void matrix(const std::string & name, int64_t in, int64_t out, int64_t n = 1) { add(name, in, out, 0.0f, 1.0f/std::sqrt(float(in)), {}, n); }
};

static void vocabulary(gguf_context * gguf) {
    std::vector<std::string> text = { "<unk>", "<s>", "</s>" };
    std::vector<int32_t>     type = { 2, 3, 3 }; // unknown, control, control
    for (int i = 0; i < 256; i++) {
        char byte[8];
        std::snprintf(byte, sizeof(byte), "<0x%02X>", i);
        text.push_back(byte);
        type.push_back(6); // byte
    }
    text.push_back("\xE2\x96\x81"); // SentencePiece's space
    type.push_back(1);
    for (char c = 'a'; c <= 'z'; c++) {
        text.push_back(std::string(1, c));
        type.push_back(1);
    }
    std::vector<float>        score(text.size(), 0.0f);
    std::vector<const char *> text_ptr;
    for (const std::string & t : text) {
        text_ptr.push_back(t.c_str());
    }
    gguf_set_val_str (gguf, "tokenizer.ggml.model", "llama");
    gguf_set_arr_str (gguf, "tokenizer.ggml.tokens", text_ptr.data(), text_ptr.size());
    gguf_set_arr_data(gguf, "tokenizer.ggml.scores", GGUF_TYPE_FLOAT32, score.data(), score.size());
    gguf_set_arr_data(gguf, "tokenizer.ggml.token_type", GGUF_TYPE_INT32, type.data(), type.size());
    gguf_set_val_u32 (gguf, "tokenizer.ggml.unknown_token_id", 0);
    gguf_set_val_u32 (gguf, "tokenizer.ggml.bos_token_id", 1);
    gguf_set_val_u32 (gguf, "tokenizer.ggml.eos_token_id", 2);
}

int main(int argc, char ** argv) {
    const std::string arch = argc > 1 ? argv[1] : "";
    const bool known = arch == "llama" || arch == "gpt2" || arch == "olmoe" || arch == "mamba" || arch == "eurobert";
    if ((argc != 3 && argc != 6) || !known) {
        std::fprintf(stderr, "usage: tiny-model llama|gpt2|olmoe|mamba|eurobert OUT.gguf [BIAS.f32 START END]\n");
        return 2;
    }
    const int n_head_kv = arch == "olmoe" ? N_HEAD : N_HEAD/2;
    std::vector<float> bias(N_EMBD, 0.0f);
    int start = 0, end = -1;
    if (argc == 6) {
        std::ifstream file(argv[3], std::ios::binary);
        if (!file.read((char *) bias.data(), N_EMBD*sizeof(float))) {
            std::fprintf(stderr, "cannot read %s\n", argv[3]);
            return 2;
        }
        start = std::atoi(argv[4]);
        end   = std::atoi(argv[5]);
    }

    writer w;
    gguf_set_val_str(w.gguf, "general.architecture", arch.c_str());
    gguf_set_val_u32(w.gguf, (arch + ".context_length").c_str(), N_CTX);
    gguf_set_val_u32(w.gguf, (arch + ".embedding_length").c_str(), N_EMBD);
    gguf_set_val_u32(w.gguf, (arch + ".block_count").c_str(), N_LAYER);
    gguf_set_val_u32(w.gguf, (arch + ".feed_forward_length").c_str(), N_FF);
    gguf_set_val_u32(w.gguf, (arch + ".attention.head_count").c_str(), N_HEAD);
    vocabulary(w.gguf);
    const int n_vocab = 3 + 256 + 27;

    w.add("token_embd.weight", N_EMBD, n_vocab, 0.0f, 1.0f);
    w.add("output_norm.weight", N_EMBD, 0, 1.0f, 0.1f);
    if (arch != "eurobert") {
        w.matrix("output.weight", N_EMBD, n_vocab);
    }

    const std::vector<float> none(N_EMBD, 0.0f);
    for (int il = 0; il < N_LAYER; il++) {
        const std::string blk = "blk." + std::to_string(il) + ".";
        const std::vector<float> & extra = il >= start && il <= end ? bias : none;

        w.add(blk + "attn_norm.weight", N_EMBD, 0, 1.0f, 0.1f);
        if (arch == "mamba") {
            w.matrix(blk + "ssm_in.weight", N_EMBD, 2*D_INNER);
            w.matrix(blk + "ssm_conv1d.weight", D_CONV, D_INNER);
            w.add(blk + "ssm_conv1d.bias", D_INNER, 0, 0.0f, 0.1f);
            w.matrix(blk + "ssm_x.weight", D_INNER, DT_RANK + 2*D_STATE);
            w.matrix(blk + "ssm_dt.weight", DT_RANK, D_INNER);
            w.add(blk + "ssm_dt.bias", D_INNER, 0, -1.0f, 0.1f);
            w.add(blk + "ssm_a", D_STATE, D_INNER, -1.0f, 0.1f); // negative: the state decays
            w.add(blk + "ssm_d", D_INNER, 0, 1.0f, 0.1f);
            w.matrix(blk + "ssm_out.weight", D_INNER, N_EMBD);
            continue;
        }
        w.add(blk + "ffn_norm.weight", N_EMBD, 0, 1.0f, 0.1f);
        w.matrix(blk + "attn_output.weight", N_EMBD, N_EMBD);
        if (arch != "olmoe") {
            w.matrix(blk + "ffn_up.weight", N_EMBD, N_FF);
            w.matrix(blk + "ffn_down.weight", N_FF, N_EMBD);
        }
        if (arch != "gpt2") {
            w.matrix(blk + "attn_q.weight", N_EMBD, N_EMBD);
            w.matrix(blk + "attn_k.weight", N_EMBD, N_EMBD/N_HEAD*n_head_kv);
            w.matrix(blk + "attn_v.weight", N_EMBD, N_EMBD/N_HEAD*n_head_kv);
            if (arch == "olmoe") {
                w.add(blk + "attn_q_norm.weight", N_EMBD, 0, 1.0f, 0.1f);
                w.add(blk + "attn_k_norm.weight", N_EMBD, 0, 1.0f, 0.1f);
                w.matrix(blk + "ffn_gate_inp.weight", N_EMBD, N_EXPERT);
                w.matrix(blk + "ffn_gate_exps.weight", N_EMBD, N_FF, N_EXPERT);
                w.matrix(blk + "ffn_up_exps.weight", N_EMBD, N_FF, N_EXPERT);
                w.matrix(blk + "ffn_down_exps.weight", N_FF, N_EMBD, N_EXPERT);
                continue;
            }
            w.matrix(blk + "ffn_gate.weight", N_EMBD, N_FF);
            if (arch == "llama") {
                w.add(blk + "ffn_down.bias", N_EMBD, 0, 0.0f, 0.1f, extra);
            }
        } else {
            w.matrix(blk + "attn_qkv.weight", N_EMBD, 3*N_EMBD);
            w.add(blk + "attn_qkv.bias", 3*N_EMBD, 0, 0.0f, 0.1f);
            w.add(blk + "attn_norm.bias", N_EMBD, 0, 0.0f, 0.1f);
            w.add(blk + "ffn_norm.bias", N_EMBD, 0, 0.0f, 0.1f);
            w.add(blk + "attn_output.bias", N_EMBD, 0, 0.0f, 0.1f);
            w.add(blk + "ffn_up.bias", N_FF, 0, 0.0f, 0.1f);
            w.add(blk + "ffn_down.bias", N_EMBD, 0, 0.0f, 0.1f, extra);
        }
    }
    if (arch == "olmoe") {
        gguf_set_val_u32(w.gguf, "olmoe.expert_count", N_EXPERT);
        gguf_set_val_u32(w.gguf, "olmoe.expert_used_count", N_EXPERT_USED);
    }
    if (arch == "mamba") {
        gguf_set_val_u32(w.gguf, "mamba.ssm.conv_kernel", D_CONV);
        gguf_set_val_u32(w.gguf, "mamba.ssm.inner_size", D_INNER);
        gguf_set_val_u32(w.gguf, "mamba.ssm.state_size", D_STATE);
        gguf_set_val_u32(w.gguf, "mamba.ssm.time_step_rank", DT_RANK);
    }
    if (arch != "gpt2") {
        gguf_set_val_u32(w.gguf, (arch + ".attention.head_count_kv").c_str(), n_head_kv);
        gguf_set_val_f32(w.gguf, (arch + ".attention.layer_norm_rms_epsilon").c_str(), 1e-5f);
        gguf_set_val_u32(w.gguf, (arch + ".rope.dimension_count").c_str(), N_EMBD/N_HEAD);
    } else {
        gguf_set_val_f32(w.gguf, "gpt2.attention.layer_norm_epsilon", 1e-5f);
        w.add("output_norm.bias", N_EMBD, 0, 0.0f, 0.1f);
        w.add("position_embd.weight", N_EMBD, N_CTX, 0.0f, 0.1f);
    }

    if (!gguf_write_to_file(w.gguf, argv[2], false)) {
        std::fprintf(stderr, "cannot write %s\n", argv[2]);
        return 1;
    }
    return 0;
}
