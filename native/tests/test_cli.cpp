// llama-commit as a user meets it: test-cli CASE LLAMA_COMMIT MODEL

#include "check.h"

#include "ggml.h"
#include "gguf.h"

#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include <sys/wait.h>
#include <unistd.h>

static std::string PROGRAM, MODEL;

static std::string scratch(const std::string & suffix) {
    return MODEL + "." + std::to_string(getpid()) + suffix;
}

static std::string contents(const std::string & path) {
    std::ifstream file(path, std::ios::binary);
    return { std::istreambuf_iterator<char>(file), {} };
}

struct outcome {
    int         code;
    std::string out;
    std::string err;
};

static outcome cli(const std::string & arguments) {
    const std::string out = scratch(".out"), err = scratch(".err");
    const int status = std::system((PROGRAM + " " + arguments + " >" + out + " 2>" + err).c_str());
    outcome o { WIFEXITED(status) ? WEXITSTATUS(status) : -1, contents(out), contents(err) };
    std::remove(out.c_str());
    std::remove(err.c_str());
    return o;
}

static size_t count(const std::string & text, const std::string & part) {
    size_t n = 0;
    for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) {
        n++;
    }
    return n;
}

static std::string good(const std::string & extra) {
    const outcome o = cli("--model " + MODEL + " --prompt 'abc def' --n-predict 24 --threads 1 " + extra);
    CHECK(o.code == 0, "%s: %d %s", extra.c_str(), o.code, o.err.c_str());
    CHECK(count(o.err, "initialised once:") == 1 && count(o.err, "\n") == 1, "%s: %s", extra.c_str(), o.err.c_str());
    CHECK(!o.out.empty() && o.out.back() == '\n');
    return o.out;
}

// exit code 2, exactly one line that holds `part`, and nothing on stdout
static void bad(const std::string & arguments, const std::string & part) {
    const outcome o = cli(arguments);
    CHECK(o.code == 2, "%s: exit code %d, %s", arguments.c_str(), o.code, o.err.c_str());
    CHECK(count(o.err, "\n") == 1 && o.err.find("llama-commit: error: ") == 0, "%s: %s", arguments.c_str(), o.err.c_str());
    CHECK(o.err.find(part) != std::string::npos, "%s: '%s' is not in: %s", arguments.c_str(), part.c_str(), o.err.c_str());
    CHECK(o.out.empty());
}

// a control vector in the community's layout; each direction is `value` times (1, -1, 1, -1, ...)
static std::string control_file(const char * arch, const std::vector<std::string> & names, int64_t n_embd, float value) {
    const std::string path = scratch(".control.gguf");
    gguf_context * gguf = gguf_init_empty();
    ggml_context * ctx  = ggml_init({ size_t(1) << 20, nullptr, false });
    gguf_set_val_str(gguf, "general.architecture", arch);
    gguf_set_val_str(gguf, "controlvector.model_hint", "llama");
    gguf_set_val_u32(gguf, "controlvector.layer_count", uint32_t(names.size()));
    for (const std::string & name : names) {
        ggml_tensor * t = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_embd);
        ggml_set_name(t, name.c_str());
        for (int64_t i = 0; i < n_embd; i++) {
            ((float *) t->data)[i] = i % 2 ? -value : value;
        }
        gguf_add_tensor(gguf, t);
    }
    CHECK(gguf_write_to_file(gguf, path.c_str(), false));
    gguf_free(gguf);
    ggml_free(ctx);
    return path;
}

// --- cases

static void help() {
    const outcome o = cli("--help");
    CHECK(o.code == 0 && o.err.empty());
    for (const char * part : { "--model FILE", "--prompt TEXT", "--seed N", "--k N", "--lambda X", "--layers START:END", "--control-vector FILE",
                               "--n-predict N", "--temperature X", "--threads N", "llama-commit --model model.gguf --prompt" }) {
        CHECK(o.out.find(part) != std::string::npos, "%s", part);
    }
}

static void generates() {
    const std::string plain = good("--lambda 0");
    CHECK(good("--lambda 0 --seed 5 --k 8") == plain, "lambda 0 is the plain model, whatever the seed");
    CHECK(good("--lambda 0.000001") == plain, "a tiny lambda does not change the greedy text");

    const std::string seven = good("--lambda 2 --seed 7");
    CHECK(seven != plain && good("--lambda 2 --seed 7") == seven, "greedy text is reproducible");
    CHECK(good("--lambda 2 --seed 8") != seven, "another seed is another commitment");
    CHECK(good("--lambda 2 --seed 7 --layers all") == seven && good("--lambda 2 --seed 7 --layers 0:3") == seven);
    CHECK(good("--lambda 2 --seed 7 --layers 0:0") != seven);

    const std::string sampled = good("--lambda 0 --temperature 1 --seed 1");
    CHECK(sampled == good("--lambda 0 --temperature 1 --seed 1") && sampled != plain);
    CHECK(sampled != good("--lambda 0 --temperature 1 --seed 2"));

    const outcome o = cli("--model " + MODEL + " --prompt a --n-predict 1 --seed 7 --lambda 0.25 --layers 1:2");
    CHECK(o.err.find("commitment initialised once: k=64 seed=7 |W_c z*|=") == 0 && o.err.find(" lambda=0.25 layers 1..2\n") != std::string::npos,
          "%s", o.err.c_str());
}

static void control_vector() {
    const std::string plain = good("--lambda 0");
    const std::string file  = control_file("controlvector", { "direction.1", "direction.3" }, 64, 0.5f);
    const std::string with  = good("--control-vector " + file);
    CHECK(with != plain);
    CHECK(good("--control-vector " + file + " --lambda 1") == with, "lambda is 1 unless given");
    CHECK(good("--control-vector " + file + " --lambda 0") == plain);
    CHECK(good("--control-vector " + file + " --layers 2:2") == plain, "layer 2 has no direction");
    CHECK(good("--control-vector " + file + " --layers 3:3") != plain);
    control_file("controlvector", { "direction.1", "direction.3" }, 64, 0.25f);
    CHECK(good("--control-vector " + file + " --lambda 2") == with, "lambda scales the directions");

    const std::string run = "--model " + MODEL + " --prompt a --control-vector " + file;
    bad(run + " --layers 0:2", "cannot touch layer 0");
    bad(run + " --layers 1:4", "beyond the model");
    bad(run + " --k 64", "exclude each other");
    control_file("controlvector", { "direction.1" }, 32, 1.0f);
    bad(run, "64 F32 numbers");
    control_file("controlvector", { "direction.4" }, 64, 1.0f);
    bad(run, "outside 1..3");
    control_file("controlvector", { "direction.0" }, 64, 1.0f);
    bad(run, "outside 1..3");
    control_file("controlvector", { "blk.0.weight" }, 64, 1.0f);
    bad(run, "unexpected tensor");
    control_file("controlvector", {}, 64, 1.0f);
    bad(run, "no direction.N");
    control_file("controlvector", { "direction.1" }, 64, 3e38f);
    bad(run + " --lambda 10", "not finite");
    control_file("llama", { "direction.1" }, 64, 1.0f);
    bad(run, "general.architecture");

    // a file that says it is larger than any memory, and one that was cut off
    control_file("controlvector", { "direction.1" }, 64, 1.0f);
    const std::string whole = contents(file);
    std::string huge = whole;
    const size_t size = huge.find("direction.1") + 11 + sizeof(uint32_t); // behind the name: dimensions, size of the first
    huge[size + 6] = 1; // 2^48 more numbers
    std::ofstream(file, std::ios::binary) << huge;
    bad(run, "must hold 64 F32 numbers");
    std::ofstream(file, std::ios::binary) << whole.substr(0, whole.size() - 8);
    bad(run, "ends before tensor 'direction.1' does");
    std::ofstream(file) << "GGUF";
    bad(run, "not a readable GGUF file");
    std::remove(file.c_str());
    bad(run, "No such file");
}

static void bad_input() {
    const std::string run = "--model " + MODEL + " --prompt a ";
    bad("", "--model is missing");
    bad("--prompt a", "--model is missing");
    bad("--model " + MODEL, "--prompt is missing");
    bad(run + "--lamda 1", "unknown option '--lamda'");
    bad(run + "stray", "unknown option 'stray'");
    bad(run + "--lambda", "expects a value");
    bad(run + "--lambda nan", "finite number");
    bad(run + "--lambda inf", "finite number");
    bad(run + "--lambda 1e50", "finite number");
    bad(run + "--lambda 0.1x", "finite number");
    bad(run + "--lambda ''", "finite number");
    bad(run + "--k 0", "at least 1");
    bad(run + "--k -3", "at least 1");
    bad(run + "--k 1.5", "whole number");
    bad(run + "--k 99999999", "between 1 and 65536");
    bad(run + "--seed -1", "whole number");
    bad(run + "--seed 99999999999999999999999", "whole number");
    bad(run + "--layers 3:1", "reversed");
    bad(run + "--layers 0:4", "last layer is 3");
    bad(run + "--layers -1:2", "START of --layers");
    bad(run + "--layers 1", "START:END");
    bad(run + "--layers 1:", "END of --layers");
    bad(run + "--layers some", "START:END");
    bad(run + "--n-predict 0", "at least 1");
    bad(run + "--n-predict 300", "256 positions");
    bad(run + "--threads 0", "at least 1");
    bad(run + "--temperature -1", "must not be negative");
    bad(run + "--temperature nan", "finite number");
    bad("--model " + MODEL + ".missing --prompt a", "No such file");

    // not a model, a truncated model, an unknown architecture
    const std::string model = contents(MODEL);
    const std::string file  = scratch(".bad.gguf");
    std::ofstream(file, std::ios::binary) << "hello";
    bad("--model " + file + " --prompt a", "cannot load the model");
    std::ofstream(file, std::ios::binary) << model.substr(0, model.size()/2);
    bad("--model " + file + " --prompt a", "cannot load the model");
    std::string other = model;
    CHECK(other.find("llama") != std::string::npos);
    other.replace(other.find("llama"), 5, "lamma");
    std::ofstream(file, std::ios::binary) << other;
    bad("--model " + file + " --prompt a", "cannot load the model");
    std::remove(file.c_str());
    bad("--model " + file.substr(0, file.rfind('/')) + " --prompt a", "cannot load the model"); // a folder
}

int main(int argc, char ** argv) {
    CHECK(argc == 4);
    PROGRAM = argv[2];
    MODEL   = argv[3];
    static const test_case cases[] = {
        { "help", help },
        { "generates", generates },
        { "control_vector", control_vector },
        { "bad_input", bad_input },
    };
    return run_case(cases, argv[1]);
}
