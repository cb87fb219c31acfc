// Normal random numbers that can be computed in any order and are the same bits everywhere.
//
// Only integer operations and the floating-point operations that IEEE 754 rounds exactly
// (+ - * / sqrt) are used. exp, log and friends differ between C libraries, so the logarithm is
// written out. To be compiled without fused multiply-add and without -ffast-math (CMakeLists.txt).

#pragma once

#include <array>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

static_assert(std::numeric_limits<double>::is_iec559, "IEEE 754 doubles are needed");
#if defined(FLT_EVAL_METHOD) && FLT_EVAL_METHOD != 0
#error "this target computes with excess precision: the numbers would differ from other platforms (x87: use -msse2 -mfpmath=sse)"
#endif
#if defined(__FAST_MATH__)
#error "-ffast-math reorders arithmetic: the numbers would differ from other platforms"
#endif

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a keyed
// bijection of a 128-bit counter. No state, so element n of a stream costs the same as element 0.
inline std::array<uint32_t, 4> philox4x32_10(std::array<uint32_t, 4> c, uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; round++) {
        const uint64_t p0 = uint64_t(0xD2511F53u)*c[0];
        const uint64_t p1 = uint64_t(0xCD9E8D57u)*c[2];
        c = { uint32_t(p1 >> 32) ^ c[1] ^ key0, uint32_t(p1), uint32_t(p0 >> 32) ^ c[3] ^ key1, uint32_t(p0) };
        key0 += 0x9E3779B9u; // golden ratio
        key1 += 0xBB67AE85u; // sqrt(3) - 1
    }
    return c;
}

// Natural logarithm of a positive normal double, to about 1 ulp: x = 2^e m with m in [sqrt(1/2), sqrt(2)),
// log m = 2 atanh(s) with s = (m - 1)/(m + 1), |s| < 0.172, as a series.
inline double exact_log(double x) {
    uint64_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    int e = int(bits >> 52) - 1023;
    bits = (bits & 0x000FFFFFFFFFFFFFull) | 0x3FF0000000000000ull;
    double m;
    std::memcpy(&m, &bits, sizeof(m));
    if (m > 1.4142135623730951) {
        m *= 0.5;
        e += 1;
    }
    const double s  = (m - 1.0)/(m + 1.0);
    const double s2 = s*s;
    double sum = 0.0;
    for (int n = 23; n >= 1; n -= 2) { // 0.172^24 / 25 < 2^-65
        sum = sum*s2 + 1.0/n;
    }
    return double(e)*0.6931471805599453 + 2.0*s*sum;
}

// Quantile function of the standard normal distribution, relative error about 1e-16:
// Wichura, "Algorithm AS 241", Applied Statistics 37 (1988), PPND16. 0 < p < 1.
inline double normal_quantile(double p) {
    const auto ratio = [](const double (&a)[8], const double (&b)[8], double r) {
        double num = a[7];
        double den = b[7];
        for (int i = 6; i >= 0; i--) {
            num = num*r + a[i];
            den = den*r + b[i];
        }
        return num/den;
    };

    static const double a[8] = { 3.3871328727963666080e0,  1.3314166789178437745e+2, 1.9715909503065514427e+3, 1.3731693765509461125e+4,
                                 4.5921953931549871457e+4, 6.7265770927008700853e+4, 3.3430575583588128105e+4, 2.5090809287301226727e+3 };
    static const double b[8] = { 1.0,                      4.2313330701600911252e+1, 6.8718700749205790830e+2, 5.3941960214247511077e+3,
                                 2.1213794301586595867e+4, 3.9307895800092710610e+4, 2.8729085735721942674e+4, 5.2264952788528545610e+3 };
    static const double c[8] = { 1.42343711074968357734e0,  4.63033784615654529590e0,  5.76949722146069140550e0,  3.64784832476320460504e0,
                                 1.27045825245236838258e0,  2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4 };
    static const double d[8] = { 1.0,                       2.05319162663775882187e0,  1.67638483018380384940e0,  6.89767334985100004550e-1,
                                 1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9 };
    static const double e[8] = { 6.65790464350110377720e0,  5.46378491116411436990e0,  1.78482653991729133580e0,  2.96560571828504891230e-1,
                                 2.65321895265761230930e-2, 1.24266094738807843860e-3, 2.71155556874348757815e-5, 2.01033439929228813265e-7 };
    static const double f[8] = { 1.0,                       5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2,
                                 7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7, 2.04426310338993978564e-15 };

    const double q = p - 0.5;
    if (q >= -0.425 && q <= 0.425) {
        return q*ratio(a, b, 0.180625 - q*q);
    }
    const double r = std::sqrt(-exact_log(q < 0.0 ? p : 1.0 - p));
    const double x = r <= 5.0 ? ratio(c, d, r - 1.6) : ratio(e, f, r - 5.0);
    return q < 0.0 ? -x : x;
}

// Element `index` of stream `stream` of the N(0, 1) numbers that belong to `seed`.
// One counter block holds 128 bits, that is two elements of 64 bits each.
inline double philox_normal(uint64_t seed, uint32_t stream, uint64_t index) {
    const uint64_t block = index >> 1;
    const auto     x     = philox4x32_10({ uint32_t(block), uint32_t(block >> 32), stream, 0 }, uint32_t(seed), uint32_t(seed >> 32));
    const uint64_t bits  = index & 1 ? uint64_t(x[3]) << 32 | x[2] : uint64_t(x[1]) << 32 | x[0];

    // 52 bits and a half: exact in a double, symmetric about 1/2, never 0 or 1
    return normal_quantile((double(bits >> 12) + 0.5)*0x1p-52);
}
