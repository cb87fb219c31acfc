// libcommitment: the same bits everywhere, the right distribution, safe with threads.

#include "check.h"

#include "commitment.h"
#include "philox_normal.h"

#include <algorithm>
#include <set>
#include <string>
#include <thread>
#include <vector>

struct sample {
    std::vector<float> z, w_c, direction;
};

static sample draw(uint64_t seed, int32_t k, int32_t d) {
    sample s { std::vector<float>(k), std::vector<float>(size_t(k)*d), std::vector<float>(d) };
    CHECK(commitment_sample(seed, k, d, s.z.data(), s.w_c.data(), s.direction.data()) == COMMITMENT_OK);
    return s;
}

static uint32_t bits(float x) {
    uint32_t u;
    std::memcpy(&u, &x, sizeof(u));
    return u;
}

// known answers of the authors' implementation (Random123, kat_vectors)
static void philox() {
    using block = std::array<uint32_t, 4>;
    CHECK((philox4x32_10({ 0, 0, 0, 0 }, 0, 0) == block{ 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8 }));
    CHECK((philox4x32_10({ ~0u, ~0u, ~0u, ~0u }, ~0u, ~0u) == block{ 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd }));
    CHECK((philox4x32_10({ 0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344 }, 0xa4093822, 0x299f31d0)
           == block{ 0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1 }));
}

// the quantile inverts the distribution function, in the centre and far out in both tails
static void quantile() {
    for (double p : { 1e-16, 1e-12, 1e-9, 1e-5, 0.001, 0.02, 0.0749, 0.0751, 0.2, 0.4, 0.4999, 0.5, 0.75, 0.95, 0.999 }) {
        const double back = 0.5*std::erfc(-normal_quantile(p)/std::sqrt(2.0));
        CHECK(std::fabs(back/p - 1.0) < 1e-13, "p = %g gives %.17g", p, back);
        CHECK(p < 1e-5 || std::fabs(normal_quantile(p) + normal_quantile(1.0 - p)) < 1e-9, "symmetry at p = %g", p);
    }
    for (double x : { 1e-300, 1e-17, 0.1, 0.7, 0.7072, 1.0, 1.4142, 2.0, 3e200 }) {
        CHECK(std::fabs(exact_log(x) - std::log(x)) <= 4e-16*std::fabs(std::log(x)), "log(%g)", x);
    }
}

// These bits must never change, on any platform: published results name a seed and nothing else.
// They were computed by the Python implementation in tests/native/test_sampler.py.
static void known_answers() {
    const sample s = draw(7, 64, 128);
    const uint32_t z[]         = { 0x3daccac2, 0xbe2f1a3e, 0x3dd32c3c, 0x3e5cf7bc };
    const uint32_t w_c[]       = { 0xbe269782, 0xbdba9891, 0x3db1f02f, 0xbdb37222 };
    const uint32_t direction[] = { 0x3e18fcd1, 0x3bc804a8, 0x3dad9cb2, 0xbda24ff9 };
    for (int i = 0; i < 4; i++) {
        CHECK(bits(s.z[i]) == z[i], "z[%d] = 0x%08x", i, bits(s.z[i]));
        CHECK(bits(s.w_c[64*127 + 60 + i]) == w_c[i], "w_c[%d] = 0x%08x", i, bits(s.w_c[64*127 + 60 + i]));
        CHECK(bits(s.direction[i]) == direction[i], "direction[%d] = 0x%08x", i, bits(s.direction[i]));
    }

    // everything else, as one hash (FNV-1a over the bytes, little-endian)
    uint64_t hash = 0xcbf29ce484222325ull;
    for (uint64_t seed : { 0ull, 1ull, 0xFFFFFFFFull, 0x100000000ull, 0xFFFFFFFFFFFFFFFFull }) {
        const sample t = draw(seed, 33, 257);
        for (const std::vector<float> * part : { &t.z, &t.w_c, &t.direction }) {
            for (float x : *part) {
                for (int byte = 0; byte < 4; byte++) {
                    hash = (hash ^ (bits(x) >> 8*byte & 0xFF))*0x100000001b3ull;
                }
            }
        }
    }
    CHECK(hash == 0xc5e28767c500aff9ull, "hash = 0x%016llx", (unsigned long long) hash);
}

static void independent_streams() {
    const sample a = draw(3, 64, 128);
    CHECK(draw(3, 64, 4096).z == a.z, "z must not depend on d");
    CHECK(draw(4, 64, 128).z != a.z && draw(4, 64, 128).w_c != a.w_c, "seeds differ");
    CHECK(draw(3 + (1ull << 32), 64, 128).z != a.z, "all 64 bits of the seed count");

    // the first rows of W_c are the same numbers for every d, up to their scale
    const sample b = draw(3, 64, 256);
    for (size_t i = 0; i < a.w_c.size(); i++) {
        CHECK(std::fabs(a.w_c[i]/b.w_c[i] - std::sqrt((256.0 + 64)/(128 + 64))) < 1e-5);
    }

    // z is not a piece of W_c
    std::set<uint64_t> seen;
    for (uint64_t i = 0; i < 64; i++) {
        seen.insert(uint64_t(philox_normal(3, 0, i)*1e15));
        seen.insert(uint64_t(philox_normal(3, 1, i)*1e15));
    }
    CHECK(seen.size() == 128);

    // outputs are optional and do not change one another; the direction is W_c z* of the floats
    std::vector<float> z(64), direction(128);
    CHECK(commitment_sample(3, 64, 128, z.data(), nullptr, nullptr) == 0 && z == a.z);
    CHECK(commitment_sample(3, 64, 128, nullptr, nullptr, direction.data()) == 0 && direction == a.direction);
    CHECK(commitment_sample(3, 64, 128, nullptr, nullptr, nullptr) == 0);
    for (int row = 0; row < 128; row++) {
        double sum = 0.0;
        for (int col = 0; col < 64; col++) {
            sum += double(a.w_c[row*64 + col])*a.z[col];
        }
        CHECK(float(sum) == a.direction[row]);
    }
}

// Kolmogorov-Smirnov distance to N(0, 1), times sqrt(n): above 1.95 with probability 0.001
static double kolmogorov(std::vector<double> x) {
    std::sort(x.begin(), x.end());
    double distance = 0.0;
    for (size_t i = 0; i < x.size(); i++) {
        const double cdf = 0.5*std::erfc(-x[i]/std::sqrt(2.0));
        distance = std::max({ distance, std::fabs(cdf - double(i)/x.size()), std::fabs(cdf - double(i + 1)/x.size()) });
    }
    return distance*std::sqrt(double(x.size()));
}

static void check_normal(const char * what, const std::vector<double> & x) {
    const double n = double(x.size());
    double m1 = 0, m2 = 0, m3 = 0, m4 = 0, neighbours = 0;
    for (size_t i = 0; i < x.size(); i++) {
        m1 += x[i]/n;
        m2 += x[i]*x[i]/n;
        m3 += x[i]*x[i]*x[i]/n;
        m4 += x[i]*x[i]*x[i]*x[i]/n;
        neighbours += x[i]*x[(i + 1) % x.size()]/n;
    }
    // standard errors of the moments of n normal numbers; 4.5 of them is 1 in 150,000
    CHECK(std::fabs(m1)         < 4.5*std::sqrt( 1.0/n), "%s: mean %g", what, m1);
    CHECK(std::fabs(m2 - 1.0)   < 4.5*std::sqrt( 2.0/n), "%s: variance %g", what, m2);
    CHECK(std::fabs(m3)         < 4.5*std::sqrt(15.0/n), "%s: third moment %g", what, m3);
    CHECK(std::fabs(m4 - 3.0)   < 4.5*std::sqrt(96.0/n), "%s: fourth moment %g", what, m4);
    CHECK(std::fabs(neighbours) < 4.5*std::sqrt( 1.0/n), "%s: correlation of neighbours %g", what, neighbours);
    CHECK(kolmogorov(x) < 1.95, "%s: Kolmogorov-Smirnov %g", what, kolmogorov(x));
}

static void distribution() {
    // W_c: one large matrix. z: element 5 of many seeds, so that seeds are independent too
    const int32_t k = 64, d = 4096;
    std::vector<double> w, z;
    for (float x : draw(2026, k, d).w_c) {
        w.push_back(double(x)/std::sqrt(2.0/(d + k)));
    }
    for (uint64_t seed = 0; seed < 200000; seed++) {
        float one[8];
        CHECK(commitment_sample(seed, 8, 1, one, nullptr, nullptr) == 0);
        z.push_back(double(one[5])*std::sqrt(8.0));
    }
    check_normal("W_c", w);
    check_normal("z", z);

    // E |W_c z*|^2 = 2 d/(d + k), which is why A1 expects a norm near 1.4
    double mean = 0.0;
    for (uint64_t seed = 0; seed < 400; seed++) {
        for (float x : draw(seed, 16, 64).direction) {
            mean += double(x)*x/400;
        }
    }
    CHECK(std::fabs(mean/(2.0*64/(64 + 16)) - 1.0) < 0.1, "E |W_c z|^2 = %g", mean);
}

static void threads() {
    const sample expected = draw(99, 64, 512);
    std::vector<int> same(8, 0);
    std::vector<std::thread> pool;
    for (int i = 0; i < 8; i++) {
        pool.emplace_back([&, i] {
            for (int round = 0; round < 5; round++) {
                const sample s = draw(99, 64, 512);
                same[i] += s.z == expected.z && s.w_c == expected.w_c && s.direction == expected.direction;
            }
        });
    }
    for (std::thread & t : pool) {
        t.join();
    }
    CHECK(same == std::vector<int>(8, 5));
}

static void bad_input() {
    float z[4] = { -7, -7, -7, -7 };
    const struct { int32_t k, d, code; } bad[] = {
        { 0, 1, COMMITMENT_ERR_K }, { -1, 1, COMMITMENT_ERR_K }, { INT32_MIN, 1, COMMITMENT_ERR_K }, { COMMITMENT_MAX_K + 1, 1, COMMITMENT_ERR_K },
        { 1, 0, COMMITMENT_ERR_D }, { 1, -1, COMMITMENT_ERR_D }, { 1, INT32_MAX, COMMITMENT_ERR_D }, { 1, COMMITMENT_MAX_D + 1, COMMITMENT_ERR_D },
    };
    for (const auto & b : bad) {
        CHECK(commitment_sample(1, b.k, b.d, z, z + 1, z + 2) == b.code, "k = %d, d = %d", b.k, b.d);
        const float * direction = z;
        uint64_t      n         = 77;
        CHECK(commitment_once(1, b.k, b.d, &direction, &n) == b.code && direction == z && n == 77);
    }
    CHECK(z[0] == -7 && z[1] == -7 && z[2] == -7, "an error writes nothing");
    CHECK(commitment_sample(1, 1, 1, z, z + 1, z + 2) == COMMITMENT_OK && z[0] != -7 && z[3] == -7, "k = d = 1 is fine");

    std::set<std::string> messages;
    for (int32_t code = COMMITMENT_OK; code >= COMMITMENT_ERR_ONCE; code--) {
        messages.insert(commitment_error(code));
    }
    CHECK(messages.size() == size_t(1 - COMMITMENT_ERR_ONCE) && messages.count(commitment_error(-99)) == 0);
}

// many threads at once: one initialisation, one vector
static void once() {
    std::vector<const float *> directions(16, nullptr);
    std::vector<uint64_t>      counts(16, 0);
    std::vector<std::thread>   pool;
    for (int i = 0; i < 16; i++) {
        pool.emplace_back([&, i] { CHECK(commitment_once(7, 64, 512, &directions[i], &counts[i]) == COMMITMENT_OK); });
    }
    for (std::thread & t : pool) {
        t.join();
    }
    for (int i = 0; i < 16; i++) {
        CHECK(directions[i] == directions[0] && counts[i] == 1);
    }
    CHECK(std::equal(directions[0], directions[0] + 512, draw(7, 64, 512).direction.begin()));

    const float * direction = nullptr;
    uint64_t      n         = 77;
    CHECK(commitment_once(8, 64, 512, &direction, &n) == COMMITMENT_ERR_ONCE && !direction && n == 77, "another seed");
    CHECK(commitment_once(7, 32, 512, &direction, &n) == COMMITMENT_ERR_ONCE && !direction && n == 77, "another k");
    CHECK(commitment_once(7, 64, 256, &direction, &n) == COMMITMENT_ERR_ONCE && !direction && n == 77, "another d");
    CHECK(commitment_once(7, 64, 512, nullptr, &n) == COMMITMENT_ERR_NULL_OUTPUT);
    CHECK(commitment_once(7, 64, 512, &direction, nullptr) == COMMITMENT_OK && direction == directions[0]);
    CHECK(commitment_once(7, 64, 512, &direction, &n) == COMMITMENT_OK && n == 1, "still one");
}

// bad arguments do not use up the one initialisation
static void once_bad_first() {
    const float * direction = nullptr;
    uint64_t      n         = 0;
    CHECK(commitment_once(1, 0, 8, &direction, &n) == COMMITMENT_ERR_K);
    CHECK(commitment_once(1, 8, 8, nullptr, &n) == COMMITMENT_ERR_NULL_OUTPUT);
    CHECK(commitment_once(2, 8, 8, &direction, &n) == COMMITMENT_OK && direction && n == 1);
}

int main(int argc, char ** argv) {
    CHECK(argc == 2);
    static const test_case cases[] = {
        { "philox", philox },
        { "quantile", quantile },
        { "known_answers", known_answers },
        { "independent_streams", independent_streams },
        { "distribution", distribution },
        { "threads", threads },
        { "bad_input", bad_input },
        { "once", once },
        { "once_bad_first", once_bad_first },
    };
    return run_case(cases, argv[1]);
}
