// The least that a test needs: CHECK, and a table of named cases of which argv[1] picks one.

#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>

#define CHECK(condition, ...)                                                       \
    do {                                                                            \
        if (!(condition)) {                                                         \
            std::fprintf(stderr, "%s:%d: CHECK(%s) failed", __FILE__, __LINE__, #condition); \
            std::fprintf(stderr, "  " __VA_ARGS__);                                 \
            std::fprintf(stderr, "\n");                                             \
            std::exit(1);                                                           \
        }                                                                           \
    } while (0)

struct test_case {
    const char * name;
    void (*run)();
};

template <size_t N> int run_case(const test_case (&cases)[N], const char * name) {
    for (const test_case & c : cases) {
        if (std::strcmp(c.name, name) == 0) {
            c.run();
            std::printf("%s: ok\n", name);
            return 0;
        }
    }
    std::fprintf(stderr, "no test case '%s'\n", name);
    return 1;
}
