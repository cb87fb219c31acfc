/* Continues a text greedily with a llama2.c model: an independent reader of the two file formats.
 *
 *   llama2c MODEL TOKENIZER COUNT tables|computed < text
 *
 * Written for the tests from the description of karpathy/llama2.c's version 0. Prints the tokens of
 * the text (with BOS), then the COUNT tokens that continue it, then those as text. The rotary
 * angles come from the file's tables, as in early versions of run.c, or are computed, as in later
 * ones. Sums are in double precision. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void die(const char *what) {
    fprintf(stderr, "llama2c: %s\n", what);
    exit(1);
}

static void *get(size_t count, size_t size) {
    void *memory = calloc(count, size);
    if (!memory) die("out of memory");
    return memory;
}

static void take(FILE *file, void *target, size_t bytes) {
    if (fread(target, 1, bytes, file) != bytes) die("file too short");
}

static FILE *open_or_die(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) die(path);
    return file;
}

/* --- tokenizer --- */

static char **piece;
static float *score;
static int vocabulary;

static void read_tokenizer(const char *path) {
    FILE *file = open_or_die(path);
    int32_t longest, length;
    take(file, &longest, 4);
    piece = get(vocabulary, sizeof *piece);
    score = get(vocabulary, sizeof *score);
    for (int i = 0; i < vocabulary; i++) {
        take(file, score + i, 4);
        take(file, &length, 4);
        if (length < 0 || length > longest) die("a piece is longer than the longest");
        piece[i] = get(length + 1, 1);
        take(file, piece[i], length);
    }
    if (fgetc(file) != EOF) die("tokenizer file too long");
    fclose(file);
}

static int find(const char *text, size_t length) {
    for (int i = 0; i < vocabulary; i++)
        if (strlen(piece[i]) == length && !memcmp(piece[i], text, length)) return i;
    return -1;
}

/* Letters, or their bytes when a letter has no piece, then the best merge again and again. */
static int encode(const char *text, int *tokens) {
    int n = 0;
    for (const char *at = text; *at;) {
        size_t length = 1;
        while ((at[length] & 0xC0) == 0x80) length++;
        int whole = find(at, length);
        if (whole >= 0) tokens[n++] = whole;
        else for (size_t i = 0; i < length; i++) tokens[n++] = (unsigned char) at[i] + 3;
        at += length;
    }
    for (;;) {
        int place = -1, merged = -1;
        for (int i = 0; i + 1 < n; i++) {
            size_t a = strlen(piece[tokens[i]]), b = strlen(piece[tokens[i + 1]]);
            char both[1024];
            if (a + b >= sizeof both) continue;
            memcpy(both, piece[tokens[i]], a);
            memcpy(both + a, piece[tokens[i + 1]], b);
            int id = find(both, a + b);
            if (id >= 0 && (merged < 0 || score[id] > score[merged])) place = i, merged = id;
        }
        if (place < 0) return n;
        tokens[place] = merged;
        memmove(tokens + place + 1, tokens + place + 2, (--n - place - 1) * sizeof *tokens);
    }
}

static void print_piece(int token) {
    unsigned byte;
    if (sscanf(piece[token], "<0x%02X>", &byte) == 1) putchar(byte);
    else fputs(piece[token], stdout);
}

/* --- model --- */

static int dim, hidden, layers, heads, kv_heads, window, size, kv_dim, computed;
static float *embedding, *norm1, *wq, *wk, *wv, *wo, *norm2, *w1, *w2, *w3, *norm3, *cosine, *sine,
    *classifier;
static float *keys, *values; /* [layer][position][kv_dim] */

static void read_model(const char *path) {
    FILE *file = open_or_die(path);
    int32_t head[7];
    take(file, head, sizeof head);
    dim = head[0], hidden = head[1], layers = head[2], heads = head[3], kv_heads = head[4];
    vocabulary = abs(head[5]), window = head[6], size = dim / heads, kv_dim = size * kv_heads;
    size_t v = vocabulary, d = dim, h = hidden, l = layers, k = kv_dim, half = window * (size / 2);
    struct { float **at; size_t count; } part[] = {
        {&embedding, v * d}, {&norm1, l * d}, {&wq, l * d * d}, {&wk, l * k * d}, {&wv, l * k * d},
        {&wo, l * d * d}, {&norm2, l * d}, {&w1, l * h * d}, {&w2, l * d * h}, {&w3, l * h * d},
        {&norm3, d}, {&cosine, half}, {&sine, half}, {&classifier, head[5] < 0 ? v * d : 0},
    };
    for (size_t i = 0; i < sizeof part / sizeof *part; i++) {
        *part[i].at = get(part[i].count + 1, sizeof(float));
        take(file, *part[i].at, part[i].count * sizeof(float));
    }
    if (head[5] > 0) classifier = embedding;
    if (fgetc(file) != EOF) die("model file too long");
    fclose(file);
    keys = get(l * window * k, sizeof(float));
    values = get(l * window * k, sizeof(float));
}

static void multiply(float *out, const float *matrix, const float *x, int rows, int columns) {
    for (int i = 0; i < rows; i++) {
        double sum = 0;
        for (int j = 0; j < columns; j++) sum += (double) matrix[(size_t) i * columns + j] * x[j];
        out[i] = sum;
    }
}

static void normalise(float *out, const float *x, const float *weight) {
    double sum = 0;
    for (int i = 0; i < dim; i++) sum += (double) x[i] * x[i];
    for (int i = 0; i < dim; i++) out[i] = weight[i] * (x[i] / sqrt(sum / dim + 1e-5));
}

/* Neighbouring elements are real and imaginary part of a number that is turned by an angle. */
static void turn(float *x, int width, int position) {
    for (int i = 0; i < width; i += 2) {
        int pair = i % size / 2;
        double angle = position / pow(10000, 2.0 * pair / size);
        double c = computed ? cos(angle) : cosine[position * (size / 2) + pair];
        double s = computed ? sin(angle) : sine[position * (size / 2) + pair];
        double real = x[i], imaginary = x[i + 1];
        x[i] = real * c - imaginary * s;
        x[i + 1] = real * s + imaginary * c;
    }
}

/* The most probable token after `token`, which stands at `position`. */
static int next(int token, int position) {
    float x[dim], y[dim], q[dim], heard[dim], gate[hidden], up[hidden];
    double weight[window];
    memcpy(x, embedding + (size_t) token * dim, sizeof x);
    for (size_t l = 0; l < (size_t) layers; l++) {
        float *k = keys + l * window * kv_dim, *v = values + l * window * kv_dim;
        normalise(y, x, norm1 + l * dim);
        multiply(q, wq + l * dim * dim, y, dim, dim);
        multiply(k + position * kv_dim, wk + l * kv_dim * dim, y, kv_dim, dim);
        multiply(v + position * kv_dim, wv + l * kv_dim * dim, y, kv_dim, dim);
        turn(q, dim, position);
        turn(k + position * kv_dim, kv_dim, position);
        for (int head = 0; head < heads; head++) {
            int group = head * kv_heads / heads * size;
            double total = 0, most = -INFINITY;
            for (int t = 0; t <= position; t++) {
                double sum = 0;
                for (int i = 0; i < size; i++)
                    sum += (double) q[head * size + i] * k[t * kv_dim + group + i];
                weight[t] = sum / sqrt(size);
                most = fmax(most, weight[t]);
            }
            for (int t = 0; t <= position; t++) total += weight[t] = exp(weight[t] - most);
            for (int i = 0; i < size; i++) {
                double sum = 0;
                for (int t = 0; t <= position; t++) sum += weight[t] * v[t * kv_dim + group + i];
                heard[head * size + i] = sum / total;
            }
        }
        multiply(y, wo + l * dim * dim, heard, dim, dim);
        for (int i = 0; i < dim; i++) x[i] += y[i];
        normalise(y, x, norm2 + l * dim);
        multiply(gate, w1 + l * hidden * dim, y, hidden, dim);
        multiply(up, w3 + l * hidden * dim, y, hidden, dim);
        for (int i = 0; i < hidden; i++) gate[i] = gate[i] / (1 + exp(-gate[i])) * up[i];
        multiply(y, w2 + l * dim * hidden, gate, dim, hidden);
        for (int i = 0; i < dim; i++) x[i] += y[i];
    }
    float *logits = get(vocabulary, sizeof *logits);
    normalise(x, x, norm3);
    multiply(logits, classifier, x, vocabulary, dim);
    int best = 0;
    for (int i = 1; i < vocabulary; i++) if (logits[i] > logits[best]) best = i;
    free(logits);
    return best;
}

int main(int argc, char **argv) {
    static char text[1 << 16] = " "; /* a space stands in front of every text */
    if (argc != 5) die("expected MODEL TOKENIZER COUNT tables|computed");
    computed = !strcmp(argv[4], "computed");
    read_model(argv[1]);
    read_tokenizer(argv[2]);
    size_t length = fread(text + 1, 1, sizeof text - 2, stdin);
    text[length + 1] = 0;
    int count = atoi(argv[3]), *tokens = get(length + 3 + count, sizeof *tokens);
    tokens[0] = 1;
    int n = length ? 1 + encode(text, tokens + 1) : 1;
    if (n + count > window) die("the window is too short");
    for (int i = 0; i < n; i++) printf("%d ", tokens[i]);
    printf("\n");
    for (int i = 0; i < n + count - 1; i++) {
        int following = next(tokens[i], i);
        if (i >= n - 1) tokens[i + 1] = following;
    }
    for (int i = n; i < n + count; i++) printf("%d ", tokens[i]);
    printf("\n");
    for (int i = n; i < n + count; i++) print_piece(tokens[i]);
    return 0;
}
