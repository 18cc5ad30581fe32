// KL divergence of a quantized GGUF from an exact one, on the tokens and windows that `coel eval --against` uses.
//
//     divergence EXACT.gguf QUANTIZED.gguf TOKENS...
//
// Each TOKENS is a file of little-endian i32, the tokens of a text. Windows of 512, no overlap, the first token of each not
// predicted. Link it with llama.cpp's static libraries: llama, ggml, ggml-cpu, ggml-base, and -fopenmp.
#include <llama.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

constexpr size_t WINDOW = 512;

static llama_context *open_model(const char *file) {
    llama_model *model = llama_model_load_from_file(file, llama_model_default_params());
    if (!model) std::exit(1);
    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = params.n_ubatch = WINDOW;
    params.n_threads = params.n_threads_batch = 2;
    return llama_init_from_model(model, params);
}

static void run(llama_context *context, const int32_t *tokens, int n) {
    llama_memory_clear(llama_get_memory(context), true);
    llama_batch batch = llama_batch_init(n, 0, 1);
    batch.n_tokens = n;
    for (int i = 0; i < n; i++) {
        batch.token[i] = tokens[i];
        batch.pos[i] = i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = 1;
    }
    if (llama_decode(context, batch)) std::exit(1);
    llama_batch_free(batch);
}

static double log_total(const float *logits, int n) {
    double most = *std::max_element(logits, logits + n), sum = 0;
    for (int i = 0; i < n; i++) sum += std::exp(logits[i] - most);
    return most + std::log(sum);
}

int main(int count, char **arguments) {
    if (count < 4) return 2;
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();
    llama_context *exact = open_model(arguments[1]), *other = open_model(arguments[2]);
    const int vocab = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(exact)));
    double divergence = 0, same = 0;
    long predicted = 0;
    for (int file = 3; file < count; file++) {
        std::vector<int32_t> tokens(1 << 24);
        FILE *from = std::fopen(arguments[file], "rb");
        if (!from) return 1;
        tokens.resize(std::fread(tokens.data(), sizeof(int32_t), tokens.size(), from));
        std::fclose(from);
        for (size_t first = 0; first + 1 < tokens.size(); first += WINDOW) {
            const int n = std::min(WINDOW, tokens.size() - first) - 1;
            run(exact, &tokens[first], n);
            run(other, &tokens[first], n);
            for (int i = 0; i < n; i++) {
                const float *p = llama_get_logits_ith(exact, i), *q = llama_get_logits_ith(other, i);
                const double p_total = log_total(p, vocab), q_total = log_total(q, vocab);
                for (int token = 0; token < vocab; token++) {
                    const double log_p = p[token] - p_total, log_q = q[token] - q_total;
                    divergence += std::exp(log_p) * (log_p - log_q);
                }
                same += std::max_element(p, p + vocab) - p == std::max_element(q, q + vocab) - q;
            }
            predicted += n;
        }
    }
    std::printf("%s: %ld predicted, KL %.6f, same top %.4f\n", arguments[2], predicted, divergence / predicted, same / predicted);
}
